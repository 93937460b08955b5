"""The budget of one forward in tokens and memory: measures, limits, and smaller forwards where memory runs out."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from inlay.bases.memory import free_memory
from inlay.errors import InlayError

from .sizes import size_mb

__all__ = [
    "MB",
    "TokenBudget",
    "bound_kernels",
    "current_memory_mb",
    "parse_size",
    "peak_memory_mb",
    "with_backoff",
]

T = TypeVar("T")
MB = 2**20
NEAR = 0.97
"""The share of the limit at which work is cut smaller."""
BACKWARD = 1.2
"""By how much a backward goes beyond what its forward has saved."""


class OverLimit(MemoryError):
    """Memory in use has come near the limit."""


@dataclass
class TokenBudget:
    """`tokens` that one forward takes at most; cut in half whenever memory runs out.

    `limit_mb` (MiB) bounds the process's memory, or the accelerator's where `device` is one. `backed_off` lists the
    cuts, and each is a line for `on_message`.
    """

    tokens: int
    limit_mb: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backed_off: list[dict[str, Any]] = field(default_factory=list)
    on_message: Callable[[str], None] = lambda line: None
    largest: tuple[int, int] = (0, 0)
    """Tokens and rows of the largest group of the work at hand."""

    def check(self) -> None:
        """Raises: OverLimit near the limit, or beyond it where the work cannot be cut any more."""
        if self.limit_mb is None:
            return
        most = self.limit_mb if self.largest[1] <= 1 else NEAR * self.limit_mb
        if current_memory_mb(self.device) > most:
            _release_freed(self.device)  # freed memory that the allocator still holds does not count
            if current_memory_mb(self.device) > most:
                raise OverLimit(f"the memory limit of {self.limit_mb:.0f} MB")

    def fit(self, fixed_mb: float, token_mb: float, longest: int) -> None:
        """Cut `tokens` to an estimate: `token_mb` for each beside `fixed_mb`, at least one row of `longest` tokens."""
        if self.limit_mb is None:
            return
        most = max(longest, int((NEAR * self.limit_mb - fixed_mb) / (BACKWARD * token_mb)))
        if most < self.tokens:
            self.backed_off.append({"where": "the start", "from": self.tokens, "to": most, "why": "the memory limit"})
            self.tokens = most
            self.on_message(f"the memory limit of {self.limit_mb:.0f} MB leaves room for {most} tokens at once")

    def halve(self, why: str, where: str) -> None:
        """Make the groups of the work at hand smaller. Raises: InlayError where a single row is too much."""
        tokens, rows = self.largest
        _release_freed(self.device)
        if rows <= 1:
            raise InlayError(
                f"one row of {tokens} tokens does not fit in memory ({why})",
                "Lower --max-length, add --gradient-checkpointing, or raise --memory-limit.",
            )
        before, self.tokens = self.tokens, max(1, min(self.tokens, tokens) // 2)
        self.backed_off.append({"where": where, "from": before, "to": self.tokens, "why": why})
        self.on_message(f"{why}: going on with {self.tokens} tokens at once in place of {before} ({where})")


def with_backoff(budget: TokenBudget, where: str, work: Callable[[], T], undo: Callable[[], None] | None = None) -> T:
    """The result of `work`; where memory runs out, `undo`, halve the budget and do it again from its beginning."""
    while True:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            why = _why(error)
        # Out of the handler, the error no longer holds on to the tensors of the failed attempt.
        if undo is not None:
            undo()
        budget.halve(why, where)


def _why(error: Exception) -> str:
    """What ran out. Raises the error itself where it is about something else."""
    if isinstance(error, OverLimit):
        return f"near {error}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory"
    if re.search(r"not enough memory|can't allocate|out of memory|alloc.* fail", str(error), re.IGNORECASE):
        return "out of memory"
    raise error


def _release_freed(device: torch.device) -> None:
    """Return freed memory to the system, so that the next measurement counts used memory alone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def bound_kernels(methods: int = 1) -> None:
    """Keep oneDNN from holding a compiled kernel for each number of tokens that ever came by.

    Streams are of any length, and at its own default of 1,024 kernels that is 600 MB; 64 take half of it and were
    no slower. A step needs about 30, and 20 more for every further rank that trains beside the first: they must stay
    from one layer to the next. It listens to the first products of a process only, and to the user before us.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(64 + 32 * (methods - 1)))


def current_memory_mb(device: torch.device | None = None) -> float:
    """MiB that this process holds now, or that its tensors hold on a CUDA `device`."""
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MB
    return psutil.Process().memory_info().rss / MB


def peak_memory_mb() -> float:
    """The most memory this process has held, in MiB.

    getrusage's figure also counts what the process that started this one held, so Linux's own comes before it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf8")) if status.exists() else None
    if found is not None:
        return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parse_size(text: str | None) -> float | None:
    """ "4GB" or "900MB" in MiB; None for none; for "auto" what this process holds and can still take.

    Raises: UsageError.
    """
    if text is None or text == "none":
        return None
    if text == "auto":
        return free_memory() / MB + current_memory_mb()
    return size_mb(text)
