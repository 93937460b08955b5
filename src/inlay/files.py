"""Files that are always whole: written beside, flushed to disk, then renamed over the old one; and lines of JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["finite", "flush_folder", "json_lines", "write_json", "write_text", "written_beside"]


def _umask() -> int:
    """Asked for once, when no other thread is about: asking changes it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _umask()


def flush_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut (no-op where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is flushed and renamed to `path`, else removed.

    Raises: OSError naming `path` where the system refuses a part of it, whatever the writer inside makes of that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.chmod(beside, 0o666 & ~UMASK)  # some writers keep what they write to themselves
        with open(beside, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(beside, path)
        flush_folder(path.parent)
    except Exception as error:
        if (number := _number(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None
    finally:
        beside.unlink(missing_ok=True)


def _number(error: Exception) -> int | None:
    """The system's number of an error that names no file; safetensors' own errors have it in their words alone."""
    if isinstance(error, OSError):
        return error.errno if error.filename is None else None
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf8")


def finite(value: Any) -> Any:
    """`value` with None in place of NaN and infinity, which JSON has no word for; the keys of mappings are strings."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, whole or not at all; keys keep their order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_lines(path: str | Path) -> list[str]:
    """The lines of a file of JSON lines, the blank ones left out; what is no UTF-8 stands there as a question mark.

    Only a line feed parts them: `str.splitlines` also does at characters that JSON leaves as they are, such as U+0085
    and U+2028, which people's rows hold.
    """
    text = Path(path).read_text(encoding="utf8", errors="replace")
    return [line for line in text.split("\n") if line.strip()]
