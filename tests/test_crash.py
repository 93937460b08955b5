"""Whatever kills a run, going on with it ends in the very same files."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import inlay.files
from inlay.errors import InlayError, UsageError
from inlay.runs.run import Settings, run

STEPS = 6


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with open(path, "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"a {'good' if n % 2 else 'bad'} film, number {n}", n % 2] for n in range(40))
    return path


def settings(base_folder, reviews, out, **more):
    given = {
        "base": str(base_folder), "data": [str(reviews)], "out": str(out), "set": {"r": 2, "dropout": 0.1},
        "steps": STEPS, "batch_size": 4, "lr": 1e-2, "heldout": "0.2", "eval_every": 2, "checkpoint_every": 1,
        "template": "Review: {text}\nSentiment:", "verbalizer": "0=negative,1=positive", "dtype": "float32",
    }  # fmt: skip
    return Settings(**{**given, **more})


def content(out: Path) -> dict[str, bytes]:
    files = [*(out / "adapter").iterdir(), *(out / "last").iterdir()]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def steps_of(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(base_folder, reviews, tmp_path_factory):
    """The files of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)  # as in the children, whose sums are compared with these
    run(settings(base_folder, reviews, out))
    assert steps_of(out) == list(range(1, STEPS + 1))
    return content(out)


def forked(work) -> int:
    """Do `work` in a child that ends however it ends; returns its exit code, or minus its signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def dying_at(number: int, monkeypatch):
    """Kill this process, as a power cut would, at the `number`-th write, fsync or rename."""
    count = {"n": 0}

    def counted(name, function, before=None):
        def call(*args, **kwargs):
            count["n"] += 1
            if count["n"] == number:
                if before is not None:
                    before(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            return result

        monkeypatch.setattr(os, name, call)

    def half(source, target):
        """The rename does not happen, and of the file only the first half has reached the disk."""
        os.truncate(source, os.path.getsize(source) // 2)

    counted("fsync", os.fsync)
    counted("replace", os.replace, half)
    real = os.chmod  # called when a file is written and not yet flushed

    def written(path, *args, **kwargs):
        count["n"] += 1
        if count["n"] == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "chmod", written)
    yield count


def points(base_folder, reviews, out, monkeypatch) -> int:
    """How many writes, fsyncs and renames a whole run makes."""
    with monkeypatch.context() as patch, dying_at(0, patch) as count:
        run(settings(base_folder, reviews, out))
    return count["n"]


@pytest.mark.parametrize("share", range(4))
def test_a_crash_at_any_write_is_survived(share, base_folder, reviews, whole, tmp_path, monkeypatch):
    total = points(base_folder, reviews, tmp_path / "count", monkeypatch)
    assert total > 40
    for number in range(1 + share, total + 1, 4):
        out = tmp_path / str(number) / "run"  # the card names the folder

        def killed(number=number, out=out):
            with dying_at(number, monkeypatch):
                run(settings(base_folder, reviews, out), on_message=lambda line: None)

        assert forked(killed) == -signal.SIGKILL, number
        for file in out.rglob("*.safetensors"):
            assert not file.name.startswith(".")
        said = []
        run(settings(base_folder, reviews, out, resume=True), on_message=said.append)
        assert content(out) == whole, (number, said)
        assert steps_of(out) == list(range(1, STEPS + 1)), (number, said)
        assert not list(out.rglob(".*.part"))


COMMAND = "import sys; from inlay.cli.app import app; sys.argv[0] = 'inlay'; app()"


def command(base_folder, reviews, out, *more):
    arguments = [
        "train", "--base", base_folder, "--data", reviews, "--out", out, "--steps", 40, "--batch-size", 4, "--lr", 1e-2,
        "--template", r"Review: {text}\nSentiment:", "--verbalizer", "0=negative,1=positive", "--heldout", "0.2",
        "--checkpoint-every", 3, "--dtype", "float32", "--set", "r=2", "--json", *more,
    ]  # fmt: skip
    return [sys.executable, "-c", COMMAND, *map(str, arguments)]


def test_five_real_kills_and_the_adapter_is_the_same(base_folder, reviews, tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    straight = subprocess.run(
        command(base_folder, reviews, tmp_path / "a" / "run"), capture_output=True, env=env, check=True
    )
    out = tmp_path / "b" / "run"
    kinds = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL]
    for n, kind in enumerate(kinds):
        more = ["--resume"] if n else []
        process = subprocess.Popen(
            command(base_folder, reviews, out, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        )
        enough = 4 + 6 * n
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            lines = (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0
            if lines >= enough:
                break
            time.sleep(0.005)
        process.send_signal(kind)
        _, errors = process.communicate()
        expected = {signal.SIGKILL: -9}.get(kind, 130)
        assert process.returncode in (expected, 0), errors
        if process.returncode == 130:
            assert b"--resume" in errors
    done = subprocess.run(command(base_folder, reviews, out, "--resume"), capture_output=True, env=env, check=True)
    assert content(out) == content(tmp_path / "a" / "run")
    assert steps_of(out) == list(range(1, 41))
    theirs, ours = json.loads(straight.stdout), json.loads(done.stdout)
    assert theirs["tokens"] == ours["tokens"] and theirs["heldout"] == ours["heldout"]


# ---- what resuming says


def broken_off(base_folder, reviews, out, after=3, **more):
    """A run that ended after some steps, with a checkpoint at each."""

    class Stop(BaseException):
        pass

    def stop(learner, total):
        if learner.step > after:
            raise Stop

    with pytest.raises(Stop):
        run(settings(base_folder, reviews, out, **more), stop, on_message=lambda line: None)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(base_folder, reviews, whole, tmp_path):
    out = tmp_path / "run"
    broken_off(base_folder, reviews, out)
    newest = sorted((out / "checkpoints").iterdir())[-1]
    raw = bytearray(newest.read_bytes())
    raw[-5] ^= 1
    newest.write_bytes(raw)
    said = []
    run(settings(base_folder, reviews, out, resume=True), on_message=said.append)
    damaged = next(n for n, line in enumerate(said) if "damaged" in line)
    assert "after step 2" in said[damaged + 1]
    assert content(out) == whole and steps_of(out) == list(range(1, STEPS + 1))


def test_nothing_to_resume_is_said_and_the_run_starts_afresh(base_folder, reviews, whole, tmp_path):
    said = []
    run(settings(base_folder, reviews, tmp_path / "run", resume=True), on_message=said.append)
    assert any("starting afresh" in line for line in said)
    assert content(tmp_path / "run") == whole
    out = tmp_path / "b" / "run"
    broken_off(base_folder, reviews, out)
    for file in (out / "checkpoints").iterdir():
        file.write_bytes(b"garbage")
    said.clear()
    run(settings(base_folder, reviews, out, resume=True), on_message=said.append)
    assert any("starting afresh" in line for line in said)
    assert content(out) == whole and steps_of(out) == list(range(1, STEPS + 1))


def test_other_settings_or_data_are_refused_with_the_difference(base_folder, reviews, tmp_path):
    out = tmp_path / "run"
    broken_off(base_folder, reviews, out)
    with pytest.raises(UsageError, match=r"lr was 0\.01, is 0\.02"):
        run(settings(base_folder, reviews, out, resume=True, lr=2e-2))
    other = tmp_path / "other.csv"
    other.write_text(reviews.read_text().replace("number 7", "number seven"))
    with pytest.raises(UsageError, match="data digest was"):
        run(settings(base_folder, other, out, resume=True))
    with pytest.raises(UsageError, match="unfinished run"):
        run(settings(base_folder, reviews, out))


def test_a_finished_run_has_nothing_to_resume(base_folder, reviews, tmp_path):
    first = run(settings(base_folder, reviews, tmp_path / "run"))
    said = []
    assert run(settings(base_folder, reviews, tmp_path / "run", resume=True), on_message=said.append) == first
    assert "finished" in said[0]


def test_only_the_last_checkpoints_are_kept(base_folder, reviews, tmp_path):
    run(settings(base_folder, reviews, tmp_path / "run", keep_checkpoints=3))
    names = [f.name for f in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == [f"step-{n:08d}.safetensors" for n in (4, 5, 6)]


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(base_folder, reviews, whole, tmp_path, monkeypatch):
    out, said = tmp_path / "run", []
    real = inlay.files.os.fsync

    def full(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        if "step-00000004" in name:
            raise OSError(28, "No space left on device")
        return real(handle)

    monkeypatch.setattr(inlay.files.os, "fsync", full)
    seen = []
    run(
        settings(base_folder, reviews, out),
        lambda c, total: seen.append([f.name for f in sorted((out / "checkpoints").glob("step*"))]), said.append,
    )  # fmt: skip
    assert any("No space left" in line and "the one before stays" in line for line in said)
    assert seen[4] == ["step-00000002.safetensors", "step-00000003.safetensors"]
    assert content(out) == whole and steps_of(out) == list(range(1, STEPS + 1))


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_holds_nothing(base_folder, reviews, tmp_path):
    out = tmp_path / "run"
    messages = []

    def second(learner, total):
        if learner.step == 2:
            code = forked(lambda: _refused(base_folder, reviews, out))
            messages.append(code)

    run(settings(base_folder, reviews, out), second)
    assert messages == [0]
    broken_off(base_folder, reviews, tmp_path / "b")
    assert (tmp_path / "b" / ".lock").exists()
    run(settings(base_folder, reviews, tmp_path / "b", resume=True))


def _refused(base_folder, reviews, out):
    with pytest.raises(InlayError, match="another run is at work"):
        run(settings(base_folder, reviews, out, resume=True), on_message=lambda line: None)


def test_a_run_that_diverged_after_a_resume_keeps_what_it_would_have_kept(base_folder, reviews, tmp_path):
    """The update that is taken back was made before the run was broken off."""

    def ruin(learner, total):
        if learner.step == 3 and learner.live:
            for parameter in learner.parameters:
                parameter.data.fill_(1e17)

    given = {"heldout": "0", "eval_every": None}
    ends = []
    for name, after in (("a", None), ("b", 3)):
        out = tmp_path / name / "run"
        if after is None:
            result = run(settings(base_folder, reviews, out, **given), ruin, on_message=lambda line: None)
        else:

            def stop(learner, total):
                ruin(learner, total)
                if learner.step == 3:
                    os.kill(os.getpid(), signal.SIGINT)

            with pytest.raises(KeyboardInterrupt):
                run(settings(base_folder, reviews, out, **given), stop, on_message=lambda line: None)
            result = run(settings(base_folder, reviews, out, resume=True, **given), on_message=lambda line: None)
        assert result["status"] == "diverged at step 4" and result["best_step"] == 2
        ends.append((out / "adapter" / "adapter_model.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_a_resumed_run_keeps_its_dtype(base_folder, reviews, tmp_path, monkeypatch):
    out = tmp_path / "run"
    broken_off(base_folder, reviews, out, dtype="bfloat16")
    story = json.loads((out / "run.json").read_text())
    assert story["dtype"] == "bfloat16"
    story["config"]["dtype"] = "auto"  # as though this machine had chosen it
    (out / "run.json").write_text(json.dumps(story))
    monkeypatch.setattr("inlay.bases.load.pick_dtype", lambda name, *rest: getattr(torch, name))
    run(settings(base_folder, reviews, out, resume=True, dtype="auto"), on_message=lambda line: None)
    assert json.loads((out / "run.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "adapter" / "inlay.json").read_text())["dtype"] == "bfloat16"


# ---- more of a finished run, and more of a saved adapter


def test_a_finished_run_is_extended(base_folder, reviews, tmp_path):
    out, said, rates = tmp_path / "run", [], []
    first = run(settings(base_folder, reviews, out))
    with pytest.raises(UsageError, match=r"lr was 0\.01, is 0\.02"):
        run(settings(base_folder, reviews, out, resume=True, steps=2 * STEPS, lr=2e-2))
    result = run(
        settings(base_folder, reviews, out, resume=True, steps=2 * STEPS),
        lambda learner, total: rates.append((learner.step, total, learner.rate)), said.append,
    )  # fmt: skip
    assert any(f"going on after step {STEPS}" in line for line in said)
    assert result["steps"] == 2 * STEPS and result["tokens"] > first["tokens"] and result["status"] == "done"
    assert steps_of(out) == list(range(1, 2 * STEPS + 1))
    # the rate is what the schedule of the new total says at each step
    assert rates == [(s, 12, pytest.approx(1e-2 * (1 - (s - 1) / 12))) for s in range(STEPS + 1, 2 * STEPS + 1)]
    for fewer in (2 * STEPS, STEPS):
        assert run(settings(base_folder, reviews, out, resume=True, steps=fewer), on_message=said.append) == result
        assert "nothing to go on with" in said[-1]


def test_an_extended_run_survives_being_broken_off(base_folder, reviews, tmp_path):
    ends = []
    for name in ("a", "b"):
        out = tmp_path / name / "run"
        run(settings(base_folder, reviews, out), on_message=lambda line: None)
        if name == "b":
            broken_off(base_folder, reviews, out, 2 * STEPS - 3, resume=True, steps=2 * STEPS)
            assert json.loads((out / "run.json").read_text())["status"] == "running"
        run(settings(base_folder, reviews, out, resume=True, steps=2 * STEPS), on_message=lambda line: None)
        ends.append(content(out))
    assert ends[0] == ends[1]


def test_epochs_extend_and_lost_checkpoints_do_not(base_folder, reviews, tmp_path):
    out = tmp_path / "run"
    first = run(settings(base_folder, reviews, out, steps=None, epochs=1), on_message=lambda line: None)
    assert run(settings(base_folder, reviews, out, steps=None, epochs=2, resume=True))["steps"] == 2 * first["steps"]
    for file in (out / "checkpoints").iterdir():
        file.unlink()
    before = content(out)
    with pytest.raises(UsageError, match="no checkpoint to go on from"):
        run(settings(base_folder, reviews, out, steps=None, epochs=3, resume=True))
    assert content(out) == before and json.loads((out / "run.json").read_text())["status"] == "done"


def test_a_saved_adapter_is_where_another_run_begins(base_folder, reviews, tmp_path):
    given = {"method": "prefix", "set": {"num_virtual_tokens": 3}, "lr": 1e-2}
    first = run(settings(base_folder, reviews, tmp_path / "a", **given), on_message=lambda line: None)
    seen = []
    more = {"method": "lora", "set": {}, "template": None, "verbalizer": None, "steps": 1, "lr": 1e-30}
    for source in (tmp_path / "a", tmp_path / "a" / "adapter"):
        out = tmp_path / f"b{len(seen)}"
        start = settings(base_folder, reviews, out, init_from=str(source), **more)
        result = run(start, on_message=lambda line: None)
        seen.append(result)
        assert result["method"] == first["method"] and result["heldout"] == pytest.approx(first["heldout"], abs=1e-4)
        notes = json.loads((out / "adapter" / "inlay.json").read_text())
        assert notes["template"]["prompt"] == "Review: {text}\nSentiment:"
    run(settings(base_folder, reviews, tmp_path / "b0", init_from=str(tmp_path / "a"), resume=True, **more))
    with pytest.raises(UsageError, match="Leave --method and --set out"):
        settings(base_folder, reviews, tmp_path / "c", init_from=str(tmp_path / "a"), **{**more, "set": {"r": 4}})
    with pytest.raises(UsageError, match="does not exist"):
        run(settings(base_folder, reviews, tmp_path / "c", init_from=str(tmp_path / "none"), **more))
    assert not (tmp_path / "c").exists()


# ---- nothing is left of what never began


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["estimate", "first step", "tracker"])
def test_a_run_that_fails_before_its_first_step_leaves_no_folder(where, base_folder, reviews, tmp_path, monkeypatch):
    def boom(*args, **kwargs):
        raise Boom

    spots = {
        "estimate": "inlay.runs.run.estimate_mb",
        "first step": "inlay.training.loop.step_gradients",
        "tracker": "inlay.runs.run.Tracker",
    }
    monkeypatch.setattr(spots[where], boom)
    with pytest.raises(Boom):
        run(settings(base_folder, reviews, tmp_path / "deep" / "run"), on_message=lambda line: None)
    assert not (tmp_path / "deep").exists()
    there = tmp_path / "there"
    (there / "sub").mkdir(parents=True)
    (there / "mine.txt").write_text("kept")
    with pytest.raises(Boom):
        run(settings(base_folder, reviews, there), on_message=lambda line: None)
    assert sorted(p.name for p in there.rglob("*")) == ["mine.txt", "sub"]


def test_a_resume_that_fails_leaves_the_run_as_it_was(base_folder, reviews, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    broken_off(base_folder, reviews, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def boom(*args):
        raise Boom

    with monkeypatch.context() as patch:
        patch.setattr("inlay.training.loop.step_gradients", boom)
        with pytest.raises(Boom):
            run(settings(base_folder, reviews, out, resume=True), on_message=lambda line: None)
    lines = before.pop(out / "metrics.jsonl")
    assert lines.startswith((out / "metrics.jsonl").read_bytes())  # cut to the checkpoint, as any resume does
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "metrics.jsonl"} == before
    run(settings(base_folder, reviews, out, resume=True), on_message=lambda line: None)
    assert content(out) == whole


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"track": "paper"}, "Trackers: "),
        ({"track": "clearml"}, "pip install clearml"),
        ({"metric": "perplexity"}, "no metric 'perplexity'"),
        ({"heldout": "nowhere.csv"}, "does not exist"),
        ({"group": "who"}, "no column 'who'"),
        ({"columns": {"text": "body"}}, "no column 'body'"),
        ({"heldout": "0", "patience": 2}, "held-out rows"),
    ],
)
def test_what_needs_no_base_is_checked_before_it_is_loaded(more, said, base_folder, reviews, tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("inlay.runs.run.load_base", never)
    with pytest.raises(InlayError, match=said):
        run(settings(base_folder, reviews, tmp_path / "run", **more), on_message=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_missing_library_is_named_before_the_base_is_loaded(base_folder, reviews, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    monkeypatch.setattr("inlay.runs.run.load_base", None)
    with pytest.raises(InlayError, match="lion needs"):
        run(settings(base_folder, reviews, tmp_path / "run", optimizer="lion"), on_message=lambda line: None)


def test_folders_that_cannot_be_are_refused_at_once(base_folder, reviews, tmp_path, monkeypatch):
    monkeypatch.setattr("inlay.runs.run.load_base", None)
    (tmp_path / "file").write_text("x")
    for out, said in ((tmp_path / "file" / "run", "which is a file"), (tmp_path / "file", "is a file")):
        with pytest.raises(UsageError, match=said):
            run(settings(base_folder, reviews, out), on_message=lambda line: None)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InlayError, match="cannot be read"):
        run(settings(base_folder, reviews, tmp_path / "odd", resume=True), on_message=lambda line: None)


# ---- a disk that is really full


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 60 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "none", disk], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a disk takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)  # a checkpoint that was read may still be mapped


def fill(disk, leave):
    """Fill `disk` up to about `leave` bytes."""
    (disk / "other").unlink(missing_ok=True)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "other").write_bytes(b"\0" * max(0, free - leave))


@pytest.mark.parametrize("step", [1, 4])
def test_a_disk_that_fills_up_keeps_what_was_written(step, base_folder, reviews, whole, small_disk):
    out, said = small_disk / "run", []
    if step > 1:  # two checkpoints have no room in 60 KB
        subprocess.run(["mount", "-o", "remount,size=400k", small_disk], check=True)

    def filled(learner, total):
        if learner.step == step:
            fill(small_disk, 0)

    given = {"set": {"r": 1, "dropout": 0.1}, "keep_checkpoints": 1}
    with pytest.raises(InlayError, match=r"cannot be written \(No space left on device\)") as found:
        run(settings(base_folder, reviews, out, **given), filled, said.append)
    assert "--resume" in found.value.remedy and str(out) in str(found.value)
    assert any(line.startswith(f"no checkpoint at step {step} (No space left") for line in said)
    files = sorted(f.name for f in (out / "checkpoints").iterdir()) if (out / "checkpoints").exists() else []
    assert files == ([f"step-{step - 1:08d}.safetensors"] if step > 1 else [])
    assert ("the checkpoint step-00000003" in found.value.what) == (step > 1)
    assert not list(out.rglob(".*.part")) and json.loads((out / "run.json").read_text())["status"] == "running"
    (small_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    run(settings(base_folder, reviews, out, resume=True, **given), on_message=said.append)
    other = small_disk.parent / "straight" / "run"
    run(settings(base_folder, reviews, other, **given), on_message=said.append)
    assert content(out) == content(other) and steps_of(out) == list(range(1, STEPS + 1))


def test_a_disk_that_is_full_for_a_while_is_said_and_training_goes_on(base_folder, reviews, small_disk):
    out, said = small_disk / "run", []

    def filled(learner, total):
        if learner.step == 2:
            fill(small_disk, 0)
        elif learner.step == 4:
            (small_disk / "other").unlink()

    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    run(settings(base_folder, reviews, out), filled, said.append)
    assert sum("no checkpoint at step" in line for line in said) == 2
    assert steps_of(out) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("leave", [0, 4096])
def test_a_disk_that_is_full_at_the_start_leaves_nothing(leave, base_folder, reviews, small_disk):
    fill(small_disk, leave)
    out = small_disk / "run"
    with pytest.raises(InlayError, match="No space left on device"):
        run(settings(base_folder, reviews, out, checkpoint_every=100, heldout="0"), on_message=lambda line: None)
    if not leave:
        assert not out.exists()


@pytest.mark.parametrize("name", ["final.jsonl", "report.html", "run.json", "README.md", "adapter_model.safetensors"])
def test_a_disk_that_fills_up_at_the_end_is_one_line_and_the_run_goes_on_from_there(
    name, base_folder, reviews, whole, tmp_path, monkeypatch
):
    out, ended = tmp_path / "run", []
    real = inlay.files.os.fsync

    def full(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if ended and f".{name}." in path:
            raise OSError(28, "No space left on device")
        return real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(inlay.files.os, "fsync", full)
        with pytest.raises(InlayError, match=f"{name} cannot be written.*the checkpoint step-00000006"):
            run(
                settings(base_folder, reviews, out),
                lambda learner, total: ended.append(1) if learner.step == total else None, lambda line: None,
            )  # fmt: skip
    run(settings(base_folder, reviews, out, resume=True), on_message=lambda line: None)
    assert content(out) == whole
