"""The head that AdapterHub saves beside an adapter: that of a transformers model, or one of its own."""

from __future__ import annotations

from pathlib import Path

from inlay.errors import FormatError
from inlay.methods.contract import Structure

from .names import true_names
from .parts import ROOT
from .peft import Stored
from .tensors import read_tensors
from .weights import taken_weights

__all__ = ["read_head"]

CONFIG = "head_config.json"
FILES = ("model_head.safetensors", "pytorch_model_head.bin")
ALONE = f"Open the base with that head, or take {CONFIG} out of the folder to load the adapter alone."


def read_head(folder: Path, base: Structure) -> Stored | None:
    """The base's own head as it was trained with the adapter in `folder`; None where there is none, or it is the
    base's. Raises: FormatError where the base has no such head."""
    if not (folder / CONFIG).is_file():
        return None
    file = next((folder / one for one in FILES if (folder / one).is_file()), None)
    if file is None:
        raise FormatError(f"{folder} holds {CONFIG} but no {FILES[0]}", "The checkpoint is not whole.")
    stored = true_names({ROOT + key: value for key, value in read_tensors(file).items()}, base, str(file))
    found = taken_weights(stored, base, str(file))
    if stored:
        first = next(iter(stored)).removeprefix(ROOT)
        kind = "a head of AdapterHub's own" if first.startswith("heads.") else "a head that the base does not have"
        raise FormatError(f"{file} holds {first!r}, of {kind}", ALONE)
    return found
