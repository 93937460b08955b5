"""What all commands share: errors in one line, settings from flags and files, one JSON object on stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from inlay.errors import InlayError, UsageError

__all__ = [
    "Adapters",
    "BaseName",
    "Device",
    "Dtype",
    "Json",
    "Quantize",
    "Set",
    "columns_of",
    "console",
    "emit",
    "guarded",
    "pairs",
]

console = Console(stderr=True)

BaseName = Annotated[str, typer.Option("--base", help="smollm2, a model folder, a .gguf file or a hub id (org/name).")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; the best there is by default.")]
Quantize = Annotated[
    str | None, typer.Option("--quantize", help="4bit loads the base's linear layers in NF4 (bitsandbytes).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting of the method: --set r=16 --set targets=qv.")]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="An adapter's folder; may be repeated.")]


@contextmanager
def guarded() -> Iterator[None]:
    """Turn what went wrong into one line on stderr and an exit code: 1 failed, 2 wrong use, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except InlayError as error:
        _say(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as stopped:
        _say(f"interrupted. {stopped}" if str(stopped) else "interrupted")
        raise typer.Exit(130) from None
    except MemoryError:
        _say("out of memory. Lower --tokens-at-once or --max-length")
        raise typer.Exit(1) from None
    except OSError as error:
        _say(f"{error.strerror or error}: {error.filename or ''}")
        raise typer.Exit(1) from None


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    sys.stderr.write("error: " + " ".join(line.split()) + "\n")


def emit(result: dict[str, Any], as_json: bool) -> None:
    """One JSON object on one line of stdout, or the same for people."""
    if as_json:
        sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
        return
    for name, value in result.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        Console().print(f"[bold]{name}[/bold]: {shown}", highlight=False)


def pairs(entries: Sequence[str] | None, flag: str) -> dict[str, Any]:
    """`key=value` entries as a mapping; values are read as YAML, so that 8, 0.1, true and [a, b] are what they look."""
    found: dict[str, Any] = {}
    for entry in entries or ():
        key, mark, value = entry.partition("=")
        if not mark or not key.strip():
            raise UsageError(f"{flag} {entry!r} cannot be read", f"Write {flag} key=value.")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[key.strip()] = value
    return found


def columns_of(given: str | None) -> Any:
    """`text=NAME,label=NAME` as Columns. Raises: UsageError naming the columns' kinds."""
    import dataclasses

    from inlay.data.template import Columns

    found = {key: str(value) for key, value in pairs(given.split(",") if given else None, "--columns").items()}
    known = [f.name for f in dataclasses.fields(Columns)]
    for name in found:
        if name not in known:
            raise UsageError(f"--columns names {name!r}", f"Known: {', '.join(known)}.")
    return Columns(**found)


def from_file(path: str | None) -> dict[str, Any]:
    """Settings from a YAML file."""
    if path is None:
        return {}
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"config {path} cannot be read ({str(error).splitlines()[0]})", "Give a YAML file.") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"config {path} holds no settings", "Write key: value lines.")
    return loaded
