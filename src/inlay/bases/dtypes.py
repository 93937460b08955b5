"""Which number format a base is loaded in, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from inlay.errors import UsageError

from .choices import DTYPES
from .measure import dtype_name, speeds
from .memory import free_memory

__all__ = ["DTYPES", "dtype_name", "pick_device", "pick_dtype"]

ROOM = 1.25
"""Of what the weights take: activations and adapters need some too."""


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, else a GPU where there is one, else the CPU.

    Raises: UsageError where the name is not a device's or the machine has no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.ones(1, device=chosen).item()  # the meta device makes tensors, but has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise UsageError(f"device {str(device)!r} cannot be used ({why})", "Choose cpu, or leave it out.") from None
    return chosen


def pick_dtype(
    name: str, device: torch.device | str = "cpu", config: Mapping[str, Any] | None = None, values: int | None = None
) -> torch.dtype:
    """The dtype called `name`. "auto" is the faster one of float32 and bfloat16.

    On a CPU that is measured at the sizes that the base's `config` names (see `measure`), unless the base's `values`
    (numbers in its weights) fit in memory as bfloat16 alone; a GPU has bfloat16 or not. Raises: UsageError naming the
    choices.
    """
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not known", f"Choose one of {', '.join(DTYPES)}.")
    if name != "auto":
        return getattr(torch, name)
    place = torch.device(device)
    if place.type == "cpu":
        return torch.bfloat16 if _too_large(values) or _faster_in_bf16(config) else torch.float32
    return torch.bfloat16 if place.type == "cuda" and _gpu_has_bf16(place) else torch.float32


def _too_large(values: int | None) -> bool:
    """Whether so many numbers, and something to work with, do not fit in memory as float32."""
    return values is not None and 4 * ROOM * values > free_memory()


def _faster_in_bf16(config: Mapping[str, Any] | None) -> bool:
    measured = speeds(config)
    return measured["bfloat16"] > measured["float32"]


def _gpu_has_bf16(device: torch.device) -> bool:
    """Native only: before Ampere, NVIDIA GPUs emulate bfloat16, slower than float32."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
