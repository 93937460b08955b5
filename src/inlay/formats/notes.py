"""inlay.json, beside an adapter's own files: what HF PEFT's layout has no place for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from inlay.errors import FormatError, InlayError, UsageError
from inlay.values import Checked, Count, fields_of

__all__ = ["NOTES", "Notes", "read_notes"]

NOTES = "inlay.json"


@dataclass(frozen=True)
class Notes(Checked):
    """The base's name, fingerprint and dtype in training; the template (as a dict), the most tokens of a row, and the
    place of virtual tokens.
    """

    base: str = ""
    fingerprint: str | None = None
    dtype: str | None = None
    template: Mapping[str, Any] | None = None
    max_length: Annotated[Count, Ge(2)] = 512
    virtual_tokens_at: str = "start"


def read_notes(folder: str | Path) -> Notes:
    """What was noted when the adapter was saved; nothing for adapters of other libraries.

    Raises: InlayError where the file cannot be opened; FormatError where it is broken or a value in it is of the wrong
    kind. Entries of later releases are passed over.
    """
    path = Path(folder) / NOTES
    if not path.is_file():
        return Notes()
    try:
        notes = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise InlayError(f"{path} cannot be read ({error.strerror})", "Check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error})", "Save the adapter again, or remove the file.") from None
    if not isinstance(notes, dict):
        raise FormatError(f"{path} holds no JSON object", "Save the adapter again, or remove the file.")
    names = {field.name for field in fields_of(Notes)}
    try:
        return Notes(**{name: value for name, value in notes.items() if name in names})
    except UsageError as error:
        raise FormatError(f"{path}: {error.what}", "Save the adapter again, or remove the file.") from None
