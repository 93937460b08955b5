"""Where the tokens of padded rows stand."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.sites.backbone import Backbone

__all__ = ["own_positions"]


def own_positions(
    backbone: Backbone, given: Tensor | None, ids: Tensor | None, mask: Tensor, past: int, extra: int, reads: Tensor
) -> Tensor:
    """Positions (B, L) of the rows' own tokens, or more planes of them, behind `past` others of `mask` (B, past + L).

    Those that the base would count itself are counted over real tokens in rows that `reads` (B,) says: their adapters
    read how far a token is from what stands before its row, so that padding may not move it. Others that were `given`
    stay; where nothing stands in a cache but `extra` virtual tokens, the caller may have counted these.
    """
    plain = backbone.plain_positions(ids, mask, past)
    counts = () if given is None or given.ndim != 2 else (given, given - extra)  # all of the cache
    if given is not None and not any(torch.equal(own.expand_as(plain), plain) for own in counts):
        return given
    return torch.where(reads.to(mask.device)[:, None], backbone.real_positions(mask, past), plain)
