"""A run in several processes equals that of one and survives what that survives; none waits for one that is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.errors import InlayError, UsageError
from inlay.runs.processes import Place, memory_limit, own_device, place
from inlay.runs.run import run
from inlay.runs.sharing import Shared, deal
from inlay.runs.turns import Selection
from inlay.runs.worker import Worker
from inlay.runtime.memory import TokenBudget, current_memory_mb
from inlay.runtime.processes import join
from inlay.runtime.tasks import Generate
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan
from test_crash import content, reviews, settings, steps_of  # noqa: F401
from test_training import examples
from zoo import make

STEPS = 100
SGD = {"optimizer": "sgd", "clip": 1e9, "schedule": "constant"}
PLANS = [
    Plan("lora", inlay.LoRA(r=2, dropout=0.3), lr=1.0, batch_size=5, steps=1, neftune_alpha=5.0, **SGD),
    Plan("prompt", inlay.PromptTuning(num_virtual_tokens=3), lr=1.0, batch_size=2, steps=1, seed=2, **SGD),
    Plan("vera", inlay.VeRA(r=8), lr=1.0, batch_size=3, steps=1, seed=3, label_smoothing=0.1, **SGD),
]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def forked(size, folder, work):
    """`work(rank)` in so many processes as a launcher would start them; what each gave (JSON), or its error's words."""
    port, children = free_port(), []
    for rank in range(size):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        try:
            torch.set_num_threads(1)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {n: str(v) for n, v in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}
            try:
                found = work(rank)
            except (InlayError, KeyboardInterrupt) as error:
                found = f"{type(error).__name__}: {error}"
            (folder / f"{rank}.json").write_text(json.dumps(found))
        finally:
            os._exit(0)
    for pid in children:
        os.waitpid(pid, 0)
    files = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def weights(learners):
    return {f"{own.plan.name} {name}": v for own in learners for name, v in own.weights().items()}


def trained(shares=None, budget=None, plans=PLANS):
    """The learners after their steps, from a start that is no zero."""
    bank = inlay.attach(make("llama").double())
    learners = add_learners(bank, plans, 24)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for learner in learners:
            for p in learner.parameters:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    more = {} if shares is None else {"shares": shares}
    for _ in train_steps(bank, learners, examples(), budget or TokenBudget(4096), **more):
        pass
    return learners


def in_processes(size, folder, prepare=lambda rank: None, plans=PLANS, budget=None):
    """What the first process says of its learners, whose weights are in weights.safetensors, and what the rest say."""
    budget = budget or TokenBudget(4096)

    def work(rank):
        prepare(rank)
        processes = join()
        if rank:
            return Worker(processes, inlay.attach(make("llama").double())).work()
        learners = trained(Shared(processes), budget, plans)
        processes.dismiss({"result": {"over": True}})
        save_file(weights(learners), folder / "weights.safetensors")
        told = {own.plan.name: [own.loss, own.stopped, own.suspects] for own in learners}
        return {"learners": told, "tokens": budget.tokens, "cuts": budget.backed_off}

    return forked(size, folder, work)


# ---- one step


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_are_those_of_one_process(size, tmp_path):
    """Learners of unlike methods; with four processes and one small learner, some have nothing to do for it."""
    found = in_processes(size, tmp_path)
    assert all(reply == {"over": True} for reply in found[1:])
    alone = trained()
    for name, value in load_file(tmp_path / "weights.safetensors").items():
        torch.testing.assert_close(value, weights(alone)[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: n + m)
    for learner in alone:
        assert found[0]["learners"][learner.plan.name][0] == pytest.approx(learner.loss, rel=1e-12)


def test_more_processes_than_rows(tmp_path):
    plans = [replace(PLANS[0], batch_size=1)]
    in_processes(3, tmp_path, plans=plans)
    for name, value in load_file(tmp_path / "weights.safetensors").items():
        torch.testing.assert_close(value, weights(trained(plans=plans))[name], rtol=1e-10, atol=1e-12)


def test_shares_have_like_numbers_of_tokens_and_all_rows():
    sizes = [5, 40, 7, 9, 30, 12, 3]
    shares = deal(sizes, 3)
    assert sorted(n for share in shares for n in share) == list(range(7))
    assert all(share == sorted(share) for share in shares)
    tokens = [sum(sizes[n] for n in share) for share in shares]
    assert max(tokens) - min(tokens) <= 10
    assert deal([4, 4], 3) == [[0], [1], []]


def test_memory_that_runs_out_in_one_process_makes_the_forwards_of_all_smaller(tmp_path):
    def prepare(rank):
        if rank:
            TokenBudget.check = lambda self: _fail(MemoryError()) if self.largest[0] > 12 else None

    found = in_processes(2, tmp_path, prepare)
    assert found[0]["tokens"] < 4096 and found[0]["cuts"][0]["process"] == 1
    alone = weights(trained())
    for name, value in load_file(tmp_path / "weights.safetensors").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-10, atol=1e-12)


def _fail(error):
    raise error


@pytest.mark.parametrize(
    "why, said",
    [
        (lambda self: _fail(MemoryError()), "process 1 failed: one row of .* does not fit in memory"),
        (lambda self: _fail(ValueError("a thing\nthat nobody foresaw")), "process 1 failed: ValueError: a thing$"),
        (lambda self: os._exit(1), "another process of this run has ended"),
        (lambda self: os.kill(os.getpid(), signal.SIGKILL), "another process of this run has ended"),
    ],
)
def test_a_process_that_fails_or_dies_ends_all(why, said, tmp_path):
    def prepare(rank):
        if rank == 1:
            TokenBudget.check = why

    first, _, third = in_processes(3, tmp_path, prepare)
    for words in (first, third):
        assert re.search(said, words), words


@pytest.mark.parametrize(
    "why, said",
    [
        (lambda self: _fail(KeyboardInterrupt()), "process 0 failed: interrupted"),
        (lambda self: os.kill(os.getpid(), signal.SIGKILL), "another process of this run has ended"),
    ],
)
def test_a_first_process_that_fails_or_dies_ends_all(why, said, tmp_path):
    def prepare(rank):
        if rank == 0:
            TokenBudget.check = why

    first, second = in_processes(2, tmp_path, prepare)
    assert first in ("KeyboardInterrupt: ", None) and said in second


def test_a_loss_that_is_no_number_in_one_process_stops_its_learner_alone(tmp_path):
    def prepare(rank):
        if rank:
            whole = Generate.losses
            Generate.losses = lambda self, bank, segments: [
                own * (float("nan") if segment.route == "lora" else 1.0)
                for own, segment in zip(whole(self, bank, segments), segments, strict=True)
            ]

    first, _ = in_processes(2, tmp_path, prepare)
    loss, stopped, suspects = first["learners"]["lora"]
    assert loss != loss and stopped == "diverged at step 1" and 0 < len(suspects) < 5
    assert first["learners"]["vera"][1] == first["learners"]["prompt"][1] == "done"
    found = load_file(tmp_path / "weights.safetensors")
    for name, value in weights(trained()).items():
        if not name.startswith("lora"):
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


# ---- runs


def quiet(line):
    pass


def test_a_run_of_several_learners_that_come_and_go(base_folder, reviews, tmp_path):  # noqa: F811
    plans = [
        Plan("calm", inlay.LoRA(r=2, dropout=0.1), lr=1e-2, batch_size=4, steps=4, seed=1),
        Plan("ada", inlay.AdaLoRA(init_r=3, target_r=2, tinit=1, tfinal=1, deltaT=1), lr=1e-2, batch_size=3, steps=6),
        Plan("late", inlay.IA3(), lr=1e-2, batch_size=3, steps=3, seed=4, optimizer="adafactor"),
    ]

    def select(progress, waiting):
        if not progress:
            return Selection(start=["calm", "ada"])
        done = [own for own in progress if own.learner.step == 2 and own.name == "calm"]
        return Selection(stop={own.name: "dropped" for own in done}, start=[p.name for p in waiting] if done else [])

    def work(rank):
        given = settings(base_folder, reviews, tmp_path / "two", dtype="float64")
        return run(given, on_message=quiet, plans=plans, select=select)

    first, second = forked(2, tmp_path, work)
    assert first == second and first["processes"] == 2
    torch.set_num_threads(1)
    alone = run(settings(base_folder, reviews, tmp_path / "one", dtype="float64"), None, quiet, None, plans, select)
    assert alone["processes"] == 1
    assert first["learners"]["calm"]["status"] == "dropped" and first["learners"]["late"]["steps"] == 3
    for name, own in alone["learners"].items():
        assert first["learners"][name]["train_loss"] == pytest.approx(own["train_loss"], rel=1e-9)
        theirs = load_file(tmp_path / "two" / "adapters" / name / "adapter_model.safetensors")
        for key, value in load_file(tmp_path / "one" / "adapters" / name / "adapter_model.safetensors").items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-6)


def test_a_head_and_an_adapter_to_go_on_from(base_folder, reviews, tmp_path):  # noqa: F811
    torch.set_num_threads(1)
    plain = {"template": None, "verbalizer": None, "task": "classify"}
    run(settings(base_folder, reviews, tmp_path / "a", **plain), on_message=quiet)
    more = {**plain, "set": {}, "init_from": str(tmp_path / "a")}
    forked(2, tmp_path, lambda rank: run(settings(base_folder, reviews, tmp_path / "two", **more), on_message=quiet))
    run(settings(base_folder, reviews, tmp_path / "one", **more), on_message=quiet)
    theirs, ours = (load_file(tmp_path / n / "last" / "adapter_model.safetensors") for n in ("two", "one"))
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_in_another_number_of_processes(base_folder, reviews, tmp_path):  # noqa: F811
    class Stop(BaseException):
        pass

    def stop(learner, total):
        if learner.step > 3:
            raise Stop

    out = tmp_path / "two" / "run"
    forked(2, tmp_path, lambda rank: run(settings(base_folder, reviews, out), stop, quiet))
    torch.set_num_threads(1)
    said = []
    run(settings(base_folder, reviews, out, resume=True), on_message=said.append)
    assert "going on after step 3" in said
    run(settings(base_folder, reviews, tmp_path / "one" / "run"), on_message=quiet)
    theirs, ours = (load_file(tmp_path / n / "run" / "last" / "adapter_model.safetensors") for n in ("two", "one"))
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-5)


def test_a_wrong_call_is_wrong_in_all_processes_and_a_right_one_can_follow(base_folder, reviews, tmp_path):  # noqa: F811
    def work(rank):
        with pytest.raises(InlayError) as wrong:
            run(settings(base_folder, tmp_path / "none.csv", tmp_path / "run"), on_message=quiet)
        there = (tmp_path / "run").exists()
        result = run(settings(base_folder, reviews, tmp_path / "run", steps=1), on_message=quiet)
        return {"wrong": str(wrong.value), "there": there, "steps": result["steps"]}

    first, second = forked(2, tmp_path, work)
    assert first["wrong"] == second["wrong"] and "none.csv" in first["wrong"]
    assert not first["there"] and first["steps"] == second["steps"] == 1


# ---- the command, as people start it


def started(base_folder, data, out, *more):
    arguments = [
        "--nproc-per-node", 2, "-m", "inlay", "train", "--base", base_folder, "--data", data, "--out", out,
        "--steps", STEPS, "--batch-size", 4, "--lr", 1e-2, "--template", r"Review: {text}\nSentiment:",
        "--verbalizer", "0=negative,1=positive", "--heldout", "0.2", "--checkpoint-every", 3, "--dtype", "float32",
        "--set", "r=2", "--set", "dropout=0.1", "--json", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_lines(process, out, number):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= number:
            return
        time.sleep(0.005)


def test_torchrun_gives_one_processs_adapter_and_survives_a_kill_and_ctrl_c(base_folder, reviews, tmp_path):  # noqa: F811
    given = {"steps": STEPS, "eval_every": None, "checkpoint_every": 3, "template": r"Review: {text}\nSentiment:"}

    def work(rank):
        return run(settings(base_folder, reviews, tmp_path / "a" / "run", **given), on_message=quiet)

    straight, _ = forked(2, tmp_path, work)
    torch.set_num_threads(1)
    alone = run(settings(base_folder, reviews, tmp_path / "one" / "run", **given), on_message=quiet)
    assert alone["tokens"] == straight["tokens"] and alone["best_step"] == straight["best_step"]
    theirs = load_file(tmp_path / "a" / "run" / "last" / "adapter_model.safetensors")
    for key, value in load_file(tmp_path / "one" / "run" / "last" / "adapter_model.safetensors").items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-5)

    out = tmp_path / "b" / "run"
    killed = started(base_folder, reviews, out)
    wait_for_lines(killed, out, 8)
    for process in [*psutil.Process(killed.pid).children(recursive=True), psutil.Process(killed.pid)]:
        process.kill()
    killed.communicate()
    stopped = started(base_folder, reviews, out, "--resume")
    wait_for_lines(stopped, out, 20)
    stopped.send_signal(signal.SIGINT)
    errors = stopped.communicate()[1].decode()
    assert "--resume goes on from there" in errors and errors.count("error: ") == 1, errors
    done = started(base_folder, reviews, out, "--resume")
    printed, errors = done.communicate()
    assert done.returncode == 0, errors
    result = json.loads(printed)  # one line, of the first process alone
    assert result["train_loss"] == straight["train_loss"] and result["heldout"] == straight["heldout"]
    assert errors.decode().count("MB of memory will be needed in each of the 2 processes") == 1
    assert content(out) == content(tmp_path / "a" / "run")
    assert steps_of(out) == list(range(1, STEPS + 1))
    assert json.loads((out / "run.json").read_text())["processes"] == 2


def test_what_is_the_work_of_one_process_is_refused_in_several(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from inlay.cli.app import app

    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    for command in (["eval", "--data", "x.csv", "--adapter", "a"], ["merge", "--adapter", "a", "--out", "m"]):
        said = CliRunner().invoke(app, command)
        assert said.exit_code == 2 and "2 processes were started" in said.output and "Start it alone." in said.output


def test_each_process_has_a_gpu_of_its_own_and_its_share_of_the_memory(monkeypatch):
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError, match="MASTER_ADDR, MASTER_PORT is not set"):
        place()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert place() == Place(rank=5, size=8, local=1, beside=2)
    assert own_device(None) is None and own_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(None) == own_device("cuda") == "cuda:1"
    with pytest.raises(UsageError, match="8 processes cannot share the device cuda:0"):
        own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes were started here, and there are 1 GPUs"):
        own_device(None)
    monkeypatch.setattr("inlay.runtime.memory.free_memory", lambda: 8000 * 2**20)
    now = current_memory_mb()
    assert memory_limit("auto") == pytest.approx(now + 4000, rel=0.05)
    assert memory_limit("2GB") == 2048 and memory_limit(None) is None
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(UsageError, match="is no number"):
        place()


def test_a_wrong_call_of_torchrun_ends_in_one_line(base_folder, tmp_path):
    wrong = started(base_folder, tmp_path / "none.csv", tmp_path / "run")
    printed, errors = wrong.communicate(timeout=300)
    assert wrong.returncode and not printed and errors.decode().count("error: ") == 1
    assert b"none.csv" in errors
