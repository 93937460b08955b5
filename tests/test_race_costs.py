"""What training took each contender of a race: the shares make the whole, and memory follows what is trained."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch

import inlay
from inlay.race import training_cost
from inlay.race.race import race
from inlay.race.training_cost import shared_seconds
from inlay.reporting.race_entrants import read_race
from inlay.runs.estimate import estimate_mb, learner_memory
from inlay.runtime.memory import MB, TokenBudget
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import reviews  # noqa: F401
from test_race import given
from test_race_page import contender, folder_of, page
from test_training import examples
from zoo import make

SPACE = """
entries:
  - {method: lora, r: [2, 4], lr: 1.0e-2}
  - {method: prefix, num_virtual_tokens: 5, lr: 1.0e-2}
  - {method: prompt, num_virtual_tokens: 3, lr: 1.0e-2}
"""


@pytest.fixture(autouse=True)
def no_latency(monkeypatch):
    monkeypatch.setattr("inlay.race.race.measured_latency", lambda *given: {})


# ---- time


def test_the_seconds_are_shared_by_tokens_and_what_a_token_takes():
    tokens = {"a": 100, "b": 100, "c": 50, "d": 0}
    found = shared_seconds(60.0, tokens, {"a": 2e-3, "b": 1e-3, "c": 4e-3}, dict.fromkeys(tokens, "x"))
    assert found == pytest.approx({"a": 24.0, "b": 12.0, "c": 24.0, "d": 0.0})


def test_one_without_a_time_has_that_of_its_method_or_of_all():
    methods = {"lora-a": "lora", "lora-b": "lora", "ia3": "ia3", "prefix": "prefix"}
    found = shared_seconds(7.0, dict.fromkeys(methods, 10), {"lora-a": 1e-3, "ia3": 3e-3}, methods)
    assert found == pytest.approx({"lora-a": 1.0, "lora-b": 1.0, "ia3": 3.0, "prefix": 2.0})
    assert shared_seconds(8.0, {"a": 3, "b": 1}, {}, {"a": "x", "b": "y"}) == {"a": 6.0, "b": 2.0}
    assert shared_seconds(8.0, {"a": 0}, {}, {"a": "x"}) == {"a": 0.0}


# ---- memory


def trained(method, optimizer="adamw", batch=4):
    """A learner that has taken two steps, with its bank."""
    bank = inlay.attach(make("llama"))
    plan = Plan("a", method, batch_size=batch, steps=2, lr=1e-3, optimizer=optimizer)
    learners = add_learners(bank, [plan], 24, examples=examples())
    for _ in train_steps(bank, learners, examples(), TokenBudget(4096)):
        pass
    return bank, learners[0]


def memory(*given, scored=False, **more):
    bank, learner = trained(*given, **more)
    return learner_memory(bank, learner, examples(), TokenBudget(4096), scored=scored)


def test_twice_the_rank_is_twice_the_parameters_gradients_and_state():
    small, large = memory(inlay.LoRA(r=2)), memory(inlay.LoRA(r=4))
    for part in ("parameters", "gradients", "optimizer", "copies"):
        assert getattr(large, part) == pytest.approx(2 * getattr(small, part), rel=1e-3), part
    assert small.activations < large.activations < 2 * small.activations  # most are the base's, whatever the rank is


def test_the_state_is_that_of_the_optimizer_and_twice_the_rows_hold_twice_as_much():
    usual, plain = memory(inlay.LoRA(r=2)), memory(inlay.LoRA(r=2), "sgd")
    assert plain.optimizer <= usual.optimizer / 2 and usual.optimizer == pytest.approx(2 * usual.parameters, rel=1e-2)
    assert memory(inlay.LoRA(r=2), batch=8).activations > 1.5 * usual.activations
    assert memory(inlay.LoRA(r=2), scored=True).copies == 2 * usual.copies == 2 * usual.parameters


def test_it_is_what_the_estimate_of_a_run_adds_to_the_memory_in_use(monkeypatch):
    monkeypatch.setattr("inlay.runs.estimate.current_memory_mb", lambda device: 0.0)
    monkeypatch.setattr("inlay.runs.estimate.KERNELS_MB", 0)
    bank, learner = trained(inlay.LoRA(r=2), batch=16)
    whole = estimate_mb(bank, [learner], examples(), TokenBudget(4096))["estimate_mb"]
    own = learner_memory(bank, learner, examples(), TokenBudget(4096))
    assert own.parameters == sum(p.numel() * p.element_size() for p in learner.adapter.parameters()) / MB
    assert own.total - own.parameters == pytest.approx(whole, rel=1e-3)


# ---- the whole


def test_race_json_and_the_page_hold_what_training_took(base_folder, reviews, tmp_path):  # noqa: F811
    result = race(given(base_folder, reviews, tmp_path / "run", SPACE, steps=9), on_message=lambda line: None)
    own = {one["name"].partition("-")[0] + str(one["config"].get("r", "")): one for one in result["contenders"]}
    shares = [one["training_seconds"] for one in result["contenders"]]
    assert len(own) == 4 and all(share > 0 for share in shares)
    assert sum(shares) == pytest.approx(result["stream_seconds"]) and result["stream_seconds"] <= result["seconds"]
    for one in own.values():
        assert one["training_memory_mb"] == pytest.approx(sum(one["training_memory_parts_mb"].values()))
    parts = {name: one["training_memory_parts_mb"] for name, one in own.items()}
    assert parts["lora4"]["optimizer"] == pytest.approx(2 * parts["lora2"]["optimizer"], rel=1e-3)
    assert own["prefix"]["prefix_tokens"] == 5 and own["prompt"]["virtual_tokens"] == 3
    assert own["lora2"]["prefix_tokens"] == own["lora2"]["virtual_tokens"] == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf8")
    assert "What each one costs" in page and "5 keys" in page and "training memory, estimate" in page
    again = race(given(base_folder, reviews, tmp_path / "run", SPACE, steps=9, resume=True), on_message=lambda _: None)
    assert again["contenders"] == result["contenders"]


def test_measuring_leaves_adapters_and_generators_as_they_are(base_folder, reviews, tmp_path, monkeypatch):  # noqa: F811
    usual, seen = training_cost.measured_training, {}

    def looked_at(context, progress, shares, *more):
        def values():
            return {own.name: own.learner.weights() for own in progress}, torch.get_rng_state()

        (before, state), found = values(), usual(context, progress, shares, *more)
        (after, later) = values()
        assert torch.equal(state, later)
        for name, own in before.items():
            assert all(torch.equal(value, after[name][key]) for key, value in own.items()), name
            assert all(p.grad is None for p in context.bank.adapters[name].parameters())
        seen.update(found)
        return found

    monkeypatch.setattr("inlay.race.race.measured_training", looked_at)
    race(given(base_folder, reviews, tmp_path / "run", SPACE, steps=6), on_message=lambda line: None)
    assert len(seen["training"]["contenders"]) == 4


def test_the_best_of_each_method_has_its_time_first(base_folder, reviews, tmp_path, monkeypatch):  # noqa: F811
    """Where time ends after three steps, three methods have one each, and the other LoRA has none of its own."""
    ticks = count()
    usual = training_cost.measured_training

    def ticking(context, progress, shares):
        return usual(context, progress, shares, lambda: float(next(ticks)))

    monkeypatch.setattr("inlay.race.race.measured_training", ticking)
    monkeypatch.setattr(training_cost, "LEAST", 8.0)
    result = race(given(base_folder, reviews, tmp_path / "run", SPACE, steps=6), on_message=lambda line: None)
    timed = [one["method"] for one in result["contenders"] if one["training_token_ms"] is not None]
    assert sorted(timed) == ["lora", "prefix", "prompt"]
    assert sum(one["training_seconds"] for one in result["contenders"]) == pytest.approx(result["stream_seconds"])


# ---- the page


def test_a_page_tells_what_training_took(tmp_path):
    memory = {"training_memory_mb": 211.5, "training_memory_parts_mb": {"optimizer": 11.5, "activations": 200.0}}
    listed = [contender("lora-a", 0.4, training_seconds=45.0, training_token_ms=1.234, **memory), contender("b", 0.5)]
    found = page(folder_of(tmp_path, *listed, stream_seconds=60.0))
    for wanted in ("45 s", "75.0 %", "1.23", "212 MB", "11.5 states, 200 activations", "whose 60 s from the rows"):
        assert wanted in found.said, wanted
    cost = read_race(tmp_path, json.loads((tmp_path / "race.json").read_text()), {}).entrants[0]
    assert (cost.training_seconds, cost.training_mb, cost.training_parts["activations"]) == (45.0, 211.5, 200.0)


def test_a_page_of_a_race_that_goes_on_says_that_costs_come_later(tmp_path):
    found = page(folder_of(tmp_path, contender("lora-a", 0.4), status="running"))
    assert "Training time and memory are known when the race is over." in found.said and "%" not in found.said.split(
        "What each one costs"
    )[1].split("Training time and memory are known")[0]  # fmt: skip
