"""Folders of adapters, whichever library wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from inlay.errors import UsageError
from inlay.methods.contract import Structure

from .adapterhub import is_adapterhub, read_adapterhub
from .adapterhub_fusion import read_fusion, setup_of
from .folder_kinds import FUSION, fusion_of, is_fusion
from .notes import read_notes
from .parts import SavedPart
from .peft import Stored, read_config, read_peft

__all__ = ["base_of", "folders_inside", "read_folder"]


def read_folder(
    folder: Path, base: Structure, task: int | None = None, others: Mapping[str, Sequence[SavedPart]] | None = None
) -> list[Stored]:
    """The methods of a folder, the parts of one adapter, with their tensors, checked against `base`; `task` is which of
    the tasks of a prompt that has several, `others` the adapters that it may be over.

    Raises: UsageError where there is no adapter; FormatError naming what is missing, extra or misshapen.
    """
    fusion = is_fusion(folder)
    config = {} if fusion else read_config(folder)
    if not fusion and not is_adapterhub(config):
        return read_peft(folder, base, task)
    if task is not None:
        raise UsageError(f"{folder} holds no prompt that several tasks share", "Leave task out.")
    return read_fusion(folder, base, others or {}) if fusion else read_adapterhub(folder, config, base)


def folders_inside(folder: Path) -> list[str]:
    """The folders of the adapters that one which is over them has inside of its own: they are read first.

    Raises: FormatError where AdapterHub's setup in `folder` is no fusion.
    """
    return setup_of(folder) if is_fusion(folder) else []


def base_of(folder: Path) -> str:
    """The base that an adapter was trained on, by what its files say; "" where they do not."""
    config = read_config(fusion_of(folder), FUSION) if is_fusion(folder) else read_config(folder)
    named = (read_notes(folder).base, config.get("base_model_name_or_path"), config.get("model_name"))
    return next((name for name in named if isinstance(name, str) and name), "")
