"""How an adapter was trained to read: the template, length and place of virtual tokens that travel with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.data.template import Template
from inlay.errors import FormatError, UsageError

from .notes import read_notes

__all__ = ["Carried", "carried"]


@dataclass(frozen=True)
class Carried:
    template: Template
    max_length: int = 512
    place: str = "start"


def carried(folders: Sequence[str | Path]) -> Carried | None:
    """What the adapters in `folders` agree on; None where none of them says anything.

    Raises: UsageError where they differ; FormatError where one's note is broken.
    """
    found = [one for one in map(_read, folders) if one is not None]
    if any(one != found[0] for one in found):
        raise UsageError("the adapters were trained with different templates", "Give --template, or use them apart.")
    return found[0] if found else None


def _read(folder: str | Path) -> Carried | None:
    notes: dict[str, Any] = read_notes(folder)
    if not notes.get("template"):
        return None
    try:
        template = Template.from_dict(notes["template"])
    except TypeError as error:
        raise FormatError(f"{folder} carries a template that is not known here ({error})", "Give --template.") from None
    return Carried(template, notes.get("max_length", 512), notes.get("virtual_tokens_at", "start"))
