"""Fused modules: their forwards stand in for the base's own where gradients are taken under a route."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any

from torch import nn

from inlay.batch.forward import FORWARD, inside
from inlay.kernels.fused import Forward, fused_modules
from inlay.kernels.standin import StandIn

from .gradients import check_gradients

__all__ = ["Fusing"]


class Fusing:
    """Found, by running them, when the first forward with gradients comes."""

    def __init__(self, model: nn.Module, alone: Callable[[], AbstractContextManager[None]]) -> None:
        self._model, self._alone = model, alone
        self._standins: list[StandIn] = []
        self._installed = False
        self._lock = Lock()

    def install(self) -> None:
        """Once; in the base alone, whose modules are run for it. Raises: UsageError where it gives no gradients."""
        if self._installed:
            return
        with self._lock, self._alone(), inside(None):
            if self._installed:
                return
            check_gradients(self._model)
            # After an interruption this goes on: modules that have a forward of their own are passed over.
            for module, fused in fused_modules(self._model).items():
                self._standins.append(StandIn(module, _chosen(fused)))
            self._installed = True

    def remove(self) -> None:
        for standin in self._standins:
            standin.remove()
        self._standins, self._installed = [], False


def _chosen(fused: Forward) -> Callable[..., Any]:
    def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = FORWARD.get()
        if forward is None or not forward.training or kwargs or len(args) != 1:
            return original(*args, **kwargs)
        return fused(*args)

    return run
