"""How an adapter was trained to read: the template, length and place of virtual tokens that travel with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """What the adapters in `folders` agree on, with the least of their lengths; None where none of them says anything.

    Raises: UsageError where they differ; FormatError where one's note is broken.
    """
    found = [one for one in map(_read, folders) if one is not None]
    if not found:
        return None
    for what in ("template", "place"):
        if any(getattr(one, what) != getattr(found[0], what) for one in found):
            named = {"template": "with different templates", "place": "with virtual tokens at different places"}[what]
            raise UsageError(f"the adapters were trained {named}", "Use one at a time.")
    return replace(found[0], max_length=min(one.max_length for one in found))


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
        path = Path(folder) / NOTES
        raise FormatError(f"{path}: {why}", "Save the adapter again, or remove the file.") from None
    if template.kind == "label" and not template.verbalizer:
        raise FormatError(f"{Path(folder) / NOTES}: the template names no labels", "Save the adapter again.")
    return Carried(template, notes.max_length, notes.virtual_tokens_at)
