"""Stands in for a captured CUDA graph on a CPU: what ran is run again on the very tensors, without the Python."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""What needs the values of tensors at once, as a GPU that captures cannot give them."""


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKS:
            raise RuntimeError("operation not permitted while a step is captured")
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            made = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(made), strict=True):
                if isinstance(old, torch.Tensor) and _storage(old) != _storage(new):
                    old.copy_(new)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def record(run: Any, pool: Any) -> Any:
    """In the place of `inlay.runtime.captured.record`."""
    with Tape() as tape:
        made = run()
    return tape.replay, made
