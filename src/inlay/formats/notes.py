"""inlay.json, beside an adapter's own files: what HF PEFT's layout has no place for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inlay.errors import FormatError

__all__ = ["NOTES", "read_notes"]

NOTES = "inlay.json"


def read_notes(folder: str | Path) -> dict[str, Any]:
    """What was noted when the adapter was saved; nothing for adapters of other libraries."""
    path = Path(folder) / NOTES
    if not path.exists():
        return {}
    try:
        notes = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON ({error})", "Save the adapter again, or remove the file.") from None
    if not isinstance(notes, dict):
        raise FormatError(f"{path} holds no JSON object", "Save the adapter again, or remove the file.")
    return notes
