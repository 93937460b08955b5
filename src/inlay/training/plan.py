"""How one adapter is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Le

from inlay.data.places import PLACES
from inlay.values import Checked, Count, Help, NonNegative, OneOf, Positive, Seed, Share

from .optimizers import OPTIMIZERS
from .schedules import SCHEDULES

__all__ = ["COURSE", "Course", "Plan", "VirtualTokensAt"]

COURSE = "Course of training"

VirtualTokensAt = Annotated[
    str, OneOf(PLACES, "place"), Help("where virtual tokens stand, for methods that have some", "Data")
]


@dataclass(frozen=True, kw_only=True)
class Course(Checked):
    """The settings of an adapter's training, whatever its method and its rows.

    NEFTune is arXiv:2310.05914.
    """

    epochs: Annotated[Positive, Le(1e6), Help("passes over the rows", COURSE)] = 1.0
    steps: Annotated[Count | None, Help("optimizer steps, in place of epochs", COURSE)] = None
    batch_size: Annotated[Count, Help("rows per optimizer step", COURSE)] = 16
    lr: Annotated[Positive | None, Help("learning rate; the method's own where unset (`inlay methods`)", COURSE)] = None
    schedule: Annotated[
        str | None,
        OneOf(tuple(SCHEDULES), "schedule"),
        Help("how the rate goes down; linear, but constant for schedule-free optimizers", COURSE),
    ] = None
    warmup: Annotated[Share, Help("share of the steps over which the rate grows", COURSE)] = 0.0
    optimizer: Annotated[str, OneOf(tuple(OPTIMIZERS), "optimizer"), Help("what takes the steps", COURSE)] = "adamw"
    weight_decay: Annotated[NonNegative, Help("the optimizer's weight decay", COURSE)] = 0.0
    clip: Annotated[Positive, Help("largest norm of the adapter's gradient", COURSE)] = 1.0
    neftune_alpha: Annotated[NonNegative, Help("noise on embeddings; 5 is usual", COURSE)] = 0.0
    label_smoothing: Annotated[Share, Help("share of each target spread over the vocabulary", COURSE)] = 0.0
    seed: Annotated[Seed, Help("start, order of rows and dropout", COURSE)] = 0
    virtual_tokens_at: Annotated[
        str | None, OneOf(PLACES, "place"), Help("where virtual tokens stand; as in the rows where unset", "Data")
    ] = None


@dataclass(frozen=True)
class Plan(Course):
    """A course for the adapter `name` of `method` (a `Method`); `stop_after` so many steps it ends early, without a
    change to its schedule.
    """

    name: str
    method: Any
    stop_after: Count | None = None

    @property
    def rate(self) -> float:
        """The learning rate: the method's own where none was given."""
        return self.method.usual_rate if self.lr is None else self.lr
