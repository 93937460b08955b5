"""What a decoded token takes more with a contender: paired with the base, and said where it cannot be measured."""

from __future__ import annotations

from itertools import count

import pytest
import torch

import inlay
from inlay.data.encode import Example
from inlay.race.race import race
from inlay.runtime.latency import added_time, token_times
from test_crash import reviews  # noqa: F401
from test_race import SPACE, given
from zoo import make

PROMPT = Example(tuple(range(3, 13)), (True,) * 10, 0)


@pytest.fixture(scope="module")
def bank():
    bank = inlay.attach(make("llama"))
    bank.add("lora", inlay.LoRA(r=2), seed=0)
    bank.add("prompt", inlay.PromptTuning(num_virtual_tokens=3), seed=0)
    return bank


@pytest.mark.parametrize("name", [None, "lora", "prompt"])
def test_each_token_has_its_time(bank, name):
    ticks = count()
    assert token_times(bank, name, PROMPT, 5, 2, lambda: float(next(ticks))) == [1.0] * 5


def test_the_answers_are_those_of_the_adapter_and_as_long_as_asked(bank, monkeypatch):
    import inlay.runtime.latency as latency

    seen, usual = [], latency.generate
    monkeypatch.setattr(latency, "generate", lambda *given: (seen.append(token.id) or token for token in usual(*given)))
    with torch.no_grad():
        for p in bank.adapters["lora"].parameters():
            p.add_(1.0)
    token_times(bank, None, PROMPT, 6)
    token_times(bank, "lora", PROMPT, 6)
    assert len(seen) == 12 and seen[:6] != seen[6:]


def test_prompts_leave_positions_for_the_answer():
    bank = inlay.attach(make("gpt2"))
    bank.add("prompt", inlay.PromptTuning(num_virtual_tokens=3), seed=0)
    positions = bank.model.config.n_positions
    long = Example(tuple(n % 7 + 3 for n in range(2 * positions)), (True,) * 2 * positions, 0)
    assert len(token_times(bank, "prompt", long, 4)) == 4


def test_the_difference_is_that_of_the_adapter_on_a_machine_that_slows_down(bank, monkeypatch):
    """A token takes 10 ms with the base and 13 with the adapter, and everything a little more from one to the next."""
    import inlay.runtime.latency as latency

    slow, asked = count(), []

    def times(bank, name, prompt, new, rows=1, clock=None):
        asked.append(name)
        return [0.010 + 0.003 * (name is not None) + 1e-5 * next(slow) for _ in range(new)]

    monkeypatch.setattr(latency, "token_times", times)
    ticks = count()
    found = added_time(bank, "lora", PROMPT, 100.0, lambda: next(ticks) * 1e-3)
    assert found.median == pytest.approx(0.003, abs=2e-4) and found.pairs == 28
    assert found.quartiles[0] <= found.median <= found.quartiles[1]
    assert asked[2:4] == [None, "lora"] and asked[4:6] == ["lora", None]


def test_a_slow_base_is_asked_for_few_tokens(bank, monkeypatch):
    import inlay.runtime.latency as latency

    seen, now = [], [0.0]

    def times(bank, name, prompt, new, rows=1, clock=None):
        seen.append(new)
        now[0] += new
        return [1.0] * new

    monkeypatch.setattr(latency, "token_times", times)
    found = added_time(bank, "lora", PROMPT, 2.0, lambda: now[0])
    assert seen == [2, 2, 4, 4] and found.pairs == 3 and found.base == 1.0 and found.median == 0.0


def test_race_json_holds_it_of_those_that_finished(base_folder, reviews, tmp_path):  # noqa: F811
    said = []
    result = race(given(base_folder, reviews, tmp_path / "run", SPACE, steps=9), on_message=said.append)
    measured = {one["name"] for one in result["contenders"] if one["token_ms"] is not None}
    assert measured >= {one["name"] for one in result["contenders"] if one["status"] == "done"} | {result["winner"]}
    assert result["base_token_ms"] > 0 and result["latency_unmeasured"] is None
    low, high = result["contenders"][0]["token_ms_quartiles"]
    assert low <= result["contenders"][0]["token_ms"] <= high
    assert any("a decoded token takes" in line and result["winner"] in line for line in said)
    again = race(given(base_folder, reviews, tmp_path / "run", SPACE, steps=9, resume=True), on_message=said.append)
    assert again["contenders"] == result["contenders"]


def test_a_base_that_cannot_generate_says_so(base_folder, reviews, tmp_path, monkeypatch):  # noqa: F811
    import inlay.race.latency as latency

    def cannot(*args, **given):
        raise ValueError("no cache here\nat all")

    monkeypatch.setattr(latency, "added_time", cannot)
    said = []
    result = race(given(base_folder, reviews, tmp_path / "run", SPACE, steps=9), on_message=said.append)
    assert result["latency_unmeasured"] == "this base cannot generate here (no cache here)"
    assert all(one["token_ms"] is None for one in result["contenders"]) and result["winner"]
    assert any("not measured: this base cannot generate here (no cache here)" in line for line in said)


def test_a_head_writes_no_tokens_and_says_so(base_folder, reviews, tmp_path):  # noqa: F811
    said, space = [], "entries:\n  - {method: lora, r: [2, 4], lr: 1.0e-2}\n"
    more = {"steps": 6, "task": "classify", "template": None, "verbalizer": None}
    result = race(given(base_folder, reviews, tmp_path / "run", space, **more), on_message=said.append)
    assert result["latency_unmeasured"].startswith("this base writes no text here") and result["winner"]
    assert any("the time of a decoded token is not measured: this base writes no text" in line for line in said)
