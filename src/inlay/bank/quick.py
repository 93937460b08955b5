"""While rows go on by one token each, what stands in for modules whose own forward is slow for so little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.batch.forward import FORWARD
from inlay.batch.paged import PastLayout
from inlay.kernels.decode_linear import DecodeLinear
from inlay.kernels.fused import fused_modules
from inlay.kernels.norm import epsilon
from inlay.kernels.standin import StandIn

from .ready import hooks_around, ready_at
from .steps import fresh

__all__ = ["Quick"]


CALL = "_call_impl"
"""What torch runs when a module is called: its hooks, and its forward among them."""


class Quick:
    """Stand-ins of a model's linear layers and norms; `copies` is whether linear layers may hold their transpose, which
    takes as much memory as the base."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._standins: list[StandIn] = []
        self._layers: list[DecodeLinear] = []

    def install(self, copies: bool) -> None:
        """Once; a later call may only say more about copies."""
        for layer in self._layers:
            layer.copies |= copies
        if self._standins:
            return
        norms = [module for module in fused_modules(self._model) if epsilon(module) is not None]
        for module in self._model.modules():
            if type(module) is nn.Linear and module.weight.device.type == "cpu":
                self._layers.append(DecodeLinear(module, copies))
                self._stand_in(module, self._layers[-1])
        for module in norms:
            self._stand_in(module, _norm(module))

    def _stand_in(self, module: nn.Module, quick: Callable[[Tensor], Tensor | None]) -> None:
        forward = StandIn(module, _chosen(quick))
        self._standins += [forward, StandIn(module, _called(module, forward, quick), CALL)]

    def remove(self) -> None:
        for standin in self._standins:
            standin.remove()
        self._standins, self._layers = [], []


def _chosen(quick: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = FORWARD.get()
        if forward is None or kwargs or len(args) != 1 or not isinstance(forward.layout, PastLayout):
            return original(*args, **kwargs)
        made = quick(args[0]) if forward.layout.continued and not torch.is_grad_enabled() else None
        return original(*args) if made is None else made

    return run


def _called(module: nn.Module, standin: StandIn, quick: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """A call of a module that knows what its hooks would do, and does it."""

    def own(x: Tensor) -> Any:
        if module.forward is not standin:  # somebody has put another forward there
            return module.forward(x)
        made = quick(x)
        return standin.original(x) if made is None else made

    def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = FORWARD.get()
        if forward is None or not forward.goes_on or kwargs or len(args) != 1:
            return original(*args, **kwargs)
        x, hooks = args[0], hooks_around(module)
        if hooks == 0:
            return own(x)
        ready = ready_at(forward, module) if hooks == 1 else None
        if ready is None or not ready.fits(x):
            return original(x)
        x = x if ready.change is None else ready.change(forward, x)
        y = own(x)
        return y if ready.step.idle else ready.step(forward, x, y, fresh(module, y))

    return run


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor | None]:
    eps = epsilon(module)

    def forward(x: Tensor) -> Tensor | None:
        weight: Any = module.weight
        return F.rms_norm(x, weight.shape, weight, eps) if x.dtype == weight.dtype else None

    return forward
