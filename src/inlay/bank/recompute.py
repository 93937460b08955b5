"""Gradient checkpointing while the base stays in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from inlay.errors import UsageError

__all__ = ["asleep", "recomputing"]


@contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Each block keeps its input alone and is computed again in the backward.

    transformers does so in training mode only; the flag is set on the blocks themselves, and `asleep` takes it away
    again inside of them, where it would switch the base's own dropout on.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(f"{type(model).__name__} has no gradient checkpointing", "Lower --tokens-at-once instead.")
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    blocks = blocks or [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    modes = [block.training for block in blocks]
    # Newer releases of transformers have another name for it and warn of the old one.
    enable, disable = (
        getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")
        for what in ("enable", "disable")
    )
    enable({"use_reentrant": False})
    try:
        for block in blocks:
            block.training = True
        yield
    finally:
        disable()
        for block, mode in zip(blocks, modes, strict=True):
            block.training = mode


@contextmanager
def asleep(function: Any) -> Iterator[None]:
    """Evaluation mode for the block whose forward `function` is, where all inside of it are in it already."""
    block = getattr(getattr(function, "func", function), "__self__", None)
    inside = [] if not isinstance(block, nn.Module) else [m for m in block.children()]
    if not isinstance(block, nn.Module) or not block.training or any(child.training for child in inside):
        yield
        return
    block.training = False
    try:
        yield
    finally:
        block.training = True
