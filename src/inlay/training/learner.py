"""One adapter in training: all the state that no other learner may touch."""

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
from inlay.errors import FormatError, UsageError
from inlay.methods.table import described

from .acting import Acting
from .optimizers import ELEMENTWISE, make_optimizer
from .plan import Plan
from .schedules import rates
from .starting import Rows, permutation, rows_of

__all__ = ["Learner"]

COUNTS = ("step", "sound", "tokens", "stopped", "cause", "suspects", "loss", "norm", "rate")
"""What a checkpoint holds of a learner beside its tensors."""


class Learner:
    """One adapter in training, of a `plan`, over `rows` examples: optimizer, schedule, sampler, and why it `stopped`.

    `step` counts the steps taken of `total`, `tokens` those trained on. Of the last step: `loss` (mean, nats), `norm`
    (of the gradient, before clipping) and `rate` (learning rate). `sound` is the step whose parameters the adapter has:
    `step`, or an earlier one where it diverged.
    """

    def __init__(self, plan: Plan, adapter: Adapter, rows: int) -> None:
        self.plan, self.adapter = plan, adapter
        self.flats: list[Flat] = []
        groups = self._groups()
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.batches = -(-rows // plan.batch_size)
        self.total = plan.steps or max(1, round(plan.epochs * self.batches))
        self.optimizer = make_optimizer(plan.optimizer, groups, plan.rate, plan.weight_decay)
        self.acting = Acting(adapter, self.flats)
        self._check_methods()
        self.schedule = self._schedule()
        self.rows, self.step, self.tokens = rows, 0, 0
        self.stopped = ""
        self.sound = 0
        self.suspects: list[int] = []
        self.cause = ""
        self.loss = float("nan")
        self.norm = float("nan")
        self.rate = plan.rate
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._before: list[Tensor] = []
        self._before_step = 0

    @property
    def live(self) -> bool:
        return not self.stopped

    @property
    def diverged(self) -> bool:
        return self.stopped.startswith("diverged")

    def _check_methods(self) -> None:
        """Raises: UsageError where a method cannot be trained in so many steps, or by this optimizer."""
        for method in self.adapter.methods:
            method.check_steps(self.total)
            if method.changes_values and hasattr(self.optimizer, "eval"):
                what = f"{method.title} changes its parameters between steps, over which {self.plan.optimizer} averages"
                raise UsageError(what, "Use --optimizer adamw.")

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained, by the learning rate that its method gives it (LoRA+ for one)."""
        groups = self.adapter.by_rate()
        self.adapter.grouped = True
        rates = [self.plan.rate * rate for rate in groups]
        if self.plan.optimizer not in ELEMENTWISE:
            return [{"params": [*own.values()], "lr": lr} for own, lr in zip(groups.values(), rates, strict=True)]
        self.adapter.laid = self.flats = [Flat(own) for own in groups.values()]
        return [{"params": [flat.parameter], "lr": lr} for flat, lr in zip(self.flats, rates, strict=True)]

    def _schedule(self) -> LambdaLR:
        name = self.plan.schedule or ("constant" if hasattr(self.optimizer, "eval") else "linear")
        return LambdaLR(self.optimizer, rates(name, int(self.plan.warmup * self.total), self.total))

    def batch(self, rows: Rows) -> list[Example]:
        """The examples of the next step: each pass is a permutation drawn from the learner's own seed."""
        examples = rows_of(rows, self.plan)
        epoch, number = divmod(self.step, self.batches)
        if self._order[0] != epoch:
            self._order = epoch, permutation(self.plan.seed, epoch, self.rows)
        size = self.plan.batch_size
        return [examples[i] for i in self._order[1][number * size : (number + 1) * size].tolist()]

    def update(self, loss: float, tokens: int, suspects: Sequence[int] = ()) -> None:
        """Take an optimizer step. A loss, gradient or parameter that is no number stops this learner alone, with the
        parameters from before the update that made it so.

        `loss` is the step's mean (nats), `tokens` the step's; `suspects` are the samples whose own loss is no number.
        """
        self.acting.penalise()
        total = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = float(total)
        self.loss, self.norm = loss, norm
        if not math.isfinite(norm) or not math.isfinite(loss):
            self.diverge("the loss or its gradient is no number", self.step + 1, suspects)
            return
        if norm > self.plan.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.plan.clip, total)
        self._remember()
        self.rate = float(self.schedule.get_last_lr()[0])  # some optimizers keep a tensor
        self.optimizer.step()
        if not math.isfinite(float(nn.utils.get_total_norm([p.detach() for p in self.parameters]))):
            self.diverge("the update took the parameters beyond all bounds", self.step + 1)
            return
        self.schedule.step()
        self.step += 1
        self.acting.after_step(self.step, self.total)
        self.forget_gradients()
        self.sound += 1
        self.tokens += tokens
        if self.step >= self.total:
            self.stopped = "done"
        elif self.plan.stop_after is not None and self.step >= self.plan.stop_after:
            self.stopped = "stopped early"

    def stop(self, why: str) -> None:
        """Stop between two steps: from now on nothing changes the parameters."""
        self.stopped = why
        self.forget_gradients()

    @torch.no_grad()
    def diverge(self, cause: str, step: int, suspects: Sequence[int] = ()) -> None:
        """Stop at `step` and take the last update back: what is kept has only ever given losses that are numbers."""
        self.stopped, self.cause, self.suspects = f"diverged at step {step}", cause, list(suspects)
        self.forget_gradients()
        if self._before:
            held = self._held()
            # A schedule-free optimizer that began with the update taken back began with the parameters themselves.
            torch._foreach_copy_(held, self._before * (len(held) // len(self._before)))  # pyright: ignore
            self.sound = self._before_step

    def _held(self) -> list[Tensor]:
        """What an update changes and the adapter depends on: its parameters, and those of a schedule-free average."""
        states = self.optimizer.state.values()
        return [*(p.detach() for p in self.parameters), *(state["z"] for state in states if "z" in state)]

    @torch.no_grad()
    def _remember(self) -> None:
        held = self._held()
        if len(self._before) != len(held):  # at first, and when the optimizer has begun
            self._before = [torch.empty_like(value) for value in held]
        torch._foreach_copy_(self._before, held)  # pyright: ignore
        self._before_step = self.step

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad()

    @contextmanager
    def flat_gradients(self) -> Iterator[None]:
        """Let the gradients of a forward reach the optimizer's own tensors, in one piece where it can be one."""
        self.adapter.flats = self.flats
        try:
            yield
        finally:
            self.adapter.flats = ()

    # ---- weights, and the state that a checkpoint holds

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the weights to use: for a schedule-free optimizer its average, else those that are trained."""
        optimizer: Any = self.optimizer
        if not hasattr(optimizer, "eval") or not self.step:
            yield
            return
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the adapter's parameters, by the path of their site and their name."""
        found = ((f"{path}:{key}", p) for path, own in self.adapter.params.items() for key, p in own.items())
        return {name: p.detach().clone() for name, p in found}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of `weights`. Raises: FormatError where they are another adapter's."""
        own = {f"{path}:{key}": p for path, ps in self.adapter.params.items() for key, p in ps.items()}
        if {n: p.shape for n, p in own.items()} != {n: v.shape for n, v in weights.items()}:
            raise FormatError(f"the saved parameters are not those of {self.plan.name!r}", "Start the run afresh.")
        for name, parameter in own.items():
            parameter.copy_(weights[name])

    def state(self) -> dict[str, Any]:
        return {
            "parameters": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "before": self._before,
            "before_step": self._before_step,
            "acting": self.acting.state(),
            "methods": described(self.adapter.methods) if self.adapter.chosen else None,
            **{name: getattr(self, name) for name in COUNTS},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`; where this plan has more steps than before, its schedule is that of the new total."""
        self.load_weights(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._before, self._before_step = list(state["before"]), state["before_step"]
        self.acting.restore(state.get("acting") or self.acting.states)
        for name in COUNTS:
            setattr(self, name, state[name])

    def extend(self) -> None:
        """Resume a restored learner that had stopped: its rate is what this plan's schedule says at its step."""
        self.stopped = ""
        for group, base, rate in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            lr = float(base) * rate(self.step)
            group["lr"] = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
