"""The best adapter is kept, overfitting is noticed, and a run says what it did."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from inlay.errors import UsageError
from inlay.evaluation.rows import RowScores
from inlay.evaluation.score import Scored
from inlay.runs.best import BestCheckpoint
from inlay.runs.run import run
from test_crash import reviews, settings  # noqa: F401


def scored_rows(loss, rows=100, accuracy=0.5, noise=0.0, seed=0):
    """Rows whose mean loss is `loss`, with accidents of their own."""
    accidents = np.random.default_rng(seed).normal(size=rows)
    nats = loss + noise * (accidents - accidents.mean())
    hits = (np.arange(rows) < round(accuracy * rows)).astype(np.int64)
    return Scored(RowScores(np.arange(rows), nats, np.ones(rows, np.int64), hits))


def noted(metric, values, patience=None, losses=None, **more):
    best = BestCheckpoint(metric, patience)
    for n, value in enumerate(values):
        found = scored_rows(value, seed=n, **more) if metric == "loss" else scored_rows(1.0, accuracy=value)
        best.note(10 * (n + 1), losses[n] if losses else 1.0, found, {"w": torch.tensor([value])})
    return best


def test_the_best_is_the_lowest_loss_or_the_highest_share():
    assert noted("loss", [3.0, 1.0, 2.0]).best_step == 20
    assert noted("accuracy", [0.3, 0.9, 0.9]).best_step == 20
    assert noted("loss", [math.nan, math.nan]).best_step is None
    best = noted("loss", [math.nan, 2.0, math.nan])
    assert best.best_step == 20 and best.weights["w"].item() == 2.0


def test_patience_counts_scores_that_are_no_better():
    assert not noted("loss", [1.0, 2.0], patience=2).out_of_patience
    assert noted("loss", [1.0, 2.0, 1.5], patience=2).out_of_patience
    assert not noted("loss", [1.0, 2.0, 0.5], patience=2).out_of_patience
    assert not noted("loss", [1.0, 2.0, 3.0, 4.0]).out_of_patience


def test_overfitting_is_said_once_and_only_where_training_loss_falls():
    rising = [1.0, 0.9, 0.95, 1.1]
    best = noted("loss", rising, losses=[2.0, 1.5, 1.0, 0.5])
    said = best.overfitting()
    assert "overfitting" in said and "dropout of 0.05 to 0.2" in said and "step 20" in said
    assert not best.overfitting()
    assert not noted("loss", rising, losses=[1.0, 1.0, 1.2, 1.4]).overfitting()
    assert not noted("loss", [1.0, 0.9, 0.905, 0.9], losses=[2.0, 1.5, 1.0, 0.5]).overfitting()


def test_overfitting_is_said_only_beyond_chance():
    falling, rising = [2.0, 1.5, 1.0, 0.5], [1.0, 0.9, 1.0, 1.2]
    for rows in range(2, 10):
        assert not noted("loss", rising, losses=falling, rows=rows).overfitting()
    assert "on 10 rows" in noted("loss", rising, losses=falling, rows=10).overfitting()
    # the same rise, where rows differ from step to step by far more than it
    assert not noted("loss", rising, losses=falling, rows=40, noise=2.0).overfitting()
    assert noted("loss", rising, losses=falling, rows=4000, noise=2.0).overfitting()


def test_a_best_checkpoint_goes_on_from_its_state():
    values, losses = [1.0, 0.9, 0.95, 1.1], [2.0, 1.5, 1.0, 0.5]
    whole, begun = noted("loss", values, losses=losses), noted("loss", values[:3], losses=losses)
    again = BestCheckpoint("loss")
    again.restore(begun.state())
    again.note(40, 0.5, scored_rows(1.1, seed=3), {"w": torch.tensor([1.1])})
    assert again.scores == whole.scores and again.best_step == 20
    assert again.overfitting() == whole.overfitting() != ""


@pytest.fixture
def told():
    return []


def test_the_adapter_is_the_best_and_last_is_the_last(base_folder, reviews, tmp_path, told):  # noqa: F811
    out = tmp_path / "run"
    given = {"steps": 30, "lr": 5e-2, "eval_every": 3, "patience": None}
    result = run(settings(base_folder, reviews, out, **given), on_message=told.append)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line["heldout"]["loss"] for line in lines if "heldout" in line}
    assert list(scored) == list(range(3, 31, 3))
    lowest = min(scored, key=lambda step: scored[step])
    assert result["best_step"] == lowest and result["choosing_rows"] == result["final_rows"] == 4
    assert result["heldout"]["loss"] != pytest.approx(scored[lowest], abs=1e-5)  # other rows than those that chose
    kept, last = (load_file(out / name / "adapter_model.safetensors") for name in ("adapter", "last"))
    assert any(not torch.equal(kept[key], last[key]) for key in kept) == (lowest != 30)
    for name in ("memory_mb", "peak_memory_mb", "lr", "norm", "seconds", "tokens"):
        assert lines[-1][name] is not None


def test_patience_ends_a_run(base_folder, reviews, tmp_path, told):  # noqa: F811
    given = {"steps": 400, "lr": 0.2, "eval_every": 2, "patience": 3, "checkpoint_every": 100}
    result = run(settings(base_folder, reviews, tmp_path / "run", **given), on_message=told.append)
    assert result["status"] == "stopped early" and result["steps"] < 400
    assert result["steps"] == result["best_step"] + 6
    assert any("stopped early" in line for line in told)


def test_a_wild_rate_stops_and_names_the_rows_and_keeps_the_best(base_folder, reviews, tmp_path, told):  # noqa: F811
    given = {"lr": 1e30, "schedule": "constant", "warmup": 0.5, "steps": 20, "eval_every": 1, "set": {"r": 2}}
    result = run(settings(base_folder, reviews, tmp_path / "run", **given), on_message=told.append)
    assert result["status"].startswith("diverged at step")
    line = next(line for line in told if line.startswith("diverged"))
    assert "reviews.csv, line" in line and "lower --lr" in line
    kept = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(bool(value.isfinite().all()) for value in kept.values())
    assert line in json.loads((tmp_path / "run" / "run.json").read_text())["notices"]


def test_one_absurd_step_is_not_done(base_folder, reviews, tmp_path, told):  # noqa: F811
    out = tmp_path / "run"
    given = {"lr": 1e38, "steps": 1, "heldout": "0", "eval_every": None}
    result = run(settings(base_folder, reviews, out, **given), on_message=told.append)
    assert result["status"] == "diverged at step 1" and result["steps"] == result["best_step"] == 0
    assert any(line.startswith("diverged at step 1 (the update took the parameters") for line in told)
    for name in ("adapter", "last"):
        kept = load_file(out / name / "adapter_model.safetensors")
        assert all(bool(value.isfinite().all()) for value in kept.values())
        assert all(not value.any() for key, value in kept.items() if "lora_B" in key)  # as it began
    json.loads((out / "run.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_the_metrics_log_has_the_rate_of_each_step(base_folder, reviews, tmp_path, told):  # noqa: F811
    run(settings(base_folder, reviews, tmp_path / "run", steps=4, lr=1.0, clip=1e-6), on_message=told.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [1.0, 0.75, 0.5, 0.25]


def test_metrics_that_rows_do_not_have_are_refused(base_folder, reviews, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match="no metric 'perplexity'"):
        run(settings(base_folder, reviews, tmp_path / "run", metric="perplexity"))
    with pytest.raises(UsageError, match="held-out rows"):
        run(settings(base_folder, reviews, tmp_path / "run", heldout="0", patience=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("metric", ["accuracy", "f1", "loss"])
def test_any_metric_chooses(metric, base_folder, reviews, tmp_path, told):  # noqa: F811
    result = run(settings(base_folder, reviews, tmp_path / "run", metric=metric), on_message=told.append)
    assert result["metric"] == metric and result["heldout"][metric] >= 0


def test_rows_of_a_heldout_file_that_are_trained_on_are_said(base_folder, reviews, tmp_path, told):  # noqa: F811
    run(settings(base_folder, reviews, tmp_path / "run", heldout=str(reviews)), on_message=told.append)
    assert any("40 of the 40 held-out rows" in line for line in told)
