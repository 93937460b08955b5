"""What an adapter's methods do around the steps of its training: penalties of the loss, and changes after a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.bank.adapter import Adapter, Part
from inlay.bank.flat import Flat, Key
from inlay.methods.around import Around

__all__ = ["Acting"]

Gradients = dict[str, dict[str, Tensor]]


class Acting:
    """The methods of one adapter, whose parameters are those of `flats`, or its own where there are none."""

    def __init__(self, adapter: Adapter, flats: Sequence[Flat]) -> None:
        self.parts, self.flats = adapter.parts, flats
        self.states: list[dict[str, Tensor]] = [{} for _ in adapter.parts]

    def penalise(self) -> None:
        """Add the gradients of the methods' penalties to those of the step."""
        for part in self.parts:
            if type(part.method).penalty is Around.penalty:
                continue
            with torch.enable_grad():
                penalty = part.method.penalty(part.params)
            if penalty is None:
                continue
            into = self._gradients(part)
            named = [(path, name) for path, own in into.items() for name in own]
            grads = torch.autograd.grad(penalty, [part.params[path][name] for path, name in named], allow_unused=True)
            for (path, name), grad in zip(named, grads, strict=True):
                if grad is not None:
                    into[path][name].add_(grad)

    def after_step(self, step: int, total: int) -> None:
        """Let methods act after the optimizer's step number `step` (from 1) of `total`, with its gradients."""
        for part, state in zip(self.parts, self.states, strict=True):
            if type(part.method).after_step is not Around.after_step:
                part.method.after_step(part.params, self._gradients(part), step, total, state)

    def _gradients(self, part: Part) -> Gradients:
        """By path and name of what is trained; zero where the step has none."""
        flat: dict[Key, Tensor] = {}
        for own in self.flats:
            flat |= dict(zip(own.shapes, own.views(_gradient(own.parameter)), strict=True))
        found: Gradients = {}
        for path, values in part.params.items():
            for name, p in values.items():
                if p.requires_grad:
                    found.setdefault(path, {})[name] = flat[part.key(path), name] if flat else _gradient(p)
        return found

    def state(self) -> list[dict[str, Tensor]]:
        return self.states

    def restore(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """The inverse of `state`."""
        for part, own, before in zip(self.parts, self.states, saved, strict=True):
            device = next((p.device for of in part.params.values() for p in of.values()), torch.device("cpu"))
            own.update({name: value.to(device) for name, value in before.items()})


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
