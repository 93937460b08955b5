"""Folders of adapters, whichever library wrote them."""

from __future__ import annotations

from pathlib import Path

from inlay.errors import UsageError
from inlay.methods.contract import Structure

from .adapterhub import is_adapterhub, read_adapterhub
from .notes import read_notes
from .peft import Stored, read_config, read_peft

__all__ = ["base_of", "read_folder"]


def read_folder(folder: Path, base: Structure, task: int | None = None) -> list[Stored]:
    """The methods of a folder, the parts of one adapter, with their tensors, checked against `base`; `task` is which of
    the tasks of a prompt that has several.

    Raises: UsageError where there is no adapter; FormatError naming what is missing, extra or misshapen.
    """
    config = read_config(folder)
    if not is_adapterhub(config):
        return read_peft(folder, base, task)
    if task is not None:
        raise UsageError(f"{folder} holds no prompt that several tasks share", "Leave task out.")
    return read_adapterhub(folder, config, base)


def base_of(folder: Path) -> str:
    """The base that an adapter was trained on, by what its files say; "" where they do not."""
    config = read_config(folder)
    named = (read_notes(folder).base, config.get("base_model_name_or_path"), config.get("model_name"))
    return next((name for name in named if isinstance(name, str) and name), "")
