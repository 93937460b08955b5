"""The file of a space: a named one that comes along, or somebody's own."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.data.yaml import read_yaml
from inlay.errors import UsageError

__all__ = ["NAMED", "read_file"]

NAMED: Mapping[str, int] = {"quick": 6, "default": 16, "wide": 48}
"""The spaces that come along, with how many contenders each has: all of them are beginnings of one list."""
LIST = Path(__file__).parent / "spaces" / "wide.yaml"
ENDINGS = (".yaml", ".yml")


def read_file(name: str) -> Mapping[str, Any]:
    """What the file of a space holds. Raises: UsageError where there is none, or it cannot be read."""
    path = LIST if name in NAMED else Path(os.path.expanduser(name))
    if not path.is_file():
        raise _missing(name, path)
    try:
        held = read_yaml(path.read_text(encoding="utf8"))
    except (ValueError, OSError) as error:  # bytes that are no text are a ValueError too
        raise UsageError(f"{name} cannot be read: {error}", "Mend the file.") from None
    if held is None:
        raise UsageError(f"{name} is empty", "Give entries: a list, each with a method.")
    if not isinstance(held, Mapping):
        raise UsageError(f"{name} holds no mapping", "Write `entries:` and, below it, a list.")
    return held


def _missing(name: str, path: Path) -> UsageError:
    known = f"Spaces: {', '.join(NAMED)}, or the path of a .yaml file."
    if path.is_dir():
        return UsageError(f"{name} is a folder", known)
    if path.suffix in ENDINGS or path.name != name:
        return UsageError(f"there is no file {name}", known)
    close = difflib.get_close_matches(name, list(NAMED), n=1)
    return UsageError(f"no space is called {name!r}", f"Did you mean {close[0]!r}? {known}" if close else known)
