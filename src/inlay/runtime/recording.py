"""Records the kernels that a GPU runs, and tells whether they may be run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bank.hooks import Hook

__all__ = ["hooked", "hooked_everywhere", "near", "record"]


def record(run: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
    """What starts the kernels of `run` again, and the tensor that they write what it gives to."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            made = run()
    except BaseException:
        # The generator of random numbers takes itself to be captured still, and would draw no more.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay, made


def hooked(model: nn.Module) -> bool:
    """Whether others have hooked something onto a model's modules."""
    hooks: Iterable[Any] = (
        hook
        for module in model.modules()
        for own in (module._forward_hooks, module._forward_pre_hooks)
        for hook in own.values()
    )
    return any(not isinstance(hook, Hook) for hook in hooks)


def hooked_everywhere() -> bool:
    """Whether torch calls hooks around the modules of all models."""
    every = nn.modules.module
    return bool(every._global_forward_hooks or every._global_forward_pre_hooks)


def near(ours: Tensor, expected: Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    bound = max(8 * torch.finfo(expected.dtype).eps, 1e-5)
    off = (ours.double() - expected.double()).norm()
    return bool(ours.isfinite().all()) and bool(off <= bound * expected.double().norm())
