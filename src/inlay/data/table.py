"""Reads data files of any common kind into rows that remember where they stood."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.errors import DataError, UsageError

__all__ = ["Row", "Table", "duplicates", "read_table", "shuffled", "split"]

LONGEST_FIELD = 64 * 2**20
"""Characters in one field or line; more is a broken file."""


@dataclass(frozen=True)
class Row:
    """One record: its values by column, its number in the table, and the file and line it starts on."""

    values: dict[str, Any]
    number: int
    file: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def digest(self) -> bytes:
        """Equal for rows of equal content."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True, default=str).encode()).digest()


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    files: tuple[str, ...]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name the content."""
        whole = hashlib.sha256()
        for row in self.rows:
            whole.update(row.digest)
        return whole.hexdigest()[:16]


def read_table(paths: str | Path | Sequence[str | Path]) -> Table:
    """Rows of one or several files: .csv, .tsv, .jsonl, .json, .parquet, .txt or a `datasets` folder.

    Raises: UsageError for a path that is missing or of unknown kind; DataError naming the file and line of bad content.
    """
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    rows: list[Row] = []
    columns: tuple[str, ...] | None = None
    for path in map(Path, listed):
        own: dict[str, None] = {}
        begun = len(rows)
        for line, values in _reader(path)(path):
            own.update(dict.fromkeys(values))
            rows.append(Row(values, len(rows), str(path), line))
        if len(rows) == begun:
            raise DataError(f"{path} holds no rows", "Give a file with at least one.")
        if columns is not None and set(columns) != set(own):
            what = f"the columns of {path} ({', '.join(own)}) are not those of {listed[0]} ({', '.join(columns)})"
            raise DataError(what, "Give files with the same columns.")
        columns = columns or tuple(own)
    return Table(columns or (), tuple(rows), tuple(map(str, listed)))


def duplicates(rows: Sequence[Row]) -> int:
    """How many rows have the content of an earlier one."""
    return len(rows) - len({row.digest for row in rows})


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows in an order that depends on the seed and their content alone."""
    key = seed.to_bytes(8, "little", signed=True)
    return sorted(rows, key=lambda row: (hashlib.sha256(key + row.digest).digest(), row.number))


def split(
    rows: Sequence[Row], share: float, content: Callable[[Row], str] | None = None
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, by a hash of the content: rows of equal content are always on one side.

    `content` says what of a row counts; all of it, where nobody does.
    """
    if not 0 <= share < 1:
        raise UsageError(f"the held-out share is {share}", "Give a number from 0 to below 1, or a file.")
    limit = int(share * 2**32)
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = row.digest if content is None else hashlib.sha256(content(row).encode("utf8", "replace")).digest()
        sides[int.from_bytes(digest[:4], "little") < limit].append(row)
    return sides


Reader = Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]


def _reader(path: Path) -> Reader:
    if not path.exists():
        raise UsageError(f"data file {path} does not exist", "Check the path.")
    if path.is_dir():
        _check_dataset(path)
        return _dataset
    if not path.is_file():
        raise UsageError(f"data file {path} is no ordinary file", "Name a file that stays where it is.")
    kinds: dict[str, Reader] = {
        ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".txt": _text, ".md": _text,
    }  # fmt: skip
    if path.suffix.lower() not in kinds:
        raise UsageError(f"data file {path} is of an unknown kind", f"Known: {', '.join(kinds)}.")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty", "Give a file with at least one row.")
    return kinds[path.suffix.lower()]


def _check_dataset(path: Path) -> None:
    """Raises: UsageError where the folder is not one that `datasets` saved, or holds several splits."""
    if list(path.glob("*.arrow")):
        return
    splits = sorted(file.parent.name for file in path.glob("*/dataset_info.json"))
    if "train" in splits or len(splits) == 1:
        return
    if splits:
        listed = ", ".join(splits)
        raise UsageError(f"folder {path} holds the splits {listed}", f"Name one: {path / splits[0]}.")
    raise UsageError(f"folder {path} holds no dataset", "Name a file, or a folder that `datasets` saved.")


def _decoded(path: Path) -> str:
    """The file's text, from UTF-8 or, where it begins with its mark, UTF-16."""
    raw = path.read_bytes()
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        what = f"{path}, line {line} holds byte 0x{raw[error.start]:02x}, which is not {encoding[:6].upper()}"
        raise DataError(what, "Save the file as UTF-8.") from None
    if (nul := text.find("\0")) >= 0:
        raise DataError(f"{path}, line {text.count(chr(10), 0, nul) + 1} holds a NUL byte", "The file is damaged.")
    return text


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _decoded(path)
    head = text.split("\n", 1)[0]
    mark = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    line, columns = 1, None
    try:
        for fields in reader:
            if columns is None:
                columns = [name.strip() for name in fields]
                if len(set(columns)) < len(columns) or not all(columns):
                    raise DataError(f"{path}, line 1: column names are empty or double", "Name each column once.")
            elif fields:
                if len(fields) != len(columns):
                    what = f"{path}, line {line} has {len(fields)} fields where the header has {len(columns)}"
                    raise DataError(what, "Check its quotes and separators.")
                yield line, dict(zip(columns, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: {error}", "Check its quotes.") from None


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is not JSON ({error})", "Each line is one object.") from None
            except RecursionError:
                raise DataError(f"{path}, line {number} nests too deeply", "Each line is one flat object.") from None
            yield number, _object(value, path, number)


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _decoded(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno} is not JSON ({error.msg})", "Check the file.") from None
    except RecursionError:
        raise DataError(f"{path} nests too deeply", "Give a list of flat objects.") from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise DataError(f"{path} holds no list of objects", "Give [{...}, ...].")
    lines = _item_lines(text, len(value))
    for number, item in zip(lines, value, strict=True):
        yield number, _object(item, path, number)


def _item_lines(text: str, count: int) -> list[int]:
    """The line that each item of the file's list starts on (all 1 where the list cannot be walked)."""
    decoder, place, lines, line, seen = json.JSONDecoder(), text.find("["), [], 1, 0
    try:
        while place >= 0 and len(lines) < count:
            place += 1
            while text[place] in " \t\r\n,":
                place += 1
            line, seen = line + text.count("\n", seen, place), place
            lines.append(line)
            place = decoder.raw_decode(text, place)[1] - 1
    except (ValueError, IndexError):
        pass
    return lines if len(lines) == count else [1] * count


def _object(value: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}, line {line} holds a {type(value).__name__}", "Each row is an object.")
    return value


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a whole parquet file ({str(error).splitlines()[0]})", "Write it again."
        ) from None
    yield from enumerate(rows, 1)


def _dataset(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa

    number = 0
    if not list(path.glob("*.arrow")):
        splits = sorted(file.parent for file in path.glob("*/dataset_info.json"))
        path = path / "train" if path / "train" in splits else splits[0]
    for file in sorted(path.glob("*.arrow")):
        try:
            with pa.memory_map(str(file)) as source:
                rows = pa.ipc.open_stream(source).read_all().to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file} is not a whole arrow file ({str(error).splitlines()[0]})", "Save it again."
            ) from None
        for row in rows:
            number += 1
            yield number, row


def _text(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Paragraphs, which blank lines part."""
    start, held = 1, []
    for number, line in enumerate([*_decoded(path).split("\n"), ""], 1):
        if line.strip():
            start = number if not held else start
            held.append(line)
        elif held:
            yield start, {"text": "\n".join(held)}
            held = []
