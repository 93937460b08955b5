"""What a head of labels for whole rows makes of virtual tokens."""

from __future__ import annotations

from collections.abc import Sequence

from inlay.errors import UsageError
from inlay.sites.backbone import Backbone
from inlay.sites.pooling import reads_every_state
from inlay.sites.structure import Structure

__all__ = ["Pooling"]

CLASSIFIERS = "ForSequenceClassification"
"""The end of the names of models whose head reads a row's first state, unless it is a `score`: that reads the last one,
or all of them."""


class Pooling:
    """`first_virtual`: the head reads a row's first state, which is its first virtual token's, as in HF PEFT; `every`:
    it reads all states of a row. Seen when a bank is attached."""

    def __init__(self, base: Structure, backbones: Sequence[Backbone]) -> None:
        self.model, one = base.model, len(backbones) == 1
        self.first_virtual = type(base.model).__name__.endswith(CLASSIFIERS) and not hasattr(base.model, "score")
        labels = "Classification" in type(base.model).__name__
        self.every = labels and one and reads_every_state(base.model, backbones[0].module)

    def check(self, virtual: Sequence[int]) -> None:
        """Raises: UsageError for virtual tokens where the head reads all tokens of a row: HF PEFT's heads read the
        virtual ones too, which have left the row here."""
        if any(virtual) and self.every:
            raise UsageError(
                f"the head of {type(self.model).__name__} takes a mean over a row's tokens, and in HF PEFT over its "
                "virtual tokens too, which never reach it here",
                "Choose prefix tuning or LoRA, or a base whose head reads one token.",
            )
