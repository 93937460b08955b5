"""What a run says of its time before the first step, and what it keeps of it."""

from __future__ import annotations

import json

import pytest
import torch

import inlay
from inlay.reporting.facts import cost_facts
from inlay.runs import predicting
from inlay.runs.predicting import course_seconds
from inlay.runtime.memory import TokenBudget
from inlay.runtime.tasks import GENERATE
from inlay.training.loop import add_learners
from inlay.training.plan import Plan
from test_cli import answer, call
from test_crash import reviews, settings  # noqa: F401
from test_training import examples
from zoo import make


def learner_of(steps, batch=8):
    bank = inlay.attach(make("llama"))
    (learner,) = add_learners(bank, [Plan("a", inlay.LoRA(), steps=steps, batch_size=batch)], 24)
    return bank, learner


def predicted(bank, learner, monkeypatch, seconds):
    """With trials that take what `seconds` says of their tokens."""
    seen = []

    def trial(bank, learner, rows, *more):
        seen.append(sum(len(row.ids) for row in rows))
        return seconds(seen[-1])

    monkeypatch.setattr(predicting, "gradient_seconds", trial)
    return course_seconds(bank, learner, examples(), TokenBudget(4096), GENERATE), seen


def test_time_is_read_off_a_line_through_two_trials(monkeypatch):
    rows = examples()
    mean = 8 * sum(len(row.ids) for row in rows) / len(rows)
    found, seen = predicted(*learner_of(5000), monkeypatch, lambda tokens: 0.25 + 0.01 * tokens)
    assert found == pytest.approx(5000 * (0.25 + 0.01 * mean)) and len(seen) == 4 and seen[0] < seen[-1]


def test_noise_gives_no_less_than_nothing(monkeypatch):
    found, _ = predicted(*learner_of(5000), monkeypatch, lambda tokens: 1 / tokens)
    assert found is not None and found > 0


def test_short_courses_are_not_tried(monkeypatch):
    found, seen = predicted(*learner_of(20), monkeypatch, lambda tokens: 1.0)
    assert found is None and not seen


def test_a_trial_leaves_training_as_it_was():
    bank, learner = learner_of(5000)
    before, state = learner.weights(), torch.get_rng_state()
    rows = examples()
    torch.set_rng_state(state)
    assert (course_seconds(bank, learner, rows, TokenBudget(4096)) or 0) > 0
    assert torch.equal(torch.get_rng_state(), state) and learner.step == learner.tokens == 0
    assert all(torch.equal(before[name], own) for name, own in learner.weights().items())
    assert all(p.grad is None for p in learner.parameters)


@pytest.mark.parametrize("share", [64, 0])
def test_a_run_keeps_what_was_predicted(share, base_folder, reviews, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(predicting, "SHARE", share)
    given = ["train", "--base", base_folder, "--data", reviews, "--dtype", "float32", "--steps", 2, "--heldout", "0"]
    given += ["--template", r"Review: {text}\nSentiment:", "--verbalizer", "0=negative,1=positive"]
    result = answer(*given, "--out", tmp_path / "a")
    record = json.loads((tmp_path / "a" / "run.json").read_text(encoding="utf8"))
    assert result["predicted"] == record["predicted"] and result["predicted"]["memory_mb"] > 0
    assert result["predicted"]["memory_mb"] == record["memory"]["estimate_mb"]
    assert (result["predicted"]["seconds"] is None) == (share == 64)
    names = [name for name, _ in cost_facts(record)]
    assert "Estimated before" in names and ("Predicted before" in names) == (share == 0)
    shown = call(*given, "--out", tmp_path / "b").stdout
    assert "predicted before: " in shown and (" s, " in shown.partition("predicted before: ")[2]) == (share == 0)
    assert (tmp_path / "a" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
