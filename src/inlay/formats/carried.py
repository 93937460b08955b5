"""How an adapter was trained to read: the template, length and place of virtual tokens that travel with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inlay.data.encode import PLACES
from inlay.data.template import Template
from inlay.errors import FormatError, InlayError, UsageError

from .notes import NOTES, read_notes

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
    notes = read_notes(folder)
    if not notes.template:
        return None
    if notes.virtual_tokens_at not in PLACES:
        raise FormatError(f"{Path(folder) / NOTES}: virtual_tokens_at is {notes.virtual_tokens_at!r}", "Save it again.")
    try:
        template = Template.from_dict(notes.template)
    except (InlayError, TypeError) as error:
        why = error.what if isinstance(error, InlayError) else str(error)
        raise FormatError(f"{folder} carries a template that is not known here ({why})", "Give --template.") from None
    return Carried(template, notes.max_length, notes.virtual_tokens_at)
