"""Hooks on the base's stacks: they lay each call out before it starts and narrow its result when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inlay.batch.attention import taken_over
from inlay.batch.call import current, entered
from inlay.batch.noise import Noise, shaken
from inlay.batch.packed import PackedCall
from inlay.batch.padded import PaddedCall, columns
from inlay.batch.prefixes import KeysValues, Prefixes
from inlay.batch.route import Blend
from inlay.batch.stack import Stack, describe
from inlay.errors import UsageError
from inlay.kernels.twins import find_twins, in_place
from inlay.sites.find import Structure
from inlay.sites.hints import CACHES
from inlay.sites.probe import attention_configs, attention_sites, uses_interface

from .recompute import asleep

__all__ = ["CallHooks", "Lookup", "Route"]


@dataclass
class Route:
    """What is in force between entering and leaving a route: blends of rows, or of segments with their `lengths`;
    `kept` holds how many tokens of each segment go on to the head, `places` before which token virtual ones stand."""

    blends: list[Blend]
    lengths: list[int] | None = None
    kept: list[int] | None = None
    noise: Noise | None = None
    places: list[int] | None = None
    held: dict[Any, Any] = field(default_factory=dict)


class Lookup(Protocol):
    """What the hooks ask the bank; `owner` marks its calls."""

    @property
    def owner(self) -> object: ...
    def virtual_length(self, blend: Blend) -> int: ...
    def prefix_length(self, blend: Blend) -> int: ...
    def virtual_of(self, blend: Blend) -> Tensor | None: ...
    def prefix_of(self, blend: Blend, module: nn.Module) -> KeysValues | None: ...
    def version(self) -> int: ...
    def route_in_force(self) -> Route | None: ...
    def takes_padding(self, behind_prefix: bool) -> bool: ...
    def in_force(self, route: Route) -> AbstractContextManager[None]: ...


class CallHooks:
    """Lives as long as the bank is attached."""

    def __init__(self, base: Structure, bank: Lookup) -> None:
        self.base, self.bank = base, bank
        parts = ("encoder", "decoder") if len(base.stacks) == 2 else ("",)
        self.stacks = [describe(module, part) for module, part in zip(base.stacks, parts, strict=True)]
        self.configs = attention_configs(base.model)
        self.writes = getattr(base.model, "can_generate", bool)()
        self._open: list[tuple[nn.Module, ExitStack]] = []
        self._caches: WeakKeyDictionary[Any, list[Blend]] = WeakKeyDictionary()
        self._checkpointed = [m for m in base.model.modules() if hasattr(m, "gradient_checkpointing")]
        self._rebound: dict[nn.Module, Any] = {}
        self.handles: list[RemovableHandle] = []
        for stack in self.stacks:
            self.handles += [
                stack.module.register_forward_pre_hook(partial(self._before, stack), with_kwargs=True),
                stack.module.register_forward_hook(partial(self._after, stack), with_kwargs=True, always_call=True),
            ]
            if stack.pooler is not None:
                self.handles.append(stack.pooler.register_forward_pre_hook(self._pool))
        for embedding in {id(s.embedding): s.embedding for s in self.stacks}.values():
            self.handles.append(embedding.register_forward_hook(self._embed))

    @cached_property
    def _twins(self) -> dict[nn.Module, Any]:
        with self.bank.in_force(Route([()])):  # the base alone
            return find_twins(self.base.model)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module, original in self._rebound.items():
            module._gradient_checkpointing_func = original  # pyright: ignore[reportArgumentType]

    # ---- before, inside and after a stack

    def _before(self, stack: Stack, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        opened = ExitStack()
        self._open.append((module, opened))
        route = self.bank.route_in_force()
        if route is None:
            opened.enter_context(entered(None))
            return None
        given = stack.arguments(args, kwargs)
        call = self._packed(stack, route) if route.lengths else self._padded(stack, route, given)
        call.route, call.fused = route, torch.is_grad_enabled()
        given = call.prepare(given)
        if stack.part == "decoder" and not route.lengths:
            self._widen_cross_mask(given, route)
        self._check_cache(given.get(stack.cache), route.blends)
        self._bind_checkpoints(route, call)
        opened.enter_context(self._inside(call))
        return (), given

    def _padded(self, stack: Stack, route: Route, given: dict[str, Any]) -> PaddedCall:
        rows = _rows(given)
        if rows % len(route.blends):
            raise UsageError(
                f"the route has {len(route.blends)} rows but the batch has {rows}", "Give one entry for each row."
            )
        blends = [blend for blend in route.blends for _ in range(rows // len(route.blends))]
        virtual = [0 if stack.part == "decoder" else self.bank.virtual_length(b) for b in blends]
        prefixes = self._prefixes(stack, route, blends)
        cache = given.get(stack.cache)
        continued = cache is not None and cache in self._caches
        own_attention = not uses_interface(self.base) if any(virtual) or prefixes.longest else False
        by_cache = prefixes.longest > 0 and own_attention
        if len(set(virtual)) > 1 and own_attention and not self.bank.takes_padding(prefixes.longest > 0):
            raise UsageError(
                "this base does not ignore padding: rows with different numbers of virtual tokens cannot share a batch",
                "Run them in batches of their own.",
            )
        if by_cache and stack.module.training and any(m.gradient_checkpointing for m in self._checkpointed):
            raise UsageError("this base drops prefixes under gradient checkpointing", "Switch checkpointing off.")
        values = self.bank.virtual_of
        places = None
        if route.places is not None and stack.part != "decoder":
            places = [place for place in route.places for _ in range(rows // len(route.blends))]
        call = PaddedCall(
            self.bank.owner, blends, stack, virtual, prefixes, values, by_cache, continued, places, self.writes
        )
        if own_attention and any(config._attn_implementation != "eager" for config in self.configs):
            call.attends = False  # such a base may ask its configuration for a name it knows
        return call

    def _packed(self, stack: Stack, route: Route) -> PackedCall:
        assert route.lengths is not None
        virtual = [self.bank.virtual_length(b) for b in route.blends]
        prefixes = self._prefixes(stack, route, route.blends)
        return PackedCall(
            self.bank.owner, route.blends, route.lengths, stack, virtual, prefixes, self.bank.virtual_of, route.places,
            self.writes,
        )  # fmt: skip

    def _prefixes(self, stack: Stack, route: Route, blends: Sequence[Blend]) -> Prefixes:
        """Held by the route while nothing is trained, so that each layer stacks its prefixes once."""
        spot = (stack.part, len(blends), self.bank.version())
        if spot not in route.held or torch.is_grad_enabled():
            lengths = [0 if stack.part == "encoder" else self.bank.prefix_length(b) for b in blends]
            modules = [site.module for site in attention_sites(self.base)] if any(lengths) else []
            route.held[spot] = Prefixes(blends, lengths, self.bank.prefix_of, modules)
        return route.held[spot]

    def _embed(self, module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor | None:
        call = current()
        if (
            isinstance(call, (PaddedCall, PackedCall))
            and call.owner is self.bank.owner
            and module is call.stack.embedding
        ):
            filled = call.embed(embedded)
            route = self.bank.route_in_force()
            if route is None or route.noise is None or not any(route.noise.shakes) or call.shaken:
                return filled
            if call.stack.part == "decoder":
                return filled
            call.shaken = True
            filled = embedded if filled is None else filled
            return shaken(filled, call.own_tokens(filled), route.noise)
        return None

    def _pool(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = current()
        return (
            (call.narrow(args[0]), *args[1:])
            if isinstance(call, PaddedCall) and call.owner is self.bank.owner
            else None
        )

    def _after(self, stack: Stack, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        while self._open:  # a call that broke off inside leaves its own entry behind
            opened, context = self._open.pop()
            call = current()
            context.close()
            if opened is module:
                break
        else:
            return None
        if not isinstance(call, (PaddedCall, PackedCall)) or out is None:
            return None
        for name in CACHES:
            self._tag_cache(_entry(out, name), call.blends)
        return None if stack.part == "encoder" else _narrowed(out, call)

    # ---- encoder and decoder, caches, checkpointing

    def _widen_cross_mask(self, given: dict[str, Any], route: Route) -> None:
        """The encoder's output holds virtual tokens: the decoder's view of it gets their columns."""
        states = given.get("encoder_hidden_states")
        widest = max((self.bank.virtual_length(b) for b in route.blends), default=0)
        if states is None or not widest:
            return
        rows, columns = states.shape[:2]
        mask = given.get("encoder_attention_mask")
        if mask is None:
            mask = torch.ones(rows, columns - widest, dtype=torch.long, device=states.device)
        if mask.shape[1] == columns:
            return
        each = rows // len(route.blends)
        virtual = torch.tensor(
            [self.bank.virtual_length(b) for b in route.blends for _ in range(each)], device=mask.device
        )
        first, length = mask.long().argmax(1)[:, None], mask.shape[1]
        column, virtual = torch.arange(columns, device=mask.device)[None], virtual[:, None]
        source = torch.where(column < first, column, column - virtual).clamp(0, length - 1)
        wide = torch.where((column >= first) & (column < first + virtual), 1, mask.gather(1, source))
        given["encoder_attention_mask"] = torch.where(column >= length + virtual, 0, wide)

    def _check_cache(self, cache: Any, blends: list[Blend]) -> None:
        if cache is None or not columns(cache):
            return
        tag = self._caches.get(cache)
        if tag is not None and tag != _spread(blends, len(tag)):
            raise UsageError("the cache was filled under another route", "Use a new cache for a new route.")

    def _tag_cache(self, cache: Any, blends: list[Blend]) -> None:
        if cache is not None and not isinstance(cache, (tuple, list, Tensor)):
            self._caches[cache] = list(blends)

    def _bind_checkpoints(self, route: Route, call: PaddedCall | PackedCall) -> None:
        """Recomputation runs during backward, when the call is over: each checkpoint takes it along."""
        for module in self._checkpointed:
            original = module.__dict__.get("_gradient_checkpointing_func")
            if original is not None and not hasattr(original, "bound_by_inlay"):
                module._gradient_checkpointing_func = _Rebound(original, self)  # pyright: ignore
                self._rebound[module] = original

    @contextmanager
    def again(self, call: Any) -> Iterator[None]:
        """Enter `call` once more."""
        with self.bank.in_force(call.route) if call is not None else nullcontext(), self._inside(call):
            yield

    @contextmanager
    def _inside(self, call: PaddedCall | PackedCall | None) -> Iterator[None]:
        """Make `call` the current one, with everything that stands in for the base's own while it lasts."""
        attends = call is not None and call.attends
        with (
            entered(call),
            taken_over(self.configs) if attends else nullcontext(),
            in_place(self._twins) if call is not None and call.fused else nullcontext(),
        ):
            yield


class _Rebound:
    """A checkpointing function whose recomputation sees the call it was made in."""

    bound_by_inlay = True

    def __init__(self, original: Any, hooks: CallHooks) -> None:
        self.original, self.hooks = original, hooks

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        call = current()

        def run(*inner: Any, **named: Any) -> Any:
            with self.hooks.again(call), asleep(function):
                return function(*inner, **named)

        return self.original(run, *args, **kwargs)


def _rows(given: dict[str, Any]) -> int:
    for value in (given.get("input_ids"), given.get("inputs_embeds"), *given.values()):
        if isinstance(value, Tensor):
            return value.shape[0]
    raise UsageError("the base was called without a tensor", "Give input_ids.")


def _entry(out: Any, name: str) -> Any:
    """What `out` holds under `name`; asking transformers' outputs for an older name as an attribute makes them warn."""
    return out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)


def _spread(blends: list[Blend], rows: int) -> list[Blend]:
    return [blend for blend in blends for _ in range(max(1, rows // len(blends)))]


def _narrowed(out: Any, call: PaddedCall | PackedCall) -> Any:
    if isinstance(out, Tensor):
        return call.narrow(out)
    if isinstance(out, tuple):
        return (call.narrow(out[0]), *out[1:])
    out.last_hidden_state = call.narrow(out.last_hidden_state)
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(call.narrow(states) for states in out.hidden_states)
    return out
