"""One served adapter: its name, its files, what of them is in memory, and what is told of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from inlay.bases.heads import Head
from inlay.batch.route import RowSpec
from inlay.data.prompting import noted
from inlay.errors import InlayError
from inlay.formats.notes import Notes, read_notes
from inlay.runs.tasking import head_of

from .folders import Signature, said_method, signature_of
from .versions import Loaded

__all__ = [
    "AdapterInfo",
    "Anything",
    "Claim",
    "Entry",
    "head_in_files",
    "info_of",
    "plain_names",
    "renamed",
    "task_in_files",
    "task_now",
]


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter; all but the last time of its use without opening its weights.

    `rank` is its rank, or how many virtual tokens it has. `version` counts the contents that were loaded under the
    name, `bytes` are those of its parameters while it is `loaded`, else those of its files, and `notes` those that
    came with them: the template, and the base that it was trained on. `last_used` is in seconds since 1970. `error`
    says why it does not load.
    """

    name: str
    path: Path
    method: str
    rank: int | None
    loaded: bool
    version: int
    bytes: int
    notes: Notes
    last_used: float | None
    error: str | None


@dataclass(eq=False)
class Entry:
    """One name: where its files lie, what of them is in memory, and how many asks wait for it.

    `content` and `signature` are of the files that were loaded last, `refused` of those that did not load, and `why`
    they did not.
    """

    name: str
    path: Path
    loaded: Loaded | None = None
    content: bytes = b""
    signature: Signature = ()
    version: int = 0
    waiting: int = 0
    used: float | None = None
    since: float = 0.0
    error: str | None = None
    refused: Signature = ()
    why: InlayError | None = None
    said: tuple[Signature, tuple[str, int | None], Notes] | None = None


@dataclass(eq=False)
class Claim:
    """The adapters that one ask waits for: they stay to be loaded, whatever happens to their names meanwhile."""

    entries: dict[str, Entry] = field(default_factory=dict)


class Anything(Mapping[str, object]):
    """Holds every name: which of them are served is asked elsewhere."""

    def __getitem__(self, name: str) -> object:
        return name

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __contains__(self, name: object) -> bool:
        return True


def task_now(entry: Entry) -> str | None:
    """What the head of an adapter was trained to do, of the version that is loaded or else of its files; None where it
    writes text."""
    return _task(_now(entry))


def task_in_files(entry: Entry) -> str | None:
    """The same of an adapter's files, whatever is loaded."""
    return _task(_said(entry)[1])


def head_in_files(entry: Entry) -> Head | None:
    """The head that an adapter's files say it was trained with; None where it writes text, or they say nothing.

    Raises: InlayError where its notes are broken.
    """
    found = noted(read_notes(entry.path), entry.path)
    return None if found is None else head_of(found.template)


def _task(notes: Notes) -> str | None:
    task = (notes.template or {}).get("task", "generate")
    return None if task == "generate" else str(task)


def _now(entry: Entry) -> Notes:
    loaded = entry.loaded  # looked at once: the bank's thread may let it go meanwhile
    return loaded.notes if loaded is not None else _said(entry)[1]


def _said(entry: Entry) -> tuple[tuple[str, int | None], Notes]:
    """What an adapter's files say of it, read again when they have changed."""
    signature = signature_of(entry.path)
    if entry.said is None or entry.said[0] != signature:
        try:
            notes = read_notes(entry.path)
        except InlayError as error:
            notes, entry.error = Notes(), str(error)
        entry.said = signature, said_method(entry.path), notes
    return entry.said[1], entry.said[2]


def info_of(entry: Entry) -> AdapterInfo:
    (method, rank), notes = _said(entry)
    loaded = entry.loaded
    notes = notes if loaded is None else loaded.notes
    size = loaded.bytes if loaded else sum(size for _, size, _, _ in entry.said[0]) if entry.said else 0
    return AdapterInfo(
        entry.name, entry.path, loaded.method if loaded else method, rank, loaded is not None, entry.version, size,
        notes, entry.used, entry.error,
    )  # fmt: skip


def plain_names(error: InlayError) -> InlayError:
    """The error without the numbers of versions, which users do not know."""
    error.what, error.remedy = (re.sub(r"'([^']*)@\d+'", r"'\1'", text) for text in (error.what, error.remedy))
    error.args = (re.sub(r"'([^']*)@\d+'", r"'\1'", str(error.args[0])), *error.args[1:])
    return error


def renamed(route: RowSpec, names: Mapping[str, str]) -> RowSpec:
    """The route with the names of versions."""
    if route is None or isinstance(route, str):
        return None if route is None else names[route]
    if isinstance(route, Mapping):
        return {names[name]: weight for name, weight in route.items()}
    return [names[name] for name in route]
