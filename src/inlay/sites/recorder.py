"""Hooks that write down what the modules of a base do in one forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .attention import QKV, handled_by, unwatch, watch
from .several import value_heads
from .site import Site
from .streams import Streams, chosen

__all__ = ["Call", "HeadShape", "Recorder", "first_tensor"]


@dataclass(frozen=True)
class Call:
    """How a module was called: `inputs` tensors by position or name, `times` times; it `gives` a "tensor", or what its
    result is else. Shapes are those of its first input, in `shapes` at every call, and of the first tensor it gave;
    `turn` counts the calls of all modules up to its last one's end.
    """

    inputs: int
    gives: str
    times: int
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    turn: int
    shapes: frozenset[tuple[int, ...]] = frozenset()


@dataclass(frozen=True)
class HeadShape:
    """Heads of a layer's keys, and the widths of a head's keys and values; `keys_of` is the path of the attention that
    made them, where it was another; all heads are those of the first `heads / repeats`, over and over. Of layers that
    compute attention several times, `value_heads` says which heads of a cache's values each time reads, None if that
    was not seen."""

    heads: int
    head_dim: int
    value_dim: int
    keys_of: str = ""
    repeats: int = 1
    value_heads: tuple[tuple[int, ...], ...] | None = ()


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor of a call, those given by position first."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


class Recorder:
    """Writes down `calls` and `heads`, and what its methods give, of the forward that runs inside `watching`.

    `ends` are modules that may give what attention or MLP adds to the residual stream.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, int],
        linear: list[Site],
        tables: list[Site],
        norms: list[Site],
        ends: list[Site],
    ) -> None:
        self.model, self.blocks = model, {model.get_submodule(path): path for path in blocks}
        self.paths = {module: path for path, module in model.named_modules()}
        self.linear = {site.module: site.path for site in linear}
        self.tables = {site.module: site.path for site in tables}
        self._shown = (blocks, ends, linear, norms)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.calls: dict[str, Call] = {}
        self.heads: dict[nn.Module, HeadShape] = {}
        self._read: dict[nn.Module, list[Tensor]] = {}  # values that the attention which runs has read so far
        self._keys: dict[object, tuple[str, Tensor]] = {}  # who made them; held, so that no two lie in one place
        self.reads = _Reads([*self.linear, *self.tables])
        self._traces = Streams(*self._shown)
        self._readers: dict[object, tuple[Tensor, list[str]]] = {}  # readers of each tensor of the block that runs
        self._groups: dict[str, tuple[str, ...]] = {}
        self._turn = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        self._thread = threading.get_ident()
        sign = nn.Module()  # a watch of our own, so that one of somebody else's stays
        try:
            for module in self.paths:
                handles.append(module.register_forward_pre_hook(self._entering, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leaving, with_kwargs=True))
            watch(sign)
            with handled_by(self), _Reading(self):
                yield
        finally:
            unwatch(sign)
            for handle in handles:
                handle.remove()

    def streams(self) -> tuple[list[str], dict[str, nn.Module]]:
        """Paths of the modules that end a part of a block, and where the stream is that theirs is added to."""
        blocks, ends, _, _ = self._shown
        turns = {path: call.turn for path, call in self.calls.items()}
        paths = chosen(ends, blocks, turns, self._traces.summed)
        return paths, {path: module for path, module in self._traces.found.items() if path in paths}

    def same_input(self) -> dict[str, tuple[str, ...]]:
        return {path: group for path, group in self._groups.items() if len(group) > 1}

    def unusable(self) -> dict[str, str]:
        """Why hooks on a linear layer or a table do not act, for those where that was seen."""
        found: dict[str, str] = {}
        for module, path in (*self.linear.items(), *self.tables.items()):
            call = self.calls.get(path)
            if call is not None and call.gives != "tensor":
                found[path] = f"gives a {call.gives} instead of a tensor"
            elif call is None and module in self.reads.outside:
                found[path] = "is not called: the base reads its weight"
            elif module in self.reads.multiplied:
                found[path] = "is called, but has its weight multiplied elsewhere too"
        return found

    # ---- attention, as a handler

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        k = qkv[1]
        maker = self._keys.setdefault((k.data_ptr(), k.shape), (self.paths.get(module, ""), k))[0]
        own = maker == self.paths.get(module, "")
        self.heads[module] = HeadShape(k.shape[1], k.shape[3], qkv[2].shape[3], "" if own else maker, _repeats(k))
        self._read.setdefault(module, []).append(qkv[2])
        return plain(module, *qkv, mask, **rest)

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        return plain(**call)

    # ---- modules

    def _entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return  # somebody else's forward
        self.reads.enter(module)
        x = first_tensor(args, kwargs)
        if module in self.blocks:
            self._readers.clear()
            self._traces.begin_block()
        elif x is not None and module in self.linear:
            key = (x.data_ptr(), x.shape, x.stride(), x.dtype, 0 if x.is_inference() else x._version)
            readers = self._readers.setdefault(key, (x, []))[1]
            if (path := self.linear[module]) not in readers:
                readers.append(path)
        self._traces.entering(module, x)

    def _leaving(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self.reads.leave(module)
        if len(values := self._read.pop(module, ())) > 1:
            self.heads[module] = replace(self.heads[module], value_heads=value_heads(module, kwargs, values))
        self._turn += 1
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        first = out if isinstance(out, Tensor) else first_tensor(_values(out), {})
        path = self.paths[module]
        shape = _shape(inputs[:1])
        shapes = frozenset(() if shape is None else (shape,))
        if path in self.calls:
            call = self.calls[path]
            self.calls[path] = replace(call, times=call.times + 1, turn=self._turn, shapes=call.shapes | shapes)
        else:
            gives = "tensor" if isinstance(out, Tensor) else type(out).__name__
            self.calls[path] = Call(len(inputs), gives, 1, shape, _shape([first]), self._turn, shapes)
        self._traces.leaving(module, inputs[0] if inputs else None, first)
        if module in self.blocks:
            self._traces.end_block(first)
            self._end_block()

    def _end_block(self) -> None:
        """Linear layers of one block that read the same tensor are a group, if they do so whenever it runs."""
        for _, readers in self._readers.values():
            for path in readers:
                before = self._groups.get(path, tuple(readers))
                self._groups[path] = tuple(p for p in before if p in readers)
        self._readers.clear()


PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "einsum", "multi_head_attention_forward")
"""Functions that compute with a weight; others, such as a rescaling of it, are no affair of an adapter's."""


class _Reads:
    """Which weights are read outside of their module's own forward."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._owners: dict[int, nn.Module | None] = {}
        for module in modules:
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter):  # of tied ones nobody can say whose is read
                self._owners[id(weight)] = None if id(weight) in self._owners else module
        self.outside: set[nn.Module] = set()
        self.multiplied: set[nn.Module] = set()
        self._inside: list[nn.Module] = []

    def enter(self, module: nn.Module) -> None:
        self._inside.append(module)

    def leave(self, module: nn.Module) -> None:
        while self._inside and self._inside.pop() is not module:
            pass

    def saw(self, value: Any, function: str) -> None:
        owner = self._owners.get(id(value)) if isinstance(value, nn.Parameter) else None
        if owner is not None and owner not in self._inside:
            self.outside.add(owner)
            if function in PRODUCTS:
                self.multiplied.add(owner)


class _Reading(TorchFunctionMode):
    """Shows a recorder each weight that goes into a computation."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) or (isinstance(out, tuple) and any(isinstance(o, Tensor) for o in out)):
            for value in (*args, *(kwargs or {}).values()):
                self.recorder.reads.saw(value, getattr(func, "__name__", ""))
        return out


def _repeats(k: Tensor) -> int:
    """How many times the same heads stand side by side in keys (B, heads, n, dim)."""
    counts = (n for n in range(k.shape[1], 1, -1) if k.shape[1] % n == 0)
    return next((n for n in counts if torch.equal(k, k[:, : k.shape[1] // n].repeat(1, n, 1, 1))), 1)


def _values(out: Any) -> tuple[Any, ...]:
    if isinstance(out, Mapping):
        return tuple(out.values())
    return tuple(out) if isinstance(out, (tuple, list)) else ()


def _shape(tensors: list[Any]) -> tuple[int, ...] | None:
    return tuple(tensors[0].shape) if tensors and isinstance(tensors[0], Tensor) else None
