"""What a step that goes on does at single modules, once it is known: the calls of hooks take longer than most of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.batch.forward import Forward

from .steps import InputStep, Step

__all__ = ["SPOT", "Ready", "hooked_everywhere", "hooks_around", "note_ready", "ready_at"]

SPOT = "ready"
_everywhere: Any = nn.modules.module
"""Holds the hooks that torch calls for every module."""


@dataclass(frozen=True, eq=False, slots=True)
class Ready:
    """What a bank's hooks do at a module for inputs of one shape and dtype: `change` what it reads, then `step`."""

    shape: torch.Size
    dtype: torch.dtype
    change: InputStep | None
    step: Step

    def fits(self, x: Tensor) -> bool:
        return x.shape == self.shape and x.dtype == self.dtype


def hooked_everywhere() -> bool:
    """Whether torch calls hooks around the modules of all models."""
    return bool(_everywhere._global_forward_hooks or _everywhere._global_forward_pre_hooks)


def hooks_around(module: nn.Module) -> int | None:
    """How many pairs of hooks, one before and one behind, torch calls around a module's forward; None where it calls
    others."""
    before, behind = len(module._forward_pre_hooks), len(module._forward_hooks)
    others = module._backward_hooks or module._backward_pre_hooks
    if before != behind or others or hooked_everywhere():
        return None
    return before


def note_ready(forward: Forward, module: nn.Module, x: Tensor, change: InputStep | None, step: Step) -> None:
    """Say what later steps of the same rows do at a module, where nobody else looks on."""
    spot = SPOT, module
    if spot not in forward.cache and hooks_around(module) == 1:
        forward.cache[spot] = Ready(x.shape, x.dtype, change, step)


def ready_at(forward: Forward, module: nn.Module) -> Ready | None:
    return forward.cache.get((SPOT, module))
