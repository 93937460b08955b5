"""Runs types in processes of their own, two at a time, and keeps every cell that comes back."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from .store import Store
from .verdicts import LATE, Cell

__all__ = ["Job", "preload", "run_all"]

GRACE = 20.0
"""Seconds that processes go on for when the time of a run is over."""


@dataclass(frozen=True)
class Job:
    use: str
    type_name: str
    methods: tuple[str, ...]
    laws: tuple[str, ...]
    device: str = "cpu"


@dataclass
class Child:
    """A process that works on a job. `law` is what it was at last."""

    job: Job
    pid: int
    pipe: int
    ends: float
    law: str = "build"
    rest: bytes = b""
    done: list[str] = field(default_factory=list)


def preload() -> None:
    """Import what every type needs, once, before processes are forked."""
    import peft  # noqa: F401
    import torch
    import transformers
    import transformers.generation.utils
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama

    import inlay

    from . import laws, media  # noqa: F401

    # So that the code is the same to the end of the run.
    for package in ("bank", "batch", "formats", "kernels", "methods", "runtime", "sites"):
        for module in pkgutil.iter_modules([f"{inlay.__path__[0]}/{package}"]):
            importlib.import_module(f"inlay.{package}.{module.name}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def run_all(
    jobs: Sequence[Job], store: Store, processes: int, limit: float, on_job: Callable[[Job, int], None],
    seconds: float = float("inf"),
) -> int:  # fmt: skip
    """Run the jobs; `limit` is what one process may take, in seconds. A law in which a process dies or stays is one
    cell, and the type goes on behind it in a new process. Nothing starts when `seconds` are over, and what runs has
    GRACE; returns how many jobs were left then."""
    waiting, running, left = list(reversed(jobs)), {}, 0
    selector, last = selectors.DefaultSelector(), time.monotonic() + seconds
    try:
        while waiting or running:
            if time.monotonic() > last:
                left, waiting = left + len(waiting), []
                for child in running.values():
                    child.ends = child.ends if child.ends == float("inf") else min(child.ends, last + GRACE)
            while waiting and len(running) < processes:
                child = _start(waiting.pop(), limit)
                running[child.pipe] = child
                selector.register(child.pipe, selectors.EVENT_READ)
            for key, _ in selector.select(timeout=0.5):
                child = running[key.fd]
                if data := os.read(key.fd, 1 << 16):
                    _take(child, data, store)
                else:
                    selector.unregister(key.fd)
                    del running[key.fd]
                    if (more := _finish(child, store)) is not None:
                        waiting.append(more)
                    else:
                        on_job(child.job, len(waiting))
            for child in running.values():
                if time.monotonic() > child.ends:
                    os.kill(child.pid, signal.SIGKILL)
                    child.ends = float("inf")
    finally:
        for child in running.values():
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
    return left


def _start(job: Job, limit: float) -> Child:
    ours, theirs = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _work(job, theirs)
    os.close(theirs)
    return Child(job, pid, ours, time.monotonic() + limit)


def _work(job: Job, pipe: int) -> None:
    """What the process does: a line for the law that begins, a line for each of its cells. It never returns."""
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        from .laws import cells_of

        def send(value: object) -> None:
            os.write(pipe, json.dumps(value).encode() + b"\n")

        def begins(law: str) -> None:
            send({"begins": law})

        for cell in cells_of(job.use, job.type_name, job.methods, job.laws, begins, job.device):
            send(asdict(cell))
        status = 0
    finally:
        os._exit(status)


def _take(child: Child, data: bytes, store: Store) -> None:
    *lines, child.rest = (child.rest + data).split(b"\n")
    for line in lines:
        value = json.loads(line)
        if "begins" in value:
            child.law = value["begins"]
            child.done.append(child.law)
        else:
            store.add([Cell(**value)])


def _finish(child: Child, store: Store) -> Job | None:
    """Wait for a process that has closed its pipe; where it died, the job that goes on behind the law it died in."""
    os.close(child.pipe)
    _, status = os.waitpid(child.pid, 0)
    if status == 0:
        return None
    late = child.ends == float("inf")
    killed = f"the process was ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "the process died"
    job, what = child.job, LATE if late else killed
    store.add([Cell(job.use, job.type_name, "", child.law, "untried" if child.law == "build" else "raw", what)])
    rest = tuple(law for law in job.laws if law not in child.done)
    if child.law in ("build", "add") or not rest:
        return None
    return replace(job, laws=rest)
