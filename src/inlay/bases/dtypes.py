"""Which number format a base is loaded in, and where."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from inlay.errors import UsageError

__all__ = ["DTYPES", "pick_device", "pick_dtype"]

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
BF16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
"""What processors that multiply bfloat16 themselves call it: x86 the first two, arm the rest."""


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, else a GPU where there is one, else the CPU.

    Raises: UsageError where the name is not a device's or the machine has no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"device {str(device)!r} cannot be used ({why})", "Choose cpu, or leave it out.") from None
    return chosen


def pick_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 where the processor or GPU computes in it natively, else float32.

    Raises: UsageError naming the choices.
    """
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not known", f"Choose one of {', '.join(DTYPES)}.")
    if name != "auto":
        return getattr(torch, name)
    place = torch.device(device)
    native = {"cuda": _gpu_has_bf16, "cpu": lambda _: _cpu_has_bf16()}.get(place.type, lambda _: False)
    return torch.bfloat16 if native(place) else torch.float32


def _gpu_has_bf16(device: torch.device) -> bool:
    """Native only: before Ampere, NVIDIA GPUs emulate bfloat16, slower than float32."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself (x86 AVX512-BF16 or AMX-BF16, arm bf16)."""
    ask = getattr(torch.cpu, "get_capabilities", dict)  # newer torch only; it knows processors without /proc
    said = {str(key) for key, value in ask().items() if value is True}
    return bool(BF16 & (said | _cpuinfo_flags())) or _mac_has_bf16()


def _cpuinfo_flags() -> set[str]:
    """The feature words of the first processor, empty where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace")
    except OSError:
        return set()
    lines = (line.partition(":") for line in text.splitlines())
    return next((set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")), set())


def _mac_has_bf16() -> bool:
    if platform.system() != "Darwin":
        return False
    command = ["/usr/sbin/sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == "1"
    except OSError:
        return False
