"""Which number format a base is loaded in."""

from __future__ import annotations

from pathlib import Path

import torch

from inlay.errors import UsageError

__all__ = ["DTYPES", "pick_device", "pick_dtype"]

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, else a GPU where there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def pick_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 where the processor or GPU computes in it natively, else float32."""
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not known", f"Choose one of {', '.join(DTYPES)}.")
    if name != "auto":
        return getattr(torch, name)
    on_gpu = torch.device(device).type == "cuda"
    native = torch.cuda.get_device_capability()[0] >= 8 if on_gpu else _cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself (x86 AVX512-BF16 or AMX, arm bf16)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace")
    except OSError:
        return False
    flags = set(
        next((line.split(":")[1] for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split()
    )
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
