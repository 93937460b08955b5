"""Compacter++: one Compacter a block, behind the feed-forward part, reading the stream as the block would go on.

    y' = y + act(z H_D + d) H_U + u        z = norm(y + x), or y + x where the block has no norm behind

Paper: Karimi Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers" (arXiv:2106.04647).
H_D and H_U, shapes and settings are those of `inlay.methods.compacter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from inlay.values import Help

from .bottleneck_settings import BehindAttention
from .compacter import Compacter

__all__ = ["CompacterPlusPlus"]


@dataclass(frozen=True)
class CompacterPlusPlus(Compacter):
    """One a block, placed as Pfeiffer's."""

    title = "Compacter++"
    peft_type = "COMPACTER_PLUS_PLUS"

    mh_adapter: BehindAttention = False
    original_ln_before: Annotated[bool, Help("read the stream after the block's addition and norm")] = True
