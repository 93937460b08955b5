"""Progress of a training run, on stderr."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .common import console

__all__ = ["Bar"]

PATIENT = 2.0
"""Seconds that rows may take before their progress is shown."""


class Bar:
    """Steps, loss, tokens a second, memory now and at its peak, and time left."""

    def __init__(self) -> None:
        text = "{task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[memory]} MB"
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn(text), TimeRemainingColumn(),
            console=console, transient=False,
        )  # fmt: skip
        self.task: Any = None
        self._start = (0, 0)
        self._rows: Progress | None = None
        self._begun = time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._rows is not None:
            self._rows.stop()
        if self.task is not None:
            self.progress.stop()

    def message(self, line: str) -> None:
        """A line above the bar."""
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def preparing(self, done: int, total: int) -> None:
        """Rows that are ready, shown once that has taken a while."""
        if self._rows is None and done < total and time.monotonic() - self._begun > PATIENT:
            columns = (TextColumn("preparing rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._rows = Progress(*columns, console=console, transient=True)
            self._rows.start()
            self._rows.add_task("rows", total=total)
        if self._rows is not None:
            self._rows.update(self._rows.task_ids[0], completed=done, total=total)
            if done >= total:
                self._rows.stop()
                self._rows = None

    def step(self, learner: Any, total: int) -> None:
        from inlay.runtime.memory import current_memory_mb, peak_memory_mb

        if self.task is None:
            self.progress.start()
            self.task = self.progress.add_task("training", total=total, loss="", speed="", memory="")
            self._start = (learner.step, learner.tokens)
        seconds = self.progress.tasks[0].elapsed or 1e-9
        speed = (learner.tokens - self._start[1]) / max(seconds, 1e-9) if learner.step > self._start[0] else 0
        self.progress.update(
            self.task, completed=learner.step, loss=f"loss {learner.loss:.3f}", speed=f"{speed:.0f}",
            memory=f"{current_memory_mb():.0f} (peak {peak_memory_mb():.0f}){_on_gpu(learner)}",
        )  # fmt: skip


def _on_gpu(learner: Any) -> str:
    """Memory on the GPU that the adapter is on, if it is on one."""
    device = learner.parameters[0].device
    if device.type != "cuda":
        return ""
    import torch

    now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return f" + GPU {now / 2**20:.0f} (peak {peak / 2**20:.0f})"
