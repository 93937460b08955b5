"""inlay doctor"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

import inlay

from .common import Json, console, emit, guarded

T = TypeVar("T")
MODULES = {"pyyaml": "yaml"}
"""Packages that are imported by another name."""
LEAST_MEMORY, LEAST_DISK = 1.5, 1.0
"""GB below which the default base hardly trains or does not come in."""


class Findings:
    """What was found, and what is wrong with it, in words for people."""

    def __init__(self) -> None:
        self.troubles: list[str] = []
        self._causes: set[str] = set()

    def tried(self, work: Callable[[], T], trouble: str, remedy: str) -> T | None:
        """The result of `work`; None, and a trouble that says why, where it fails in whatever way."""
        try:
            return work()
        except Exception as error:  # what is looked for is exactly what nobody foresaw
            why = next((line.strip() for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
            if why not in self._causes:  # what a broken library breaks in others is said once, of itself
                self._causes.add(why)
                self.troubles.append(f"{trouble} ({why[:200]}). {remedy}")
            return None


def command(json: Json = False) -> None:
    """Look at this machine: what is installed, whether it works, and what will be chosen by default."""
    with guarded("looking at this machine"):
        with console.status("looking"):
            found, troubles = _looked()
        if json:
            emit({**found, "troubles": troubles}, True)
        else:
            Console(highlight=False).print(_shown(found, troubles))
        if troubles:
            raise typer.Exit(1)


def _looked() -> tuple[dict[str, Any], list[str]]:
    seen = Findings()
    found: dict[str, Any] = {
        "inlay": inlay.__version__, "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(),
        "versions": _libraries(seen), "extras": _extras(seen),
    }  # fmt: skip
    for what, part in (("memory and disk", _memory), ("the device", _machine), ("pip", _fetching)):
        trouble, remedy = f"{what} cannot be looked at", "Mend what else is named first."
        found |= seen.tried(lambda part=part: part(seen), trouble, remedy) or {}
    return found, seen.troubles


# ---- libraries


def _libraries(seen: Findings) -> dict[str, str]:
    """Versions of what a plain installation brings; whether each is there, new enough, and does its job."""
    from inlay.bases.extras import plain_packages

    listed = sorted(plain_packages(), key=lambda line: (not line.startswith(("torch", "transformers")), line))
    if not listed:
        seen.troubles.append("inlay itself is not installed, only found. Run pip install -e . in its folder")
    return {name: said for line in listed for name, said in [_library(seen, line)] if said}


def _library(seen: Findings, requirement: str) -> tuple[str, str]:
    """Name and version, "" where it is missing."""
    from .jobs import JOBS

    name, needed = _split(requirement)
    try:
        own = version(name)
    except PackageNotFoundError:
        seen.troubles.append(f"{name} is missing. Run pip install '{requirement}'")
        return name, ""
    if not _fits(own, needed):
        seen.troubles.append(f"{name} {own} does not fit. Run pip install '{requirement}'")
    work = JOBS.get(name) or (lambda: importlib.import_module(_module(name)))
    seen.tried(work, f"{name} {own} does not work", f"Run pip install --force-reinstall '{requirement}'.")
    return name, own


def _extras(seen: Findings) -> dict[str, Any]:
    """Of each extra: what it is for, the versions that are there, and what is missing."""
    from inlay.bases.extras import EXTRAS, extra_packages

    found = {}
    for extra, use in EXTRAS.items():
        there: dict[str, str] = {}
        missing: list[str] = []
        for requirement in extra_packages(extra):
            name, _ = _split(requirement)
            try:
                there[name] = version(name)
            except PackageNotFoundError:
                missing.append(requirement)
                continue
            remedy = f"Repair or remove it: pip install --force-reinstall '{requirement}'."
            seen.tried(lambda n=name: importlib.import_module(_module(n)), f"{name} cannot be imported", remedy)
        found[extra] = {"for": use, "versions": there, "missing": missing}
    return found


def _split(requirement: str) -> tuple[str, str]:
    """ "torch>=2.6" as name and bounds."""
    name = requirement
    for sign in "<>=!~[; ":
        name = name.partition(sign)[0]
    return name, requirement.removeprefix(name)


def _fits(own: str, needed: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(needed.partition(";")[0]).contains(own, prereleases=True)
    except Exception:  # an odd version is no reason to say that it does not fit
        return True


def _module(package: str) -> str:
    return MODULES.get(package, package.replace("-", "_"))


# ---- the machine


def _memory(seen: Findings) -> dict[str, Any]:
    """Memory, and the cache with the disk below it."""
    import psutil

    from inlay.bases.cache import home
    from inlay.bases.memory import free_memory

    memory = psutil.virtual_memory()
    free = free_memory()
    if free < LEAST_MEMORY * 2**30:
        seen.troubles.append(f"{free / 2**30:.1f} GB of memory is free, training wants more. Close something")
    found: dict[str, Any] = {
        "memory_gb": round(memory.total / 2**30, 1), "memory_free_gb": round(free / 2**30, 1),
    }  # fmt: skip
    folder = seen.tried(home, "there is no cache", "Set INLAY_HOME to a folder of yours.")
    if folder is None:
        return found
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        seen.troubles.append(
            f"{there} cannot be written to, and {folder} is there. Set INLAY_HOME to a folder of yours"
        )
    disk = shutil.disk_usage(there).free / 2**30
    if disk < LEAST_DISK:
        seen.troubles.append(f"{there} has {disk:.1f} GB left, bases need room. Free some, or set INLAY_HOME")
    return found | {"cache": str(folder), "cache_free_gb": round(disk, 1), "bases": _bases(folder)}


def _bases(folder: Path) -> list[str]:
    """Names of what has been fetched or converted."""
    kept = folder / "bases"
    return sorted(path.name for path in kept.iterdir() if not path.name.startswith(".")) if kept.is_dir() else []


def _machine(seen: Findings) -> dict[str, Any]:
    """Device, default dtype and threads, and how fast products are in float32 and bfloat16."""
    import torch

    from inlay.bases.dtypes import dtype_name, pick_device, pick_dtype
    from inlay.bases.measure import speeds

    device = pick_device(None)
    chosen = pick_dtype("auto", device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
    found: dict[str, Any] = {"device": name, "dtype": dtype_name(chosen), "threads": torch.get_num_threads()}
    if device.type != "cpu":
        return found
    measured = {key: round(value, 1) for key, value in speeds().items()}
    return found | {"gflops": measured[found["dtype"]], "gflops_a_core": measured}


def _fetching(seen: Findings) -> dict[str, Any]:
    from .jobs import pip_version

    remedy = "Without it, smollm2 and the reviews cannot be fetched: run python -m ensurepip."
    return {"pip": seen.tried(pip_version, "pip cannot be used", remedy)}


# ---- for people


def _shown(found: dict[str, Any], troubles: list[str]) -> Group:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("inlay", f"{found['inlay']}, Python {found['python']}, {found['system']}")
    grid.add_row("libraries", ", ".join(f"{name} {own}" for name, own in found["versions"].items()) or "none")
    for extra, own in found["extras"].items():
        said = Text(", ".join(f"{name} {number}" for name, number in own["versions"].items()))
        if own["missing"]:
            install = " ".join(f"'{package}'" for package in own["missing"])
            said.append(f"{'; ' if said else ''}for {own['for']}: pip install {install}", style="dim")
        grid.add_row(f"extra {extra}", said)
    if "device" in found:
        grid.add_row("computes on", f"{found['device']}, {found['threads']} threads, {found['cores']} cores")
        speed = ", ".join(f"{name} {number:,.0f}" for name, number in found.get("gflops_a_core", {}).items())
        grid.add_row("--dtype auto", found["dtype"] + (f" (GFLOP/s of one core: {speed})" if speed else ""))
    if "memory_gb" in found:
        grid.add_row("memory", f"{found['memory_free_gb']} of {found['memory_gb']} GB free")
    if "cache" in found:
        held = ", ".join(found["bases"]) or "no base yet"
        grid.add_row("cache", Text(f"{found['cache']}, {found['cache_free_gb']} GB free, holds {held}"))
    grid.add_row("pip", found.get("pip") or "none")
    marks = [Text.assemble(("✗ ", "bold red"), trouble) for trouble in troubles]
    return Group(grid, "", *(marks or [Text.assemble(("✓ ", "bold green"), "ready")]))
