"""One forward of a backbone in flight: all that the hooks inside of it read. It lives in a ContextVar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from inlay.sites.attention import HANDLER, QKV

from .layout import Layout
from .route import Route

__all__ = ["FORWARD", "IN_MODEL", "Forward", "inside"]


@dataclass(eq=False)
class Forward:
    """`owner` is the bank whose base runs, `modules` what belongs to its backbone; `training` is whether gradients are
    taken; `drops` whether dropout that no noise names draws from torch's generator, as in anybody's loop after
    `model.train()`. `streams` holds the residual stream of each sublayer, and the queries of the attention modules
    that are `watched`, by path; `inputs` what a site's first hook leaves to its second, `cache` what is computed once a
    forward; `behind` is set outside of the backbone: while its head runs or, where there is a `before`, what comes
    before it. It `goes_on` where all rows do from what was read before, without gradients, noise and autocast; it is
    `streamed` where an adapter reads residual streams.
    """

    owner: object
    route: Route
    layout: Layout
    modules: frozenset[nn.Module]
    training: bool
    drops: bool = False
    streams: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[Any, Any] = field(default_factory=dict)
    cache: dict[Any, Any] = field(default_factory=dict)
    noisy: bool = False
    behind: bool = False
    before: Any = None
    goes_on: bool = False
    streamed: bool = True
    watched: Mapping[nn.Module, str] = field(default_factory=dict)

    @property
    def attends(self) -> bool:
        """Whether attention asks this forward."""
        return self.layout.attends or bool(self.watched)

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        if module in self.watched:
            self.streams[self.watched[module]] = qkv[0].transpose(1, 2).flatten(2)  # (rows, tokens, heads x head_dim)
        if module not in self.modules or not self.layout.attends:
            return plain(module, *qkv, mask, **rest)
        return self.layout.attend(plain, module, qkv, mask, **rest)

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        return self.layout.mask(plain, call) if self.layout.attends else plain(**call)

    def release(self) -> None:
        """Let go of the activations; what is in `cache` stays for those who recompute a block in the backward."""
        self.streams.clear()
        self.inputs.clear()


FORWARD: ContextVar[Forward | None] = ContextVar("inlay_forward", default=None)
IN_MODEL: ContextVar[object] = ContextVar("inlay_in_model", default=None)
"""The bank whose model runs, from before its backbone to behind its head."""


@contextmanager
def inside(forward: Forward | None) -> Iterator[None]:
    """Run what is inside as a part of `forward`, in whichever thread that is; None: of no forward."""
    attends = forward is not None and forward.attends
    around = HANDLER.get()
    watcher = None if isinstance(around, Forward) else around  # who looks on without a forward goes on looking
    before, handler = FORWARD.set(forward), HANDLER.set(forward if attends else watcher)
    try:
        yield
    finally:
        FORWARD.reset(before)
        HANDLER.reset(handler)
