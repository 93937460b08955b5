"""While rows go on by one token each, what stands in for modules whose own forward is slow for so little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.batch.forward import FORWARD
from inlay.batch.paged import PastLayout
from inlay.kernels.few_rows import FewRows
from inlay.kernels.fused import fused_modules
from inlay.kernels.norm import epsilon
from inlay.kernels.standin import StandIn

__all__ = ["Quick"]


class Quick:
    """Stand-ins of a model's linear layers and norms; `copies` is whether linear layers may hold their transpose, which
    takes as much memory as the base."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._standins: list[StandIn] = []
        self._layers: list[FewRows] = []

    def install(self, copies: bool) -> None:
        """Once; a later call may only say more about copies."""
        for layer in self._layers:
            layer.copies |= copies
        if self._standins:
            return
        norms = [module for module in fused_modules(self._model) if epsilon(module) is not None]
        for module in self._model.modules():
            if type(module) is nn.Linear and module.weight.device.type == "cpu":
                self._layers.append(FewRows(module, copies))
                self._standins.append(StandIn(module, _chosen(self._layers[-1])))
        self._standins += [StandIn(module, _chosen(_norm(module))) for module in norms]

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


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor | None]:
    eps = epsilon(module)

    def forward(x: Tensor) -> Tensor | None:
        weight: Any = module.weight
        return F.rms_norm(x, weight.shape, weight, eps) if x.dtype == weight.dtype else None

    return forward
