"""Where a table's rows come from: files, packed or not, and standard input; what kind each is, and its text."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from inlay.errors import DataError, UsageError

from .mapped import no_room, unnamed_file

__all__ = ["STDIN", "Source", "damaged", "lines_of", "misencoded", "opened_text", "source_of"]

STDIN = "-"
KINDS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet",
    ".txt": "text", ".md": "text",
}  # fmt: skip
BLOCK = 2**20
HEAD = 2**16
LONGEST_LINE = 2**26
"""Characters of a first line that is looked at to tell lines of objects from one object."""
UNPACKING = (EOFError, zlib.error, gzip.BadGzipFile)
"""What a damaged .gz file raises."""
GZIP, PARQUET, ZIP = b"\x1f\x8b", b"PAR1", b"PK\x03\x04"


@dataclass(frozen=True)
class Source:
    """A file of rows: `name` for people, `kind` (csv, tsv, jsonl, json, parquet, text or dataset) for readers.

    `held` is what standard input brought; everything else is at `path`.
    """

    name: str
    kind: str
    path: Path
    packed: bool = False
    held: BinaryIO | None = None

    def open(self) -> BinaryIO:
        """Its bytes from the first on, unpacked. Raises: OSError."""
        place: Path | int = self.path
        if self.held is not None:
            self.held.seek(0)
            place = os.dup(self.held.fileno())
        raw = open(place, "rb")  # noqa: SIM115
        if not self.packed:
            return raw
        unpacked: Any = gzip.GzipFile(fileobj=raw, mode="rb")
        unpacked.myfileobj = raw  # closed along with it
        return unpacked


def source_of(path: str | Path) -> Source:
    """What stands at `path`, `-` being standard input.

    Raises: UsageError where there is nothing that can be read, or its kind is unknown; DataError where it is empty.
    """
    if str(path) == STDIN:
        return _standard_input()
    path = Path(path)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        what = f"data file {str(path)[:80]!r} cannot be opened ({error.args[-1]})"
        raise UsageError(what, "Check the path.") from None
    if not there:
        raise UsageError(f"data file {path} does not exist", "Check the path.")
    if path.is_dir():
        return Source(str(path), "dataset", _dataset_folder(path))
    if not path.is_file():
        raise UsageError(f"data file {path} is no ordinary file", "Pipe it in: --data - reads standard input.")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty", "Give a file with at least one row.")
    return _recognized(Source(str(path), "", path))


def _standard_input() -> Source:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or sys.stdin.isatty():
        raise UsageError("nothing is piped into standard input", "Write: cat rows.csv | inlay ... --data -")
    held = unnamed_file()
    try:
        shutil.copyfileobj(stream, held, BLOCK)
        held.flush()
    except OSError as error:
        raise no_room(error) from None
    if not held.tell():
        raise DataError("standard input is empty", "Pipe in at least one row.")
    return _recognized(Source("standard input", "", Path(STDIN), held=held))


def _recognized(source: Source) -> Source:
    """The source with its kind: what its name says, or its first bytes where it has no extension."""
    suffixes = [suffix.lower() for suffix in source.path.suffixes] if source.held is None else []
    named = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    raw = _head(source)
    packed = raw.startswith(GZIP)
    source = Source(source.name, "", source.path, packed, source.held)
    kind = KINDS.get(named[0]) if named else _sniffed(source, _head(source))
    if kind is None or (packed and kind == "parquet"):
        known = ", ".join(KINDS)
        raise UsageError(f"data file {source.name} is of an unknown kind", f"Known: {known}; .gz of those of text.")
    if raw.startswith(ZIP) and kind != "parquet":
        raise DataError(f"{source.name} is a zip archive or an Excel workbook", "Unpack it, or save it as CSV.")
    if kind == "json" and _lines_of_json(source):
        kind = "jsonl"
    return Source(source.name, kind, source.path, packed, source.held)


def _head(source: Source) -> bytes:
    try:
        with source.open() as file:
            return file.read(HEAD)
    except UNPACKING:
        raise damaged(source) from None
    except OSError as error:
        raise UsageError(f"data file {source.name} cannot be read ({error.strerror or error})", "Check it.") from None


def _sniffed(source: Source, head: bytes) -> str | None:
    """The kind that the first bytes show."""
    if head.startswith(PARQUET):
        return "parquet"
    text = head.decode(_encoding(head), "replace").lstrip()
    if text[:1] in ("{", "["):
        return "json"
    first = text.split("\n", 1)[0]
    return "csv" if re.search(r"[,;\t]", first) or re.fullmatch(r"\w+\s*", first) else None


def _lines_of_json(source: Source) -> bool:
    """Whether each line is an object: the first is one, and another follows or it holds no list of rows."""
    with opened_text(source, "\n") as file:
        try:
            first = next((line for line in iter(lambda: file.readline(LONGEST_LINE), "") if line.strip()), "")
            value = json.loads(first) if first.lstrip().startswith("{") else None
            more = any(line.strip() for line in file)
        except (ValueError, RecursionError, *UNPACKING):  # whoever reads it all says so
            return False
    if not isinstance(value, dict):
        return False
    return more or (source.held is not None and not any(isinstance(v, list) for v in value.values()))


def _dataset_folder(path: Path) -> Path:
    """The folder of the arrow files. Raises: UsageError where there are none, those of several splits, or the folder
    cannot be read.
    """
    try:
        listed = list(path.iterdir())
    except OSError as error:
        raise UsageError(f"data folder {path} cannot be read ({error.strerror})", "Check its permissions.") from None
    if any(file.suffix == ".arrow" or file.name == "state.json" for file in listed):
        return path
    splits = sorted(file.parent for file in path.glob("*/dataset_info.json"))
    if path / "train" in splits or len(splits) == 1:
        return path / "train" if path / "train" in splits else splits[0]
    if splits:
        names = ", ".join(split.name for split in splits)
        raise UsageError(f"folder {path} holds the splits {names}", f"Name one: {splits[0]}.")
    if files := sorted(file for file in listed if {s.lower() for s in file.suffixes} & KINDS.keys()):
        named = " ".join(f"--data {file}" for file in files[:3])
        raise UsageError(f"folder {path} holds no dataset, but files", f"Name them: {named}.")
    raise UsageError(f"folder {path} holds no dataset", "Name a file, or a folder that `datasets` saved.")


# ---- text


def _encoding(head: bytes) -> str:
    return "utf-16" if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def opened_text(source: Source, newline: str | None) -> io.TextIOWrapper:
    """The source's text, from UTF-8 or, where it begins with its mark, UTF-16; `newline` as `open` takes it."""
    encoding = _encoding(_head(source))
    text = io.TextIOWrapper(source.open(), encoding, newline=newline)
    cast(Any, text)._CHUNK_SIZE = BLOCK  # 8 kB at a time otherwise
    return text


def lines_of(source: Source, newline: str | None = "\n") -> Iterator[str]:
    """Its lines with their ends. Raises: DataError naming the line that holds a NUL byte."""
    with opened_text(source, newline) as file:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise DataError(f"{source.name}, line {number} holds a NUL byte", "The file is damaged.")
            yield line


def damaged(source: Source) -> DataError:
    """The error of a .gz file that cannot be unpacked."""
    return DataError(f"{source.name} is damaged or cut off: not all of it unpacks", "Fetch it again.")


def misencoded(source: Source) -> DataError:
    """The error of a source that is not in its encoding: it names line and byte, and what it may be."""
    encoding = _encoding(_head(source))
    name = "UTF-16" if encoding == "utf-16" else "UTF-8"
    decoder, line, block = codecs.getincrementaldecoder(encoding)(), 1, b" "
    with source.open() as file:
        while block:
            block = file.read(BLOCK)
            try:
                line += decoder.decode(block, not block).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(encoding, "ignore").count("\n")
                what = f"{source.name}, line {line} holds byte 0x{error.object[error.start]:02x}, which is not {name}"
                looks = (
                    _looks_like(error.object[max(0, error.start - 500) : error.start + 2000]) if name == "UTF-8" else ""
                )
                if not looks:
                    return DataError(what, "Save the file as UTF-8.")
                remedy = f"Save it as UTF-8, or convert it: iconv -f {looks.split('/')[-1].upper()} -t UTF-8"
                return DataError(f"{what}: it looks like {looks}", remedy)
    return DataError(f"{source.name} is not {name}", "Save the file as UTF-8.")


def _looks_like(around: bytes) -> str:
    """The encoding that text which is no UTF-8 may have: single high bytes are Latin letters, pairs Chinese signs."""
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", around)]
    single = sum(length == 1 for length in runs)
    if single * 2 > len(runs):
        return "Latin-1/Windows-1252"
    try:
        codecs.getincrementaldecoder("gb18030")().decode(around)
        return "GB18030"
    except UnicodeDecodeError:
        return ""
