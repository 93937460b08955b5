"""Arrays on disk: written once to an unnamed file in the cache folder, then read through a memory map."""

from __future__ import annotations

import mmap
import tempfile
from typing import Any, BinaryIO

import numpy as np

from inlay.bases.cache import home
from inlay.errors import InlayError

__all__ = ["Growing", "no_room", "unnamed_file"]

SMALL = 2**20
"""Bytes that stay in memory; less is not worth a file."""


def unnamed_file() -> BinaryIO:
    """A file in the cache folder without a name there, so that nothing of it outlives the process.

    Raises: InlayError where the folder cannot be written.
    """
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        raise no_room(error) from None


def no_room(error: OSError) -> InlayError:
    """The error of a cache that has no room, or cannot be written."""
    what = f"the cache {home()} cannot take the rows ({error.strerror or error})"
    return InlayError(what, "Free some space there, or set INLAY_HOME to a folder that has it.")


class Growing:
    """A one-dimensional array that is appended to and, once done, no longer changed.

    It is in memory up to `SMALL` bytes and in an unnamed file beyond.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._held = bytearray()
        self._file: BinaryIO | None = None
        self._written = 0

    def __len__(self) -> int:
        return (self._written + len(self._held)) // self.dtype.itemsize

    def add(self, data: bytes | bytearray | np.ndarray) -> None:
        """Append items, or the bytes of whole ones. Raises: InlayError where the disk is full."""
        self._held += data if isinstance(data, (bytes, bytearray)) else np.ascontiguousarray(data, self.dtype).tobytes()
        if len(self._held) > SMALL:
            self._file = self._file or unnamed_file()
            self._write(self._file)

    def _write(self, file: BinaryIO) -> None:
        try:
            file.write(self._held)
            file.flush()
        except OSError as error:
            raise no_room(error) from None
        self._written += len(self._held)
        self._held = bytearray()

    def done(self) -> np.ndarray:
        """(n,) of `dtype`, read-only. Raises: InlayError where the disk is full."""
        buffer = self.buffer()
        return np.frombuffer(buffer, self.dtype) if len(buffer) else np.empty(0, self.dtype)

    def buffer(self) -> bytes | mmap.mmap:
        """The bytes, as `done` sees them."""
        if self._file is None:
            return bytes(self._held)
        self._write(self._file)
        try:
            return mmap.mmap(self._file.fileno(), self._written, access=mmap.ACCESS_READ)
        except OSError as error:
            raise no_room(error) from None
        finally:
            self._file.close()  # the map holds it
            self._file = None
            self._written = 0
