"""When a run held the most memory, and why that was not what had been estimated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from inlay.runtime.memory import peak_memory_mb

__all__ = ["Peaks", "why_otherwise"]

FAR = 0.15
"""The share of the estimate by which a peak may miss it without a word."""
LOADING, STEPS, SCORING = "loading", "steps", "scoring"


class Peaks:
    """Which part of the work raised the peak last, and the largest step in tokens."""

    def __init__(self, device: torch.device) -> None:
        self._read: Callable[[], float] = peak_memory_mb
        if device.type == "cuda":
            self._read = lambda: torch.cuda.max_memory_allocated(device) / 2**20
        self.highest, self.part, self.tokens = 0.0, LOADING, 0

    def note(self, part: str, tokens: int = 0) -> None:
        """`part` (loading, steps or scoring) is what was done since the last note; `tokens` those of a step."""
        self.tokens = max(self.tokens, tokens)
        if (now := self._read()) > self.highest:
            self.highest, self.part = now, part


def why_otherwise(peaks: Peaks, memory: Mapping[str, Any]) -> str:
    """A sentence about a peak that is more than 15 % off `memory["estimate_mb"]`; nothing where it is not."""
    estimate, cut = memory["estimate_mb"], memory.get("backed_off") or []
    if not estimate or abs(peaks.highest / estimate - 1) <= FAR:
        return ""
    if peaks.highest > estimate:
        if peaks.part == LOADING:
            return "the most was held while the base was loaded, before the first step."
        if peaks.part == SCORING:
            return "scoring the held-out rows took more than a step."
        return (
            "steps took more than a single row had shown: compiled kernels of the matrix products, and memory that the "
            "allocator keeps between steps of unlike lengths."
        )
    if cut:
        return f"forwards were cut to {memory['tokens_at_once']} tokens at once."
    planned = memory.get("step_tokens")
    if planned and peaks.tokens < (1 - FAR / 2) * planned:
        return f"the estimate is for a step of the longest rows, {planned} tokens; the largest had {peaks.tokens}."
    return "a step kept less for its backward than a single row had shown."
