"""Records the kernels that a GPU runs, and tells whether they do again what they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["near", "record"]


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


def near(ours: Tensor, expected: Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    bound = max(8 * torch.finfo(expected.dtype).eps, 1e-5)
    off = (ours.double() - expected.double()).norm()
    return bool(ours.isfinite().all()) and bool(off <= bound * expected.double().norm())
