"""Where in its row a sequence of ids stands last, from which on some methods act."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.errors import UsageError

__all__ = ["behind_sequence"]


def behind_sequence(
    layout: Any, cache: MutableMapping[Any, Any], spot: Any, sequence: Sequence[int], ids: Tensor | None,
    position: Tensor, counts: Sequence[int],
) -> Tensor:  # fmt: skip
    """Whether each token (n,) stands at or behind the start of the last `sequence` in its row, bool.

    `ids` (n,) are those of the forward, `position` (n,) is -1 for what is none of a row's own; row i has `counts[i]`
    tokens. What the first call of a key-value cache has found is in `cache` under `spot` for those that go on from it.
    Raises: UsageError where that cannot be told.
    """
    continued = bool(getattr(layout, "continued", False))
    if not continued and spot not in cache:
        if ids is None or len(ids) != len(position):
            what = "a method that begins at a sequence of tokens is given no token ids there"
            raise UsageError(what, "Give input_ids, and leave the head and other towers out of the targets.")
        cache[spot] = _starts(ids, position, counts, sequence)
    starts = _held(cache, spot)
    if continued and bool((starts < 0).any()) and any(n > 1 for n in counts):
        raise UsageError(
            "a prompt goes on from a cache, and a method looks for a sequence of tokens in it",
            "Run each prompt in one call.",
        )
    own = starts.to(position.device).repeat_interleave(torch.tensor(counts, device=position.device))
    return (position >= own) & (own >= 0) & (position >= 0)


def _held(cache: Mapping[Any, Any], spot: Any) -> Tensor:
    if spot not in cache:
        raise UsageError(
            "a method that begins at a sequence of tokens goes on from a cache that was filled elsewhere",
            "Run the prompt without gradients, and go on from the cache that it filled.",
        )
    return cache[spot]


def _starts(ids: Tensor, position: Tensor, counts: Sequence[int], sequence: Sequence[int]) -> Tensor:
    """For each row the position where the last `sequence` begins, -1 where there is none; int64 (rows,)."""
    wanted, found = torch.tensor(list(sequence), device=ids.device), []
    for row, own in zip(ids.split(list(counts)), position.to(ids.device).split(list(counts)), strict=True):
        tokens = row[own >= 0]
        if len(tokens) < len(wanted):
            found.append(-1)
            continue
        places = (tokens.unfold(0, len(wanted), 1) == wanted).all(1).nonzero()
        found.append(int(places[-1]) if len(places) else -1)
    return torch.tensor(found)
