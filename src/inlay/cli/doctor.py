"""inlay doctor"""

from __future__ import annotations

import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import typer

from .common import Json, console, emit, guarded

NEEDED = ("torch", "transformers", "safetensors", "tokenizers", "gguf", "pyarrow")
EXTRAS = {
    "accelerate": "track", "tensorboard": "track", "lion-pytorch": "optimizers", "schedulefree": "optimizers",
    "bitsandbytes": "quantize", "torchao": "optimizers, quantized bases", "peft": "checking against it",
}  # fmt: skip


def command(json: Json = False) -> None:
    """Look at this machine: what is installed, what it can do, and what will be chosen by default."""
    with guarded():
        with console.status("looking"):
            found, troubles = _looked()
        if json:
            emit({**found, "troubles": troubles}, True)
        else:
            emit(found, False)
            for trouble in troubles:
                console.print(f"[red]✗[/red] {trouble}", highlight=False)
            if not troubles:
                console.print("[green]✓[/green] ready", highlight=False)
        if troubles:
            raise typer.Exit(1)


def _looked() -> tuple[dict[str, Any], list[str]]:
    versions, troubles = {}, []
    for package in NEEDED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            troubles.append(f"{package} is missing: pip install inlay")
    extras = {}
    for package, use in EXTRAS.items():
        try:
            extras[package] = version(package)
        except PackageNotFoundError:
            extras[package] = f"not installed ({use})"
    home = _home(troubles)
    free = shutil.disk_usage(home).free / 2**30
    memory = psutil.virtual_memory()
    if free < 2:
        troubles.append(f"{home} has {free:.1f} GB left: bases need room, set INLAY_HOME")
    if memory.available < 2 * 2**30:
        troubles.append(f"{memory.available / 2**30:.1f} GB of memory is free: close something")
    found: dict[str, Any] = {
        "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
        "versions": versions, "extras": extras, "cores": os.cpu_count(), "memory_gb": round(memory.total / 2**30, 1),
        "memory_free_gb": round(memory.available / 2**30, 1), "cache": str(home), "cache_free_gb": round(free, 1),
    }  # fmt: skip
    if "torch" in versions:
        found |= _machine(troubles)
    return found, troubles


def _home(troubles: list[str]) -> Path:
    """The cache folder, or the nearest one above it that is there."""
    from inlay.bases.cache import home

    folder = home()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        troubles.append(f"{folder} cannot be written to: set INLAY_HOME to a folder of yours")
    return folder


def _machine(troubles: list[str]) -> dict[str, Any]:
    """Device, default dtype and threads, and how fast matrices are multiplied in it."""
    import torch

    from inlay.bases.dtypes import pick_device, pick_dtype

    device = pick_device(None)
    dtype = pick_dtype("auto", device)
    n = 1024
    x = torch.randn(n, n).to(device, dtype)
    times, y = [], x
    for _ in range(5):
        start = time.perf_counter()
        y = x @ x
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if not bool(y.isfinite().all()):
        troubles.append(f"matrix products in {dtype} give numbers that are none: use --dtype float32")
    name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    return {
        "device": name, "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "gflops": round(2 * n**3 / min(times) / 1e9),
    }  # fmt: skip
