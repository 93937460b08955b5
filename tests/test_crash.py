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
from inlay.training.run import Settings, run

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
        out = tmp_path / str(number)

        def killed(number=number, out=out):
            with dying_at(number, monkeypatch):
                run(settings(base_folder, reviews, out), say=lambda line: None)

        assert forked(killed) == -signal.SIGKILL, number
        for file in out.rglob("*.safetensors"):
            assert not file.name.startswith(".")
        said = []
        run(settings(base_folder, reviews, out, resume=True), say=said.append)
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
    straight = subprocess.run(command(base_folder, reviews, tmp_path / "a"), capture_output=True, env=env, check=True)
    out = tmp_path / "b"
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
    assert content(out) == content(tmp_path / "a")
    assert steps_of(out) == list(range(1, 41))
    theirs, ours = json.loads(straight.stdout), json.loads(done.stdout)
    assert theirs["tokens"] == ours["tokens"] and theirs["heldout"] == ours["heldout"]


# ---- what resuming says


def broken_off(base_folder, reviews, out, after=3, **more):
    """A run that ended after some steps, with a checkpoint at each."""

    class Stop(BaseException):
        pass

    def stop(contender, total):
        if contender.step > after:
            raise Stop

    with pytest.raises(Stop):
        run(settings(base_folder, reviews, out, **more), stop, say=lambda line: None)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(base_folder, reviews, whole, tmp_path):
    out = tmp_path / "run"
    broken_off(base_folder, reviews, out)
    newest = sorted((out / "checkpoints").iterdir())[-1]
    raw = bytearray(newest.read_bytes())
    raw[-5] ^= 1
    newest.write_bytes(raw)
    said = []
    run(settings(base_folder, reviews, out, resume=True), say=said.append)
    assert "damaged" in said[0] and "after step 2" in said[1]
    assert content(out) == whole and steps_of(out) == list(range(1, STEPS + 1))


def test_nothing_to_resume_is_said_and_the_run_starts_afresh(base_folder, reviews, whole, tmp_path):
    said = []
    run(settings(base_folder, reviews, tmp_path / "run", resume=True), say=said.append)
    assert "starting afresh" in said[0]
    assert content(tmp_path / "run") == whole
    broken_off(base_folder, reviews, tmp_path / "b")
    for file in (tmp_path / "b" / "checkpoints").iterdir():
        file.write_bytes(b"garbage")
    said.clear()
    run(settings(base_folder, reviews, tmp_path / "b", resume=True), say=said.append)
    assert any("starting afresh" in line for line in said)
    assert content(tmp_path / "b") == whole and steps_of(tmp_path / "b") == list(range(1, STEPS + 1))


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
    assert run(settings(base_folder, reviews, tmp_path / "run", resume=True), say=said.append) == first
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

    def second(contender, total):
        if contender.step == 2:
            code = forked(lambda: _refused(base_folder, reviews, out))
            messages.append(code)

    run(settings(base_folder, reviews, out), second)
    assert messages == [0]
    broken_off(base_folder, reviews, tmp_path / "b")
    assert (tmp_path / "b" / ".lock").exists()
    run(settings(base_folder, reviews, tmp_path / "b", resume=True))


def _refused(base_folder, reviews, out):
    with pytest.raises(InlayError, match="another run is at work"):
        run(settings(base_folder, reviews, out, resume=True), say=lambda line: None)
