"""How one adapter is trained."""

from __future__ import annotations

from dataclasses import dataclass

from inlay.errors import UsageError
from inlay.methods.contract import Method

from .schedules import SCHEDULES

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """How an adapter is trained: `batch_size` rows an optimizer step, for `steps` steps or `epochs` passes.

    The learning rate `lr` grows over the share `warmup` of the steps and then follows `schedule` (linear, cosine,
    constant; linear where None, constant for schedule-free optimizers); `clip` bounds the norm of its gradient;
    `neftune_alpha` shakes embeddings (arXiv:2310.05914), `label_smoothing` spreads that share of each target over the
    vocabulary; `stop_after` ends it early without changing its schedule.
    """

    name: str
    method: Method
    lr: float = 1e-3
    batch_size: int = 16
    epochs: float = 1.0
    steps: int | None = None
    warmup: float = 0.0
    schedule: str | None = None
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    neftune_alpha: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0
    stop_after: int | None = None

    def __post_init__(self) -> None:
        if self.schedule not in (None, *SCHEDULES):
            raise UsageError(f"schedule {self.schedule!r} is not known", "Choose linear, cosine or constant.")
        for name in ("lr", "batch_size", "epochs", "clip"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}", "Give a number above 0.")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", "Give a share from 0 to below 1.")
        for name in ("weight_decay", "neftune_alpha"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} is {getattr(self, name)}", "Give 0 or more.")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"steps is {self.steps}", "Give 1 or more.")
