"""Prefixes that start as tokens: the keys and values that the base computes for them, at each of its layers.

A prefix at random takes most of the attention of every row, and the base behind it answers by chance until training has
found its way back; as real keys it does no more than a few words before the row would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.keys import keys_and_values

from .contract import Site, Structure
from .virtual import VirtualTokens, token_table

__all__ = ["prefix_of_tokens"]


def prefix_of_tokens(
    method: VirtualTokens, sites: Sequence[Site], base: Structure, generator: torch.Generator
) -> Tensor:
    """P (n, 2 L heads head_dim) for the `start_ids` of the method. Raises: UsageError where the base gives no keys."""
    if sites[0].stack == "decoder":
        what = "layers of a decoder behind an encoder share prefixes, which cannot start as the keys of each"
        raise UsageError(what, "Start them at random.")
    table = token_table(base, "prefix tuning that starts as tokens")
    found = keys_and_values(base, method.start_ids(method.num_virtual_tokens, table.in_features, generator))
    pairs = torch.stack([torch.stack(found[site.module]) for site in sites])  # (layers, 2, heads, n, head_dim)
    return pairs.permute(3, 0, 1, 2, 4).flatten(1)
