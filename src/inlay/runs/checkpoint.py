"""Checkpoints: one safetensors file each, whole or not there, of which the last few are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inlay.errors import FormatError
from inlay.files import written_beside

from .state import pack, unpack

__all__ = ["Checkpoints"]


@dataclass
class Checkpoints:
    """The folder of a run's checkpoints, `step-00000040.safetensors` for the state after step 40."""

    folder: Path
    keep: int = 2

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Keep `state` (numbers, words, tensors, nested) under `step`; older ones go once it is on the disk."""
        tensors: dict[str, Tensor] = {}
        words = json.dumps(pack(state, tensors), sort_keys=True)
        content = json.dumps({"digest": _digest(words, tensors), "state": words})
        with written_beside(self.folder / f"step-{step:08d}.safetensors") as beside:
            save_file(tensors, beside, metadata={"inlay": content})
        for old in self.files()[: -self.keep]:
            old.unlink()

    def newest(self, on_message: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest state that is whole; `on_message` is told of those that are not. None where there is none."""
        for file in reversed(self.files()):
            try:
                return _read(file)
            except FormatError as error:
                on_message(f"{error} Going back to the one before.")
                file.unlink()
        return None

    def files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))


def _read(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, "pt") as opened:
            content = json.loads((opened.metadata() or {})["inlay"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        whole = content["digest"] == _digest(content["state"], tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise FormatError(f"checkpoint {file} cannot be read ({type(error).__name__})") from None
    if not whole:
        raise FormatError(f"checkpoint {file} is damaged")
    return unpack(json.loads(content["state"]), tensors)


def _digest(words: str, tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(words.encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            found.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
    return found.hexdigest()
