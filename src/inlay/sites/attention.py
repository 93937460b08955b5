"""Where attention can be taken over: transformers asks one interface for the function and another for the mask.

Both are asked while a model runs. What they answer depends on the handler of this context, so that models, threads and
tasks do not disturb one another, and no configuration is written to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol
from weakref import WeakSet, finalize

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from .uncompiled import Uncompiled, forget_compiled, never_compiled

__all__ = ["HANDLER", "QKV", "Handler", "handled_by", "is_own", "tapped_by", "unwatch", "watch"]

QKV = tuple[Tensor, Tensor, Tensor]
"""Queries (B, heads, q, dim), keys and values (B, shared heads, k, dim)."""


class Handler(Protocol):
    """Takes attention over."""

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        """What `plain(module, *qkv, mask, **rest)` stands for: ((B, q, heads, dim), weights or None)."""
        ...

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        """What `plain(**call)` stands for: what the layers get as their attention mask."""
        ...


HANDLER: ContextVar[Handler | None] = ContextVar("inlay_attention", default=None)

TAP: ContextVar[Callable[[Callable[..., Any]], Callable[..., Any]] | None] = ContextVar("inlay_tap", default=None)
"""Stands for the function that a handler calls in the end, with all keys in place."""

PLAIN = ("eager", "sdpa")
"""Implementations that take a dense mask; every other one is replaced by sdpa where a handler is at work."""

_interface = AttentionInterface.get_interface
_mask_interface = AttentionMaskInterface.__getitem__
_watched: WeakSet[nn.Module] = WeakSet()
_lock = threading.RLock()  # a model may be collected while it is held


@contextmanager
def handled_by(handler: Handler | None) -> Iterator[None]:
    """Let attention of everything that runs inside, in this context, go through `handler`."""
    before = HANDLER.set(handler)
    try:
        yield
    finally:
        HANDLER.reset(before)


@contextmanager
def tapped_by(tap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Let `tap(plain)` stand for each `plain` that a handler gets inside, in this context, to look at what it is given
    and gives."""
    before = TAP.set(tap)
    try:
        yield
    finally:
        TAP.reset(before)


def is_own(plain: Callable[..., Any]) -> bool:
    """Whether `plain` is a function of the model's own (soft caps, sinks), not transformers' common one."""
    return plain is not sdpa_attention_forward


def watch(model: nn.Module) -> None:
    """Ask handlers from now on: as long as any `model` is watched, for all models."""
    with _lock:
        if model not in _watched:
            finalize(model, _restore_unwatched)
        _watched.add(model)
        AttentionInterface.get_interface = _get_interface
        AttentionMaskInterface.__getitem__ = _get_mask
    forget_compiled()


def unwatch(model: nn.Module) -> None:
    """The inverse of `watch`."""
    with _lock:
        _watched.discard(model)
        _restore_unwatched()
    forget_compiled()


def _restore_unwatched() -> None:
    """Give the interfaces their own methods back where no model is left.

    Garbage collection may call this at any moment, inside of compiled code too, which must not be reset then.
    """
    with _lock:
        if not list(_watched):
            AttentionInterface.get_interface = _interface
            AttentionMaskInterface.__getitem__ = _mask_interface


@never_compiled
def _get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
    plain, handler = _interface(self, attn_implementation, default), HANDLER.get()
    if handler is None:
        return plain
    if attn_implementation not in (None, *PLAIN):
        plain = self["sdpa"]
    if (tap := TAP.get()) is not None:
        plain = tap(plain)

    # The names are transformers': some models give all by name, and a few scaling by position.
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **rest: Any
    ) -> Any:
        if args:
            rest = {**dict(zip(("scaling", "dropout"), args, strict=False)), **rest}
        return handler.attend(plain, module, (query, key, value), attention_mask, **rest)

    return Uncompiled(attend)


@never_compiled
def _get_mask(self: Any, key: str) -> Callable[..., Any]:
    handler = HANDLER.get()
    if handler is None:
        return _mask_interface(self, key)
    plain = _mask_interface(self, key if key in PLAIN else "sdpa")

    def mask(**call: Any) -> Any:
        return handler.mask(plain, call)

    return Uncompiled(mask)
