"""A run is a list of learners: each equals its solo run, whatever becomes of the others and of the process."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.bases.load import load_base
from inlay.errors import FormatError, UsageError
from inlay.runs.checkpoint import Checkpoints
from inlay.runs.run import run
from inlay.runs.turns import Selection
from inlay.runtime.forward import Segment, token_losses
from inlay.runtime.memory import TokenBudget
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import content, dying_at, forked, reviews, settings  # noqa: F401
from test_training import PLANS, examples, same
from zoo import make

CALM = Plan("calm", inlay.LoRA(r=2, dropout=0.1), lr=1e-2, batch_size=4, steps=12, seed=1)
HASTY = Plan("hasty", inlay.PromptTuning(num_virtual_tokens=3), lr=1.0, batch_size=3, steps=60, seed=2)
WILD = Plan("wild", inlay.LoRA(r=2), lr=1e30, batch_size=5, steps=20, schedule="constant", warmup=0.5, seed=3)
LATE = Plan("late", inlay.IA3(), lr=1e-2, batch_size=3, steps=5, seed=4)


def quiet(line):
    pass


# ---- the loop


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_learner_added_later_equals_its_solo_run_in_the_same_forwards(name):
    plans = [PLANS[0], Plan("late", inlay.Pfeiffer(dropout=0.2), lr=1e-2, batch_size=4, steps=6, seed=9)]
    bank = inlay.attach(make(name))
    learners = add_learners(bank, plans[:1], 24)
    forwards, steps, ages = [0], 0, set()

    def counted(*_):
        forwards[0] += torch.is_grad_enabled()

    hook = bank.model.register_forward_hook(counted)
    for stepped in train_steps(bank, learners, examples(), TokenBudget(4096)):
        steps += 1
        ages.add(tuple(learner.step for learner in stepped))
        assert forwards[0] == steps
        if steps == 3:
            learners += add_learners(bank, plans[1:], 24)
    hook.remove()
    assert (4, 1) in ages and (9, 6) in ages and steps == 20
    for plan in plans:
        solo = inlay.attach(make(name))
        alone = add_learners(solo, [plan], 24)
        for _ in train_steps(solo, alone, examples(), TokenBudget(4096)):
            pass
        same(bank, solo, plan.name, 1e-9)


def test_a_learner_that_is_stopped_is_frozen_and_changes_nobody():
    bank = inlay.attach(make("llama"))
    learners = add_learners(bank, PLANS[:2], 24)
    kept = None
    for stepped in train_steps(bank, learners, examples(), TokenBudget(4096)):
        if stepped[0].step == 5 and learners[1].live:
            learners[1].stop("dropped")
            kept = learners[1].weights()
    assert learners[1].stopped == "dropped" and learners[1].step == 5 and learners[0].step == 20
    assert kept is not None and all(torch.equal(value, kept[n]) for n, value in learners[1].weights().items())
    solo = inlay.attach(make("llama"))
    for _ in train_steps(solo, add_learners(solo, PLANS[:1], 24), examples(), TokenBudget(4096)):
        pass
    same(bank, solo, PLANS[0].name, 1e-9)


def test_a_loop_that_is_left_early_leaves_nothing_behind():
    model = make("llama")
    ids = torch.arange(3, 20)[None]
    plain = model(input_ids=ids).logits
    bank = inlay.attach(model)
    learners = add_learners(bank, PLANS[:2], 24)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    for recompute in (False, True):
        for _ in train_steps(bank, learners, examples(), TokenBudget(4096), recompute):
            break
        assert all(not learner.adapter.flats for learner in learners)
        assert all(p.grad is None for learner in learners for p in learner.parameters)
        assert not any(module.training for module in model.modules())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=1e-12, atol=1e-12)
    assert [learner.step for learner in learners] == [2, 2]
    for _ in train_steps(bank, learners, examples(), TokenBudget(4096)):
        pass
    assert [learner.stopped for learner in learners] == ["done", "done"]


def test_a_forward_trains_all_of_its_segments_or_none():
    bank = inlay.attach(make("llama"))
    rows = examples(2)
    with pytest.raises(UsageError, match="in training and others"):
        token_losses(bank, [Segment(None, rows[0], step=1), Segment(None, rows[1])])


# ---- the run


@pytest.fixture
def doubled(monkeypatch):
    """Bases in float64, so that equal means equal."""

    def double(*given):
        base = load_base(*given)
        base.model.double()
        return base

    monkeypatch.setattr("inlay.runs.run.load_base", double)


def several(base_folder, reviews, out, plans, **more):  # noqa: F811
    given = {"patience": 3, "eval_every": 2, "checkpoint_every": 4}
    ends = {name: more.pop(name) for name in ("on_step", "on_message", "select") if name in more}
    ends.setdefault("on_message", quiet)
    return run(settings(base_folder, reviews, out, **{**given, **more}), plans=plans, **ends)


def lines(out, name):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timing = ("seconds", "memory_mb", "peak_memory_mb")
    return [{k: v for k, v in line.items() if k not in timing} for line in found if line["learner"] == name]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-8)


def flat(line):
    return {**{k: v for k, v in line.items() if k not in ("heldout", "learner")}, **line.get("heldout", {})}


def test_several_learners_in_one_folder_equal_their_solo_runs(doubled, base_folder, reviews, tmp_path):  # noqa: F811
    said = []
    plans = [CALM, HASTY, WILD]
    result = several(base_folder, reviews, tmp_path / "all", plans, on_message=said.append)
    assert list(result["learners"]) == ["calm", "hasty", "wild"] and result["status"] == "done"
    assert result["learners"]["calm"]["status"] == "done"
    assert result["learners"]["hasty"]["status"] == "stopped early"
    assert result["learners"]["wild"]["status"].startswith("diverged at step")
    assert any(line.startswith("hasty: stopped early") for line in said)
    assert any(line.startswith("wild: diverged at step") and "reviews.csv, line" in line for line in said)
    record = json.loads((tmp_path / "all" / "run.json").read_text())
    assert record["result"] == result and record["status"] == "done"
    for plan in plans:
        name, own = plan.name, result["learners"][plan.name]
        alone = several(base_folder, reviews, tmp_path / name, [plan])
        ours, theirs = lines(tmp_path / "all", name), lines(tmp_path / name, name)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs] != []
        for one, other in zip(map(flat, ours), map(flat, theirs), strict=True):
            assert {key for key in one if one[key] is None} == {key for key in other if other[key] is None}
            numbers = {key: value for key, value in other.items() if value is not None}
            assert {key: one[key] for key in numbers} == pytest.approx(numbers, rel=1e-8, abs=1e-9)
        close(weights(tmp_path / "all" / "adapters" / name), weights(tmp_path / name / "adapter"))
        close(weights(tmp_path / "all" / "last" / name), weights(tmp_path / name / "last"))
        for key in ("status", "steps", "tokens", "best_step", "trainable_parameters", "method", "lr"):
            assert own[key] == alone[key], key
        assert own["heldout"] == pytest.approx(alone["heldout"], rel=1e-6)
        assert own["adapter"] == str(tmp_path / "all" / "adapters" / name)
        assert (tmp_path / "all" / "final" / f"{name}.jsonl").read_text().count("\n") == own["final_rows"] > 0
    calm, hasty = (weights(tmp_path / "all" / "adapters" / name) for name in ("calm", "hasty"))
    assert calm.keys() != hasty.keys()
    card = (tmp_path / "all" / "adapters" / "hasty" / "README.md").read_text()  # with the command that trains it alone
    assert all(part in card for part in ("--method prompt", "--lr 1.0", "--steps 60", "--batch-size 3"))


def test_a_run_of_one_is_flat_and_named_by_its_plan(base_folder, reviews, tmp_path):  # noqa: F811
    result = several(base_folder, reviews, tmp_path / "run", [CALM])
    assert result["status"] == "done" and result["steps"] == 12 and "learners" not in result
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {"adapter", "last", "checkpoints", "metrics.jsonl", "run.json", "report.html", "final.jsonl"}
    assert lines(tmp_path / "run", "calm")[-1]["step"] == 12
    longer = Plan("calm", CALM.method, lr=1e-2, batch_size=4, steps=15, seed=1)
    with pytest.raises(UsageError, match=r"calm: lr was 0\.01, is 0\.02"):
        wrong = Plan("calm", CALM.method, lr=2e-2, batch_size=4, steps=15, seed=1)
        several(base_folder, reviews, tmp_path / "run", [wrong], resume=True)
    assert several(base_folder, reviews, tmp_path / "run", [longer], resume=True)["steps"] == 15


PAIR = [CALM, Plan("other", inlay.PrefixTuning(num_virtual_tokens=3), lr=0.05, batch_size=3, steps=8, seed=2)]


def files(out):
    """Every file that a run of several promises to be the same."""
    folders = [*(out / "adapters").iterdir(), *(out / "last").iterdir()]
    return {str(f.relative_to(out)): f.read_bytes() for folder in folders for f in folder.iterdir()}


def test_a_killed_run_of_two_ends_in_the_same_files(base_folder, reviews, tmp_path, monkeypatch):  # noqa: F811
    torch.set_num_threads(1)
    with monkeypatch.context() as patch, dying_at(0, patch) as count:
        several(base_folder, reviews, tmp_path / "whole" / "run", PAIR)
    whole = files(tmp_path / "whole" / "run")
    assert count["n"] > 30 and len(whole) >= 12
    for number in range(3, count["n"], 9):
        out = tmp_path / str(number) / "run"

        def killed(number=number, out=out):
            with dying_at(number, monkeypatch):
                several(base_folder, reviews, out, PAIR)

        assert forked(killed) == -signal.SIGKILL, number
        several(base_folder, reviews, out, PAIR, resume=True)
        assert files(out) == whole, number
        for plan in PAIR:
            assert [line["step"] for line in lines(out, plan.name)] == list(range(1, plan.steps + 1)), number


def chosen(progress, waiting):
    """The second plan starts at the first one's step 3, which is stopped at step 8."""
    by_name = {own.name: own.learner for own in progress}
    if not progress:
        return Selection(start=["calm"])
    stop = {"calm": "dropped"} if by_name["calm"].step == 8 else {}
    return Selection(stop, [plan.name for plan in waiting] if by_name["calm"].step == 3 else [])


def test_a_function_says_who_starts_and_who_stops(doubled, base_folder, reviews, tmp_path):  # noqa: F811
    said = []
    plans, given = [CALM, LATE], {"select": chosen, "patience": None, "checkpoint_every": 1}
    result = several(base_folder, reviews, tmp_path / "a" / "run", plans, on_message=said.append, **given)
    own = result["learners"]
    assert own["calm"]["status"] == "dropped" and own["calm"]["steps"] == 8 and "calm: dropped" in said
    assert own["late"]["status"] == "done" and own["late"]["steps"] == 5 and result["steps"] == 8
    several(base_folder, reviews, tmp_path / "solo", [LATE], patience=None)
    close(weights(tmp_path / "a" / "run" / "last" / "late"), weights(tmp_path / "solo" / "last"))

    for at in (2, 5):  # before and after the second one has started
        out = tmp_path / f"b{at}" / "run"

        def stop(learner, total, at=at):
            if learner.plan.name == "calm" and learner.step == at:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt, match=f"after step {at}"):
            several(base_folder, reviews, out, plans, on_step=stop, **given)
        record = json.loads((out / "run.json").read_text())
        assert record["status"] == "interrupted" and list(record["learners"]) == ["calm", "late"][: 1 + (at > 3)]
        again = several(base_folder, reviews, out, plans, resume=True, **given)
        assert again["learners"]["late"]["heldout"] == own["late"]["heldout"]
        for name in ("calm", "late"):
            assert lines(out, name) == lines(tmp_path / "a" / "run", name)
            for kind in ("adapters", "last"):
                ours, theirs = (weights(one / kind / name) for one in (out, tmp_path / "a" / "run"))
                assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_finished_run_of_two_is_extended_and_other_plans_are_refused(base_folder, reviews, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    first = several(base_folder, reviews, out, PAIR, patience=None)
    assert several(base_folder, reviews, out, PAIR, resume=True, patience=None) == first
    longer = [PAIR[0], Plan("other", PAIR[1].method, lr=0.05, batch_size=3, steps=11, seed=2)]
    with pytest.raises(UsageError, match="calm: seed was 1, is 5"):
        changed = Plan("calm", CALM.method, lr=1e-2, batch_size=4, steps=12, seed=5)
        several(base_folder, reviews, out, [changed, longer[1]], resume=True, patience=None)
    result = several(base_folder, reviews, out, longer, resume=True, patience=None)
    assert result["learners"]["other"]["steps"] == 11 and result["learners"]["calm"]["steps"] == 12
    assert [line["step"] for line in lines(out, "other")] == list(range(1, 12))


@pytest.mark.parametrize(
    ("plans", "said"),
    [
        ([CALM, CALM], "two learners are called 'calm'"),
        ([Plan("../x", inlay.LoRA())], "cannot name a folder"),
        ([], "there is no learner"),
    ],
)
def test_plans_that_cannot_be_are_refused(plans, said, base_folder, reviews, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match=said):
        several(base_folder, reviews, tmp_path / "run", plans)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_other_learners_or_versions_is_refused(base_folder, reviews, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    several(base_folder, reviews, out, [CALM], steps=2)
    record = json.loads((out / "run.json").read_text()) | {"status": "interrupted"}
    (out / "run.json").write_text(json.dumps(record))
    renamed = Plan("another", CALM.method, lr=1e-2, batch_size=4, steps=12, seed=1)
    with pytest.raises(UsageError, match="the learner calm is gone; the learner another is new"):
        several(base_folder, reviews, out, [renamed], steps=2, resume=True)
    plans = {"another": record["plans"]["calm"] | {"name": "another"}}
    (out / "run.json").write_text(json.dumps(record | {"plans": plans}))
    with pytest.raises(FormatError, match="holds the learner 'calm'"):
        several(base_folder, reviews, out, [renamed], steps=2, resume=True)
    (out / "run.json").write_text(json.dumps(record))
    Checkpoints(out / "checkpoints").write(99, {"learner": {}})
    with pytest.raises(FormatError, match="another version"):
        several(base_folder, reviews, out, [CALM], steps=2, resume=True)
