"""Predictions as a csv or jsonl file that grows row by row, and goes on where it was broken off."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from inlay.errors import InlayError, UsageError
from inlay.files import write_json

from .common import json_line

__all__ = ["Output", "check_output"]

KINDS = (".csv", ".tsv", ".jsonl")


def check_output(path: str, resume: bool) -> None:
    """Raises: UsageError where `path` is of an unknown kind, lies nowhere, or would be lost."""
    file = Path(path)
    if file.suffix.lower() not in KINDS:
        raise UsageError(f"--out {path} is of an unknown kind", f"Known: {', '.join(KINDS)}.")
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f"--out {path} cannot be written", "Name a file in a folder that is there.")
    if file.exists() and not resume:
        more = "Add --resume to go on with it, or" if _progress(file).exists() else "Choose another name, or"
        raise UsageError(f"{path} exists", f"{more} remove it.")


def _progress(file: Path) -> Path:
    """What is known of a file that is not finished."""
    return file.with_name(f".{file.name}.progress.json")


class Output:
    """Writes records in order to `path` (standard output, as jsonl, where None); `done` are those it holds already.

    After each `add` what was added is on the disk, and beside it how far that is. `identity` names data, base and
    adapter: a file of others is not gone on with. Raises: UsageError; InlayError where the disk is full.
    """

    def __init__(self, path: str | None, columns: Sequence[str], identity: str, resume: bool) -> None:
        self.path = None if path is None else Path(path)
        self.columns, self.identity, self.done = columns, identity, 0
        self._file: Any = None
        if self.path is None:
            return
        self._fresh = not self.path.exists()
        begun = {"rows": 0, "bytes": 0} if self._fresh or not resume else self._begun()
        self.done = begun["rows"]
        self._file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115
        self._file.truncate(begun["bytes"])
        self._file.seek(begun["bytes"])
        if not self.done and self.path.suffix.lower() != ".jsonl":
            self._write(self._line(dict.fromkeys(columns), header=True))

    def _begun(self) -> dict[str, Any]:
        assert self.path is not None
        try:
            begun = json.loads(_progress(self.path).read_text(encoding="utf8"))
            same, rows, size = begun["identity"] == self.identity, int(begun["rows"]), int(begun["bytes"])
        except FileNotFoundError:
            raise UsageError(f"{self.path} is finished, or was not begun here", "Choose another --out.") from None
        except (ValueError, KeyError, TypeError, OSError):
            raise UsageError(f"what is known of {self.path} is damaged", "Remove it and begin afresh.") from None
        if not same or size > self.path.stat().st_size:
            raise UsageError(f"{self.path} was begun with other data, base or adapter", "Choose another --out.")
        return {"rows": rows, "bytes": size}

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write some more."""
        self._write("".join(self._line(one) for one in records))
        self.done += len(records)
        if self.path is not None:
            self._save(lambda: write_json(_progress(self.path), self._known()))  # pyright: ignore[reportArgumentType]

    def _known(self) -> dict[str, Any]:
        return {"identity": self.identity, "rows": self.done, "bytes": self._file.tell()}

    def finish(self) -> None:
        """Say that the file is whole."""
        if self.path is not None:
            _progress(self.path).unlink(missing_ok=True)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is None or self.path is None:
            return
        self._file.close()
        if kind is not None and self._fresh and not self.done:  # what failed at once leaves nothing
            self.path.unlink(missing_ok=True)

    def _write(self, text: str) -> None:
        if self._file is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return

        def put() -> None:
            self._file.write(text.encode("utf8", "replace"))
            self._file.flush()
            os.fsync(self._file.fileno())

        self._save(put)

    def _save(self, put: Callable[[], Any]) -> None:
        try:
            put()
        except OSError as error:
            raise InlayError(
                f"{self.path} cannot be written ({error.strerror or error}); {self.done} rows of it are whole",
                "Make room and add --resume.",
            ) from None

    def _line(self, one: Mapping[str, Any], header: bool = False) -> str:
        if self.path is None:
            return json_line(one)
        if self.path.suffix.lower() == ".jsonl":
            return json.dumps(one, ensure_ascii=False, default=str) + "\n"
        text = io.StringIO(newline="")
        cells = self.columns if header else [_cell(one.get(name)) for name in self.columns]
        mark = "\t" if self.path.suffix.lower() == ".tsv" else ","
        csv.writer(text, delimiter=mark, lineterminator="\n").writerow(cells)
        return text.getvalue()


def _cell(value: Any) -> Any:
    """A csv cell: words and numbers as they are, lists and objects as JSON."""
    if value is None or isinstance(value, (str, int, float)):
        return "" if value is None else value
    return json.dumps(value, ensure_ascii=False, default=str)
