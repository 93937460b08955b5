"""How fast this machine computes in float32 and in bfloat16, measured for a moment, once, and kept in the cache.

Flags of a processor do not say it: with AVX512-BF16 alone some are slower in bfloat16 than in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import InlayError
from inlay.files import write_json

from .cache import home

__all__ = ["Speeds", "dtype_name", "shape_of", "speeds"]

Speeds = dict[str, float]
"""GFLOP a second of one core, by the dtype's name."""

TOKENS = 512
SECONDS = 0.25
"""Of measuring, both dtypes together."""
HOPELESS = 4
"""Where bfloat16 takes so many times as long on a few tokens, no more are measured."""
USUAL = (576, 1536)
LEAST, MOST = 256, 2048
"""Of hidden sizes: below, calls cost more than products; above, larger products are as fast for each number."""
KEPT = 64

_seen: dict[str, Speeds] = {}


def speeds(config: Mapping[str, Any] | None = None) -> Speeds:
    """GFLOP/s of one core in float32 and in bfloat16, at the size of the products in the base of `config`.

    Measured where the cache does not know it, in about half a second. A cache that is broken or cannot be written to
    means measuring again.
    """
    hidden, inner = shape_of(config)
    key = f"{_processor()}; torch {torch.__version__}; {hidden} x {inner}"
    if key not in _seen:
        known = _cached()
        found = known.get(key)
        if found is None:
            found = _measured(hidden, inner)
            known[key] = found
            with suppress(OSError, InlayError):
                write_json(_file(), {"gflops": dict(list(known.items())[-KEPT:])})
        _seen[key] = found
    return dict(_seen[key])


def shape_of(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """Hidden and intermediate size that a config names, cut to what is worth measuring."""
    config = config or {}
    inside = config.get("text_config")
    settings = {**config, **inside} if isinstance(inside, Mapping) else config
    hidden = _first(settings, ("hidden_size", "n_embd", "d_model", "dim"))
    if hidden is None:
        return USUAL
    inner = _first(settings, ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim")) or 4 * hidden
    return min(MOST, max(LEAST, hidden)), min(2 * MOST, max(LEAST, inner))


def dtype_name(dtype: torch.dtype) -> str:
    """The name that `--dtype` takes: float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def _first(settings: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    values = (settings.get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


# ---- measuring


def _measured(hidden: int, inner: int) -> Speeds:
    """Both dtypes by turns, the best of each, on one thread: other work on the machine slows single turns down, and
    threads that wait for one another most of all."""
    # oneDNN listens to this at the first products of a process; training, which asks for it too, comes later.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _raced(hidden, inner)
    finally:
        torch.set_num_threads(threads)


def _raced(hidden: int, inner: int) -> Speeds:
    tokens = max(64, min(TOKENS, int(2.5e9 / (6 * hidden * inner))))
    layers = {dtype: _layer(dtype, hidden, inner) for dtype in (torch.float32, torch.bfloat16)}
    small = {dtype: min(_timed(layer, 32) for _ in range(3)) for dtype, layer in layers.items()}
    if small[torch.bfloat16] > HOPELESS * small[torch.float32]:
        best, tokens = small, 32
    else:
        best = dict.fromkeys(layers, math.inf)
        started = time.perf_counter()
        for turn in range(50):
            took = {dtype: _timed(layer, tokens) for dtype, layer in layers.items()}
            if turn:  # the first one prepares the kernels
                best = {dtype: min(best[dtype], took[dtype]) for dtype in layers}
            if turn and time.perf_counter() - started > SECONDS:
                break
    work = 12 * tokens * hidden * inner  # three products there and back, of a multiplication and an addition each
    return {dtype_name(dtype): work / took / 1e9 for dtype, took in best.items()}


def _layer(dtype: torch.dtype, hidden: int, inner: int) -> list[Tensor]:
    return [torch.full(size, 0.01, dtype=dtype) for size in ((inner, hidden), (inner, hidden), (hidden, inner))]


def _timed(layer: list[Tensor], tokens: int) -> float:
    """Seconds that a frozen gated MLP takes, forward and backward: what most of a base's time goes into."""
    gate, up, down = layer
    x = torch.full((tokens, gate.shape[1]), 0.01, dtype=gate.dtype, requires_grad=True)
    start = time.perf_counter()
    with torch.enable_grad():
        y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    y.backward(torch.full_like(y, 0.01))
    return time.perf_counter() - start


# ---- what is known of the machine


def _file() -> Path:
    return home() / "machine.json"


def _cached() -> dict[str, Speeds]:
    """What earlier processes measured; nothing of a file that is broken."""
    try:
        saved = json.loads(_file().read_text(encoding="utf8"))["gflops"]
        return {key: {n: float(own[n]) for n in ("float32", "bfloat16")} for key, own in saved.items() if _sound(own)}
    except (OSError, InlayError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _sound(own: Mapping[str, Any]) -> bool:
    return all(isinstance(own[n], float) and 0 < own[n] < math.inf for n in ("float32", "bfloat16"))


def _processor() -> str:
    """The processor's name, and a digest of the instructions that it (or the virtual machine) has."""
    cpu: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            cpu.setdefault(name.strip(), value.strip())
    flags = sorted((cpu.get("flags") or cpu.get("Features") or "").split())
    name = cpu.get("model name") or platform.processor() or platform.machine()
    return f"{name}; {hashlib.sha256(' '.join(flags).encode()).hexdigest()[:8]}"
