"""The shell command that repeats a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from inlay.data.yaml import read_yaml
from inlay.values import fields_of

from .settings import Settings

__all__ = ["command_of", "command_parts"]

PATHS = ("data", "out", "heldout", "template", "base", "init_from")
"""Settings that may be paths."""
FIRST = ("base", "data", "out", "method", "set")


def command_of(record: Mapping[str, Any], portable: bool = False) -> str:
    """`inlay train ...` with every setting of `record["config"]` that is not the default, quoted for a POSIX shell.

    `portable` leaves of each absolute path its last part and writes to "run", for readers on other machines. "" where
    the record holds no settings.
    """
    return shlex.join(command_parts(record, portable))


def command_parts(
    record: Mapping[str, Any], portable: bool = False, command: str = "train", kind: type[Settings] = Settings
) -> list[str]:
    """As `command_of`, argument by argument and not quoted, for a `command` with settings of this `kind`."""
    config = record.get("config") or {}
    if not config.get("data"):
        return []
    fields = {field.name: field for field in fields_of(kind)}
    names = [*FIRST, *(name for name in fields if name not in FIRST)]
    parts = ["inlay", command]
    for name in names:
        if name == "resume" or name not in config or config[name] == fields[name].default:
            continue
        value = _portable(config[name]) if portable and name in PATHS else config[name]
        if portable and name == "out":
            value = "run"
        parts += _flag(fields[name].flag, name, value)
    return parts


def _flag(flag: str, name: str, value: Any) -> list[str]:
    if value is None:
        return [flag, "none"]
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if name == "columns":
        return _given(flag, ",".join(f"{key}={column}" for key, column in value.items())) if value else []
    if name == "verbalizer":
        return _given(flag, _words(value))
    if isinstance(value, Mapping):
        return [part for key, each in value.items() for part in _given(flag, f"{key}={_yaml(each)}")]
    listed = value if isinstance(value, (list, tuple)) else [value]
    return [part for each in listed for part in _given(flag, str(each))]


def _given(flag: str, value: str) -> list[str]:
    """One flag with its value, which must not be taken for a flag itself."""
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def _words(verbalizer: Any) -> str:
    """Labels and their words as --verbalizer reads them; as JSON where they hold its own marks."""
    if not isinstance(verbalizer, Mapping):
        return str(verbalizer)
    listed = {label: [words] if isinstance(words, str) else list(words) for label, words in verbalizer.items()}
    marked = any(set(",|") & set(word) for words in listed.values() for word in words)
    if marked or any(set(",=") & set(label) for label in listed):
        return json.dumps(listed, ensure_ascii=False)
    return ",".join(f"{label}={'|'.join(words)}" for label, words in listed.items())


def _yaml(value: Any) -> str:
    """A value as --set reads it, on one line; JSON is YAML."""
    if isinstance(value, str):
        try:
            if read_yaml(value) == value:
                return value
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False)


def _portable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_portable(each) for each in value]
    text = str(value)
    windows = len(text) > 2 and text[1] == ":" and text[2] in "\\/"
    absolute = text.startswith(("/", "~", "\\\\")) or windows
    return PurePosixPath(text.replace("\\", "/")).name or text if absolute else value
