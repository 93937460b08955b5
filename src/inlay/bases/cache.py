"""The cache folder: what is fetched or converted is written beside and renamed, so that it is whole or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inlay.errors import InlayError
from inlay.files import flush_folder

__all__ = ["cached", "file_digest", "home"]


def home() -> Path:
    """The cache folder: `INLAY_HOME`, else ~/.cache/inlay. Raises: InlayError where nobody says where home is."""
    try:
        return Path(os.environ.get("INLAY_HOME") or Path.home() / ".cache" / "inlay").expanduser()
    except RuntimeError:
        raise InlayError("this user has no home folder to keep a cache in", "Set INLAY_HOME to a folder.") from None


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """`home()/name`, a file or folder that `make` writes the first time.

    It is written in a folder beside, flushed and renamed, so that a kill at any moment leaves the name whole or
    absent. A second process waits for the first and takes what it made; what killed ones left is removed.
    Raises: InlayError where the cache cannot be written, and whatever `make` raises.
    """
    target = home() / name
    if target.exists():
        return target
    _prepare(target.parent)
    with _alone(target) as alone:
        if target.exists():
            return target
        if alone:
            for left in target.parent.glob(f".{target.name}.tmp-*"):
                shutil.rmtree(left, ignore_errors=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        try:
            make(beside / "made")
            _flush(beside / "made")
            _rename(beside / "made", target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return target


def file_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of the file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write there")
    except OSError as error:
        why = error.strerror or str(error)
        raise InlayError(f"the cache {folder} cannot be used ({why})", "Set INLAY_HOME to a folder of yours.") from None


@contextmanager
def _alone(target: Path) -> Iterator[bool]:
    """Hold the lock of `target`; yields False where the system has no file locks (the rename still decides then)."""
    with open(target.with_name(f".{target.name}.lock"), "w", encoding="utf8") as lock:
        locked = False
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
            locked = True
        yield locked


def _flush(made: Path) -> None:
    """Put everything on disk, and let those read the files who may read the folder (safetensors writes 0600)."""
    readable = made.stat().st_mode & 0o444
    for path in (made, *made.rglob("*")) if made.is_dir() else (made,):
        if path.is_dir():
            flush_folder(path)
            continue
        path.chmod(path.stat().st_mode | readable)
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())


def _rename(made: Path, target: Path) -> None:
    try:
        os.rename(made, target)
    except OSError:  # another process, where there are no locks, was first
        if not target.exists():
            raise
    flush_folder(target.parent)
