"""Prefix tuning that leaves a row's positions where they are, as AdapterHub's package has it.

    attention(q, [P_k; K], [P_v; V])        the row's own tokens are counted from 0, not from behind P

HF PEFT hands a prefix over as a cache, which moves the positions of what comes behind it. Where positions are learned,
or turn queries and keys, the same prefix means something else in the two.

Paper: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (arXiv:2101.00190).
Shapes are those of `inlay.methods.prefix`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.errors import UsageError
from inlay.sites.observe import uses_interface

from .contract import Site, Structure
from .prefix import PrefixTuning

__all__ = ["UnmovedPrefix"]


@dataclass(frozen=True)
class UnmovedPrefix(PrefixTuning):
    """Settings: those of prefix tuning."""

    title = "Prefix tuning with unmoved positions"
    peft_type = "UNMOVED_PREFIX"
    peft_fields = None
    moves_positions = False

    def sites(self, base: Structure) -> list[Site]:
        if len(base.stacks) > 1 or not uses_interface(base):
            what = f"{self.title} needs a base of one stack whose positions are not counted by its cache"
            raise UsageError(what, "Choose prefix tuning.")
        return super().sites(base)

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> UnmovedPrefix:
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})
