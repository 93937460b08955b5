"""What runs around the backbones of a model: towers of images and sounds before them, heads behind."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from inlay.batch.forward import FORWARD, IN_MODEL, Forward, inside
from inlay.batch.layout import Layout
from inlay.batch.route import Route
from inlay.errors import UsageError
from inlay.kernels.standin import StandIn

from .behind import Before, Behind
from .lookup import Lookup
from .recompute import bind_checkpoints

__all__ = ["Outside"]

BROKEN = (RuntimeError, IndexError, ValueError, AssertionError)
"""What bases raise that reckon with as many columns as they were given."""
ENCODES = "_maybe_prepare_encoder_kwargs_for_generation"
"""The method by which transformers' `generate` runs towers before the model's first forward."""


class Outside:
    """Stands in for the forward of `model`, which holds backbones, and for what runs its towers ahead of it."""

    def __init__(self, model: nn.Module, bank: Lookup, checkpointed: Sequence[nn.Module]) -> None:
        self.model, self.bank, self._checkpointed = model, bank, checkpointed

    def standins(self) -> list[StandIn]:
        found = [StandIn(self.model, self._forward)]
        if hasattr(self.model, ENCODES) and not getattr(
            getattr(self.model, "config", None), "is_encoder_decoder", False
        ):
            found.append(StandIn(self.model, self._encoded, ENCODES))
        return found

    def _forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._inside(_bound(original, args, kwargs), original, args, kwargs, reaches=True)

    def _encoded(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = _bound(original, args, kwargs)
        given = {**bound.get("model_kwargs", {}), "input_ids": bound.get("inputs_tensor")}
        return self._inside(given, original, args, kwargs)

    def _inside(
        self, given: Mapping[str, Any], original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
        reaches: bool = False,
    ) -> Any:  # fmt: skip
        """The modules that run before a backbone, and those of the head behind it, are in the same forward."""
        forward = self._before(given)
        before = IN_MODEL.set(self.bank)
        try:
            with inside(forward):
                out = original(*args, **kwargs)
                if reaches and forward is not None and FORWARD.get() is forward:
                    self._check_unreached(forward.route)
                return out
        except BROKEN as error:
            if self._is_plain(forward, error):
                raise
            why = next(iter(str(error).strip().splitlines()), "")[:200]
            raise UsageError(
                f"{type(self.model).__name__} fails in a forward with prefixes or virtual tokens "
                f"({type(error).__name__}: {why})",
                "Choose LoRA, if it runs without them.",
            ) from error
        finally:
            IN_MODEL.reset(before)
            if forward is not None:
                forward.release()

    def _is_plain(self, forward: Forward | None, error: Exception) -> bool:
        """Whether an error has nothing to do with prefixes and virtual tokens, or is one of memory, which others see
        to."""
        if forward is None or isinstance(error, torch.OutOfMemoryError) or re.search("memory|alloc", str(error)):
            return True
        return not self._stands_before(forward.route)

    def _stands_before(self, route: Route) -> bool:
        """Whether a row of the route has a prefix or virtual tokens."""
        return any(self.bank.prefix_length(blend) or self.bank.virtual_length(blend) for blend in route.blends)

    def _check_unreached(self, route: Route) -> None:
        """Raises: UsageError where a forward that entered no backbone should have had prefixes or virtual tokens."""
        if self._stands_before(route):
            raise UsageError(
                f"{type(self.model).__name__} never ran the stack that prefixes and virtual tokens stand in: "
                "they would change nothing",
                "Choose LoRA for this base.",
            )

    def _before(self, given: Mapping[str, Any]) -> Forward | None:
        """The forward that towers of images and sounds are in, and what embeds ids for the backbone."""
        route = self.bank.route_here()
        if route is None or not any(route.blends):
            return None
        bind_checkpoints(self._checkpointed)
        grad = torch.is_grad_enabled()
        return Forward(
            self.bank, route, cast("Layout", Behind(route)), frozenset(), grad, grad and self.model.training,
            behind=True, before=Before(self.model, given, route),
        )  # fmt: skip


def _bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name."""
    signature = inspect.signature(function)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind == parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return given
