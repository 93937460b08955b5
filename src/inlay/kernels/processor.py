"""What the machine's processor is, where that decides which of two equal products is the quicker one."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

__all__ = ["amd", "has_onednn", "wide_vectors"]


@cache
def amd() -> bool:
    """An AMD processor: MKL, which torch's float32 products go to, was made for another's."""
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf8")
    except OSError:
        said = platform.processor()
    return "AuthenticAMD" in said


@cache
def wide_vectors() -> bool:
    """AVX-512: with less, torch sums bags of half precision more slowly than it multiplies."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


@cache
def has_onednn() -> bool:
    """oneDNN's product of a plain weight, which torch's compiler calls too, can be called."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
