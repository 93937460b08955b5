"""Rows of Parquet files and of folders that `datasets` saved, a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.errors import DataError

from .sources import Source

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["dataset_rows", "parquet_rows"]

BATCH = 2048
"""Rows."""


def parquet_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number (from 1) and values of each row of a Parquet file.

    Raises: DataError where the file is not whole, or a column holds what is no text, number, list or object.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(source.open() if source.held is not None else source.path, memory_map=True)
        for batch in file.iter_batches(BATCH):
            for row in _rows(batch, source.name):
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        what = f"{source.name} is not a whole parquet file ({_first(error)})"
        raise DataError(what, "Write it again.") from None


def dataset_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `parquet_rows`, of the arrow files of the dataset in the folder."""
    import pyarrow as pa

    number = 0
    for path in _shards(source.path):
        _check_opens(path)
        try:
            with pa.memory_map(str(path)) as mapped:
                for whole in pa.ipc.open_stream(mapped):
                    whole.validate(full=True)  # offsets of a damaged file lead anywhere
                    for start in range(0, len(whole), BATCH):
                        for row in _rows(whole.slice(start, BATCH), source.name):
                            number += 1
                            yield number, row
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a whole arrow file ({_first(error)})", "Save it again.") from None


def _shards(folder: Path) -> list[Path]:
    """The dataset's files, as its state.json lists them: `datasets` puts what it caches (filtered, mapped) beside them.

    Raises: DataError where the list is broken.
    """
    state = folder / "state.json"
    if not state.is_file():
        return sorted(path for path in folder.glob("*.arrow") if not path.name.startswith("cache-"))
    _check_opens(state)
    try:
        names = [file["filename"] for file in json.loads(state.read_text(encoding="utf8"))["_data_files"]]
        return [folder / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{state} does not list the dataset's files", "Save the dataset again.") from None


def _check_opens(path: Path) -> None:
    """Raises: DataError where the file is not there or may not be read; pyarrow would call that a broken file."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", "Check the folder and its permissions.") from None


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _rows(batch: pa.RecordBatch, file: str) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    if len(set(names)) < len(names) or not all(names):
        raise DataError(f"{file}: column names are empty or double", "Name each column once.")
    columns = [_values(batch.column(n), name, file) for n, name in enumerate(names)]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: pa.Array, name: str, file: str) -> list[Any]:
    """A column as plain values; points in time and exact numbers become text, bytes are decoded.

    Raises: DataError where bytes are no text, or the type has no plain value.
    """
    import pyarrow as pa

    types = pa.types
    try:
        kind = column.type
        if types.is_string(kind) or types.is_large_string(kind):
            return column.to_numpy(zero_copy_only=False).tolist()
        if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind):
            return column.to_pylist()
        if types.is_temporal(kind) or types.is_decimal(kind) or types.is_binary(kind) or types.is_large_binary(kind):
            return column.cast(pa.string()).to_pylist()
        return [_plain(value) for value in column.to_pylist()]
    except (pa.ArrowException, ValueError, TypeError) as error:
        what = f"{file}: column {name!r} holds {column.type}, which is no text ({_first(error)})"
        raise DataError(what, "Leave that column out.") from None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.decode() if isinstance(value, bytes) else str(value)
