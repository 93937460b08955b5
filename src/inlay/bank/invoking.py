"""Where in its row a sequence of ids stands last, from which on some methods act."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.errors import UsageError

__all__ = ["behind_sequence"]


def behind_sequence(
    layout: Any, memories: Sequence[MutableMapping[Any, Any]], spot: Any, sequence: Sequence[int], ids: Tensor | None,
    position: Tensor, counts: Sequence[int],
) -> Tensor:  # fmt: skip
    """Whether each token (n,) stands at or behind the start of the last `sequence` in its row, bool.

    `ids` (n,) are those of the forward, `position` (n,) is -1 for what is none of a row's own; row i has `counts[i]`
    tokens. What the first call of a key-value cache has found is in its memory under `spot` for those that go on from
    it. Raises: UsageError where that cannot be told.
    """
    continued = bool(getattr(layout, "continued", False))
    new = [n for n, memory in enumerate(memories) if spot not in memory]
    if new and continued:
        raise UsageError(
            "a method that begins at a sequence of tokens goes on from a cache that was filled elsewhere",
            "Run the prompt without gradients, and go on from the cache that it filled.",
        )
    if new:
        if ids is None or len(ids) != len(position):
            what = "a method that begins at a sequence of tokens is given no token ids there"
            raise UsageError(what, "Give input_ids, and leave the head and other towers out of the targets.")
        rows = list(zip(ids.split(list(counts)), position.to(ids.device).split(list(counts)), strict=True))
        for n in new:
            memories[n][spot] = _start(*rows[n], sequence)
    starts = torch.tensor([memory[spot] for memory in memories], device=position.device)
    if continued and bool((starts < 0).any()) and any(n > 1 for n in counts):
        raise UsageError(
            "a prompt goes on from a cache, and a method looks for a sequence of tokens in it",
            "Run each prompt in one call.",
        )
    own = starts.repeat_interleave(torch.tensor(counts, device=position.device))
    return (position >= own) & (own >= 0) & (position >= 0)


def _start(row: Tensor, own: Tensor, sequence: Sequence[int]) -> int:
    """The position where the last `sequence` begins in a row; -1 where there is none."""
    wanted, tokens = torch.tensor(list(sequence), device=row.device), row[own >= 0]
    if len(tokens) < len(wanted):
        return -1
    places = (tokens.unfold(0, len(wanted), 1) == wanted).all(1).nonzero()
    return int(places[-1]) if len(places) else -1
