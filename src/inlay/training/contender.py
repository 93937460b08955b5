"""One adapter in training: everything about it that another contender must not touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from inlay.data.encode import Example
from inlay.errors import UsageError
from inlay.methods.contract import Method

__all__ = ["Contender", "Plan"]


@dataclass(frozen=True)
class Plan:
    """How an adapter is trained: `batch_size` rows an optimizer step, for `steps` steps or `epochs` passes.

    The learning rate `lr` grows over the share `warmup` of the steps and then follows `schedule` (linear, cosine,
    constant); `clip` bounds the norm of its gradient; `stop_after` ends it early without changing its schedule.
    """

    name: str
    method: Method
    lr: float = 1e-3
    batch_size: int = 16
    epochs: float = 1.0
    steps: int | None = None
    warmup: float = 0.0
    schedule: str = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    stop_after: int | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "cosine", "constant"):
            raise UsageError(f"schedule {self.schedule!r} is not known", "Choose linear, cosine or constant.")
        for name in ("lr", "batch_size", "epochs", "clip"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)}", "Give a number above 0.")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"steps is {self.steps}", "Give 1 or more.")


class Contender:
    """The state of one adapter in training: optimizer, schedule, sampler, counts, and why it stopped."""

    def __init__(self, plan: Plan, parameters: Sequence[nn.Parameter], rows: int) -> None:
        from transformers import get_scheduler

        self.plan, self.parameters = plan, list(parameters)
        self.batches = -(-rows // plan.batch_size)
        self.total = plan.steps or max(1, round(plan.epochs * self.batches))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
        self.schedule = get_scheduler(
            plan.schedule, self.optimizer, num_warmup_steps=int(plan.warmup * self.total), num_training_steps=self.total
        )
        self.rows, self.step, self.tokens = rows, 0, 0
        self.stopped = ""
        self.loss = float("nan")
        self.norm = float("nan")

    @property
    def live(self) -> bool:
        return not self.stopped

    def batch(self, examples: Sequence[Example]) -> list[Example]:
        """The rows of the next step: each pass is a permutation drawn from the contender's own seed."""
        epoch, number = divmod(self.step, self.batches)
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        size = self.plan.batch_size
        return [examples[i] for i in order[number * size : (number + 1) * size]]

    def update(self, loss: float, tokens: int) -> None:
        """Take the step that the gradients say; a loss or gradient that is no number stops this contender alone."""
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.plan.clip))
        self.loss, self.norm = loss, norm
        if norm != norm or abs(norm) == float("inf") or loss != loss:
            self.stopped = f"diverged at step {self.step + 1}"
            self.optimizer.zero_grad()
            return
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += tokens
        if self.step >= self.total:
            self.stopped = "done"
        elif self.plan.stop_after is not None and self.step >= self.plan.stop_after:
            self.stopped = "stopped early"
