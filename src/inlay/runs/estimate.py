"""How much memory a run will take, before its first step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from inlay.bank.bank import Bank
from inlay.data.encode import Example
from inlay.data.prepare import token_counts
from inlay.runtime.forward import Segment, token_losses
from inlay.runtime.memory import MB, Room, current_memory_mb, saved_bytes
from inlay.training.contender import Contender

__all__ = ["estimate_mb"]

KERNELS_MB = 150
"""What compiled kernels of a CPU's matrix products take; in bfloat16 it is up to twice as much."""
LONGEST = 256
"""Tokens of the row that is tried."""


def estimate_mb(bank: Bank, contender: Contender, examples: Sequence[Example], room: Room) -> dict[str, float]:
    """`estimate_mb` for steps as they will be, and `least_mb` where each forward takes one row; cuts `room` to it.

    One row runs forward, and what it keeps for its backward is counted; the largest step keeps that much a token. The
    adapter's gradients, two moments of its optimizer and a copy from before each step come on top of what is in use.
    """
    sizes = token_counts(examples)
    longest = int(sizes.max())
    tried = examples[int(np.where(sizes <= LONGEST, sizes, 0).argmax())]
    with torch.enable_grad():
        segment = [Segment(contender.plan.name, tried)]
        kept = saved_bytes(bank.model, lambda: token_losses(bank, segment, 0)[0])
    a_token = kept / len(tried.ids)
    rows = min(contender.plan.batch_size, len(sizes))
    most = min(int(np.partition(sizes, -rows)[-rows:].sum()), max(room.tokens, longest))
    states = 4 * sum(p.numel() * p.element_size() for p in contender.parameters)
    fixed = current_memory_mb(room.device) + states / MB + (KERNELS_MB if room.device.type == "cpu" else 0)
    room.fit(fixed, a_token / MB, longest)
    most = min(most, max(room.tokens, longest))
    return {"estimate_mb": fixed + a_token * most / MB, "least_mb": fixed + a_token * longest / MB}
