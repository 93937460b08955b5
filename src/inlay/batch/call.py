"""One forward in flight: what the hooks deep inside the base need to know about the batch."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .portions import Portions

__all__ = ["Call", "current", "entered"]


class Call(ABC):
    """A padded or packed forward of one stack; `portions` says which tokens belong to which adapters."""

    attends = False
    """Whether attention is taken over in this call, because prefixes or segments need it."""
    shaken = False
    """Whether noise is on the embeddings already."""
    fused = False
    """Whether gradients are taken, so that fused modules pay."""
    route: Any = None
    """What was in force when the call began; a later recomputation puts it in force again."""

    def __init__(self, owner: object, portions: Portions) -> None:
        self.owner, self.portions = owner, portions

    @abstractmethod
    def unfold(self, value: Tensor, width: int | None) -> Tensor:
        """View an activation of `width` features (ids where None) so that dimension 0 can be cut by `portions`.

        Raises: UsageError where its tokens have lost their order, as behind a mixture's router.
        """

    def fold(self, value: Tensor, like: Tensor) -> Tensor:
        """The inverse of `unfold`, in the shape of `like`."""
        return value.reshape(like.shape)

    def own_tokens(self, embedded: Tensor) -> list[tuple[int, Tensor]]:
        """For each unit, where the embeddings (rows, columns, width) of its own tokens are."""
        raise NotImplementedError

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        """What the base's layers get as attention mask; `plain` makes the one they would get without this call."""
        return plain(**call)

    def attend(
        self, plain: Callable[..., Any], module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Any, **rest: Any
    ) -> tuple[Tensor, Any]:
        """Attention of `module`: q (B, heads, q, dim), k and v (B, shared heads, k, dim) to (B, q, heads, dim)."""
        return plain(module, *qkv, mask, **rest)


_LOCAL = threading.local()


def _stack() -> list[Call | None]:
    if not hasattr(_LOCAL, "calls"):
        _LOCAL.calls = []
    return _LOCAL.calls


def current() -> Call | None:
    """The innermost call of this thread."""
    calls = _stack()
    return calls[-1] if calls else None


@contextmanager
def entered(call: Call | None) -> Iterator[None]:
    """Make `call` the current one."""
    _stack().append(call)
    try:
        yield
    finally:
        _stack().pop()
