"""What virtual tokens cost is measured on the run's own rows, changes nothing, and stands in its report."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch

import inlay
from inlay.data.typical import typical_rows
from inlay.reporting.facts import added_costs
from inlay.runs import added_cost as measuring
from inlay.runs.added_cost import added_cost
from inlay.runs.timing import base_seconds, gradient_seconds
from inlay.runtime.memory import TokenBudget
from inlay.runtime.tasks import GENERATE
from inlay.training.loop import add_learners
from inlay.training.plan import Plan
from test_cli import answer
from test_crash import reviews, settings  # noqa: F401
from test_training import examples
from zoo import make


def learner_of(method, name="llama", **more):
    bank = inlay.attach(make(name))
    (learner,) = add_learners(bank, [Plan("a", method, steps=3, batch_size=4, **more)], 24)
    return bank, learner


def measured(bank, learner):
    ticks, rows = count(), examples()
    state = torch.get_rng_state()
    found = added_cost(bank, learner, rows, TokenBudget(4096), clock=lambda: float(next(ticks)))
    assert torch.equal(torch.get_rng_state(), state)
    return found


@pytest.mark.parametrize("method", [inlay.PromptTuning(5), inlay.PrefixTuning(7)])
def test_it_is_measured_beside_lora_and_the_base_and_leaves_nothing(method):
    bank, learner = learner_of(method)
    before = learner.weights()
    found = measured(bank, learner)
    assert found is not None and {*found["costs"]} == {"adapter", "lora", "base"}
    assert (found["virtual_tokens"], found["prefix_tokens"]) == (method.virtual_length, method.prefix_length)
    assert all(own["step_seconds"] == 1.0 for own in found["costs"].values())  # by a clock that counts
    held = {name: own["held_mb"] for name, own in found["costs"].items()}
    assert held["adapter"] > 0 and held["lora"] > 0 and held["base"] is None
    assert [*bank.adapters] == ["a"] and learner.step == 0
    assert all(torch.equal(before[name], own) for name, own in learner.weights().items())
    assert all(p.grad is None for p in learner.parameters)


def test_more_virtual_tokens_hold_more():
    few, many = (measured(*learner_of(inlay.PromptTuning(n))) for n in (2, 30))
    assert few is not None and many is not None
    assert many["costs"]["adapter"]["held_mb"] > 2 * few["costs"]["adapter"]["held_mb"]
    assert many["costs"]["lora"]["held_mb"] == pytest.approx(few["costs"]["lora"]["held_mb"], rel=0.01)


def test_adapters_that_add_no_tokens_are_not_measured():
    assert measured(*learner_of(inlay.LoRA())) is None


def test_what_cannot_be_compared_says_why(monkeypatch):
    bank, learner = learner_of(inlay.PromptTuning(5))

    def fails(*given):
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(measuring, "base_seconds", fails)
    assert measured(bank, learner) == {"why": "no such kernel"} and [*bank.adapters] == ["a"]
    assert added_costs({"cost": {"added": {"why": "no such kernel"}}}) is None


@pytest.mark.parametrize("name", ["t5", "gpt2", "mamba"])
def test_bases_of_other_kinds_are_measured(name):
    found = measured(*learner_of(inlay.PromptTuning(5), name))
    assert found is not None and {*found["costs"]} == {"adapter", "lora", "base"}


def test_a_head_is_measured_beside_lora_alone(base_folder, reviews, tmp_path):  # noqa: F811
    given = ["train", "--base", base_folder, "--data", reviews, "--steps", 2, "--task", "classify", "--heldout", "0"]
    answer(*given, "--out", tmp_path / "head", "--method", "prefix", "--gradient-checkpointing")
    record = json.loads((tmp_path / "head" / "run.json").read_text(encoding="utf8"))
    costs = record["cost"]["added"]["costs"]
    assert {*costs} == {"adapter", "lora"} and costs["adapter"]["times"] is None
    told = added_costs(record)
    assert told is not None and [line[0] for line in told["lines"]] == ["this adapter", "LoRA r 8"]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_trial_step_changes_nothing(recompute):
    bank, learner = learner_of(inlay.LoRA(dropout=0.5), neftune_alpha=5.0)
    rows, before = typical_rows(examples(), 40), learner.weights()
    for _ in range(2):
        assert gradient_seconds(bank, learner, rows, TokenBudget(4096), GENERATE, recompute) > 0
    assert base_seconds(bank, rows, TokenBudget(4096), GENERATE, recompute) > 0
    assert all(torch.equal(before[name], own) for name, own in learner.weights().items()) and learner.step == 0


def test_the_base_alone_is_undone(monkeypatch):
    bank, _ = learner_of(inlay.LoRA())
    table = bank.base.stacks[0].get_input_embeddings()  # pyright: ignore
    hooks = len(table._forward_hooks)
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        base_seconds(bank, examples()[:2], TokenBudget(4096), GENERATE)
    assert len(table._forward_hooks) == hooks


def test_the_report_shows_it_where_there_are_virtual_tokens(base_folder, reviews, tmp_path):  # noqa: F811
    given = ["train", "--base", base_folder, "--data", reviews, "--dtype", "float32", "--steps", 2]
    given += ["--template", r"Review: {text}\nSentiment:", "--verbalizer", "0=negative,1=positive", "--heldout", "0.2"]
    answer(*given, "--out", tmp_path / "prompt", "--method", "prompt")
    record = json.loads((tmp_path / "prompt" / "run.json").read_text(encoding="utf8"))
    assert record["cost"]["added"]["virtual_tokens"] == 20
    told = added_costs(record)
    assert told is not None and [line[0] for line in told["lines"]][:2] == ["this adapter", "LoRA r 8"]
    page = (tmp_path / "prompt" / "report.html").read_text(encoding="utf8")
    assert "What the added tokens cost" in page and "20 virtual tokens beside rows of" in page
    answer(*given, "--out", tmp_path / "lora")
    assert "added" not in json.loads((tmp_path / "lora" / "run.json").read_text(encoding="utf8"))["cost"]
    assert "What the added tokens cost" not in (tmp_path / "lora" / "report.html").read_text(encoding="utf8")
