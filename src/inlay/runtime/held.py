"""What a forward holds until its backward: what autograd saved, and what its functions keep beside that."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Held", "held_bytes"]


@dataclass(frozen=True)
class Held:
    """Bytes: `saved` for the backward, which grow with the tokens; `beside` them, which are casts of an adapter's
    parameters and what is derived from them, and do not."""

    saved: int
    beside: int


def held_bytes(known: Iterable[Tensor], forward: Callable[[], Tensor], device: torch.device | None = None) -> Held:
    """What `forward` holds when it is over, on `device` (the CPU where it is None). `known` tensors do not count: they
    were there before."""
    own = {p.untyped_storage().data_ptr() for p in known}
    sizes: dict[int, int] = {}
    saved: list[Tensor] = []  # while they live, no two storages share an address

    def note(value: Tensor) -> None:
        # What the graph keeps is nothing: an output that came back whole would hold its own graph, for good.
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            saved.append(value.detach())

    on_gpu = device is not None and device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    living = _Living()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing), nullcontext() if on_gpu else living:
        out = forward()
    total = sum(sizes.values())
    beside = torch.cuda.memory_allocated(device) - before - total if on_gpu else living.total([*sizes, *own])
    del out
    return Held(total, max(0, beside))


class _Living(TorchDispatchMode):
    """Counts the storages that operators make and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for made in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(made, Tensor):
                self._note(made)
        return given

    def _note(self, made: Tensor) -> None:
        try:
            storage = made.untyped_storage()
            address = storage.data_ptr()
        except (RuntimeError, NotImplementedError):  # some tensors of libraries have no storage of their own
            return
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = address, storage.nbytes()
            weakref.finalize(storage, self._sizes.pop, storage._cdata, None)

    def total(self, without: Iterable[int]) -> int:
        """Bytes of those that are at no address of `without`."""
        left_out = set(without)
        return sum(size for address, size in self._sizes.values() if address not in left_out)
