"""What a launcher such as torchrun says of this process, and what of the machine is then its own."""

from __future__ import annotations

import os
from dataclasses import dataclass

from inlay.errors import UsageError

__all__ = ["Place", "check_one_process", "memory_limit", "own_device", "place"]

REMEDY = "Start them with torchrun, or unset WORLD_SIZE."
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """This process is number `rank` of `size`, and number `local` of the `beside` on its machine."""

    rank: int
    size: int
    local: int
    beside: int


def place() -> Place | None:
    """What a launcher such as torchrun says of this process (in its environment); None where it is the only one.

    Raises: UsageError where it is one of several, and not all is said that they need to find one another.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or int(size) <= 1:
        return None
    if lacking := [name for name in NEEDED if not os.environ.get(name)]:
        raise UsageError(f"{size} processes were started (WORLD_SIZE), and {', '.join(lacking)} is not set", REMEDY)
    try:
        numbers = [int(os.environ.get(n) or usual) for n, usual in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))]
        return Place(int(os.environ["RANK"]), int(size), *numbers)
    except ValueError:
        raise UsageError("RANK, LOCAL_RANK or LOCAL_WORLD_SIZE is no number", REMEDY) from None


def check_one_process(doing: str) -> None:
    """Raises: UsageError where several processes were started for what one does."""
    if (here := place()) is not None:
        raise UsageError(
            f"{here.size} processes were started (WORLD_SIZE), and {doing} is the work of one", "Start it alone."
        )


def own_device(device: str | None) -> str | None:
    """The device of this process, where `device` is that of the run: of several processes, each has a GPU of its own.

    Raises: UsageError where one GPU is named for several processes, or there are fewer GPUs.
    """
    import torch

    here = place()
    if here is None or (device is None and not torch.cuda.is_available()):
        return device
    if device is not None and not device.startswith("cuda"):
        return device
    if device not in (None, "cuda"):
        raise UsageError(f"{here.size} processes cannot share the device {device}", "Give --device cuda, or cpu.")
    cards = torch.cuda.device_count()
    if here.beside > cards > 0:
        what = f"{here.beside} processes were started here, and there are {cards} GPUs"
        raise UsageError(what, f"Start {cards} (--nproc-per-node {cards}), or give --device cpu.")
    return f"cuda:{here.local}"


def memory_limit(text: str | None) -> float | None:
    """The limit of this process's memory in MiB that --memory-limit says; "auto" leaves the others here as much.

    Raises: UsageError.
    """
    from inlay.runtime.memory import current_memory_mb, parse_size

    limit, here = parse_size(text), place()
    if limit is None or text != "auto" or here is None:
        return limit
    now = current_memory_mb()
    return now + (limit - now) / here.beside
