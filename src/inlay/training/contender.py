"""One adapter in training: everything about it that another contender must not touch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from inlay.bank.adapter import Adapter
from inlay.bank.flat import Flat
from inlay.data.encode import Example
from inlay.errors import FormatError

from .optimizers import ELEMENTWISE, make_optimizer
from .plan import Plan
from .schedules import rates

__all__ = ["Contender"]


class Contender:
    """The state of one adapter in training: optimizer, schedule, sampler, counts, and why it stopped."""

    def __init__(self, plan: Plan, adapter: Adapter, rows: int) -> None:
        self.plan, self.adapter = plan, adapter
        self.flats: list[Flat] = []
        groups = self._groups()
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.batches = -(-rows // plan.batch_size)
        self.total = plan.steps or max(1, round(plan.epochs * self.batches))
        self.optimizer = make_optimizer(plan.optimizer, groups, plan.lr, plan.weight_decay)
        self.schedule = self._schedule()
        self.rows, self.step, self.tokens = rows, 0, 0
        self.stopped = ""
        self.suspects: list[int] = []
        self.loss = float("nan")
        self.norm = float("nan")

    @property
    def live(self) -> bool:
        return not self.stopped

    @property
    def diverged(self) -> bool:
        return self.stopped.startswith("diverged")

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained, by the learning rate that its method gives it (LoRA+ for one)."""
        groups: dict[float, dict[tuple[str, str], nn.Parameter]] = {}
        for path, values in self.adapter.params.items():
            for key, parameter in values.items():
                rate = self.plan.method.rate(self.adapter.sites.get(path), key)
                groups.setdefault(rate, {})[path, key] = parameter
        rates = [self.plan.lr * rate for rate in groups]
        if self.plan.optimizer not in ELEMENTWISE:
            return [{"params": [*own.values()], "lr": lr} for own, lr in zip(groups.values(), rates, strict=True)]
        self.flats = [Flat(own) for own in groups.values()]
        return [{"params": [flat.parameter], "lr": lr} for flat, lr in zip(self.flats, rates, strict=True)]

    def _schedule(self) -> LambdaLR:
        name = self.plan.schedule or ("constant" if hasattr(self.optimizer, "eval") else "linear")
        return LambdaLR(self.optimizer, rates(name, int(self.plan.warmup * self.total), self.total))

    def batch(self, examples: Sequence[Example]) -> list[Example]:
        """The rows of the next step: each pass is a permutation drawn from the contender's own seed."""
        epoch, number = divmod(self.step, self.batches)
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        size = self.plan.batch_size
        return [examples[i] for i in order[number * size : (number + 1) * size]]

    def update(self, loss: float, tokens: int, suspects: Sequence[int] = ()) -> None:
        """Take the step that the gradients say; a loss or gradient that is no number stops this contender alone.

        `suspects` are the samples whose own loss is none.
        """
        total = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = float(total)
        self.loss, self.norm = loss, norm
        if not math.isfinite(norm) or not math.isfinite(loss):
            self.stopped = f"diverged at step {self.step + 1}"
            self.suspects = list(suspects)
            self.forget_gradients()
            return
        if norm > self.plan.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.plan.clip, total)
        self.optimizer.step()
        self.schedule.step()
        self.forget_gradients()
        self.step += 1
        self.tokens += tokens
        if self.step >= self.total:
            self.stopped = "done"
        elif self.plan.stop_after is not None and self.step >= self.plan.stop_after:
            self.stopped = "stopped early"

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad()

    @contextmanager
    def laid_flat(self) -> Iterator[None]:
        """Let gradients reach what the optimizer holds, in one piece where it can be one."""
        self.adapter.flats = self.flats
        try:
            yield
        finally:
            self.adapter.flats = ()

    # ---- what it has learned, and everything it needs to go on

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Parameters as they are to be used, which for a schedule-free optimizer are not those that it trains."""
        optimizer: Any = self.optimizer
        if not hasattr(optimizer, "eval") or not self.step:
            yield
            return
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()

    def values(self) -> dict[str, Tensor]:
        """A copy of the parameters, by the path of their site and their name."""
        found = ((f"{path}:{key}", p) for path, own in self.adapter.params.items() for key, p in own.items())
        return {name: p.detach().clone() for name, p in found}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """The inverse of `values`. Raises: FormatError where they are another adapter's."""
        own = {f"{path}:{key}": p for path, ps in self.adapter.params.items() for key, p in ps.items()}
        if {n: p.shape for n, p in own.items()} != {n: v.shape for n, v in values.items()}:
            raise FormatError(f"the kept parameters are not those of {self.plan.name!r}", "Start the run afresh.")
        for name, parameter in own.items():
            parameter.copy_(values[name])

    def state(self) -> dict[str, Any]:
        counts = {"step": self.step, "tokens": self.tokens, "stopped": self.stopped, "suspects": self.suspects}
        return {
            "parameters": self.values(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "loss": self.loss,
            "norm": self.norm,
            **counts,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.put(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for name in ("step", "tokens", "stopped", "suspects", "loss", "norm"):
            setattr(self, name, state[name])
