"""What all commands share: the last net under errors, one JSON object on stdout, tables for people."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from inlay.bases.quiet import hush
from inlay.errors import InlayError, UsageError
from inlay.files import finite
from inlay.runs.processes import place

__all__ = [
    "Json",
    "console",
    "counted",
    "emit",
    "fail",
    "guarded",
    "json_line",
    "number",
    "quiet_unless_first",
    "scores_table",
]

console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, and nothing else there")]


@contextmanager
def guarded(doing: str = "the command") -> Iterator[None]:
    """Turn what went wrong into one line on stderr and an exit code: 1 failed, 2 wrong use, 130 interrupted.

    What nobody foresaw is said with what was being done, and its traceback goes into a log file.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the passes that gain by it switch it on
    hush()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except InlayError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt as stopped:
        fail(f"interrupted. {stopped}" if str(stopped) else "interrupted", 130)
    except MemoryError:
        fail(f"out of memory while {doing}. Lower --tokens-at-once or --max-length", 1)
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or ''} (while {doing}). Check the path and the disk", 1)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        fail(f"{doing} failed ({type(error).__name__}: {why[:200]}). More is in {_log(doing)}", 1)


def quiet_unless_first() -> None:
    """Of several processes that a launcher has started, the first one speaks for all."""
    with suppress(UsageError):  # what is wrong there is said where processes are used
        if (here := place()) is not None and here.rank:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def fail(line: str, code: int) -> NoReturn:
    """Say one line and end with `code`."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(line.split()))
    sys.stderr.write(f"error: {shown}\n")
    raise typer.Exit(code) from None


def _log(doing: str) -> str:
    """The file that the traceback in flight is written to; a word where no disk takes it."""
    from inlay.bases.cache import home

    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {doing}\n{' '.join(sys.argv)}\n\n{traceback.format_exc()}"
    for folder in (home() / "logs", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"inlay-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
            file.write_text(text, encoding="utf8", errors="backslashreplace")
        except OSError:
            continue
        return str(file)
    return "no file (no disk took it)"


def emit(result: Mapping[str, Any], as_json: bool) -> None:
    """One JSON object on one line of stdout, or the same for people."""
    if as_json:
        sys.stdout.write(json_line(finite(result)))
        return
    out = Console(highlight=False)
    for name, value in result.items():
        out.print(f"[bold]{name}[/bold]: ", end="")
        out.print(number(value) if isinstance(value, float) else value, markup=False, soft_wrap=True)


def json_line(value: Any) -> str:
    """JSON on one line: letters as they are where the output takes them, escaped where it does not."""
    line = json.dumps(value, ensure_ascii=False, default=str)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf8")
    except UnicodeEncodeError:
        line = json.dumps(value, default=str)
    return line + "\n"


def number(value: float | None) -> str:
    """A number as people read it."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.001 else f"{value:.3f}"


def counted(number: int, thing: str) -> str:
    """ "1 row", "2 rows"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


Intervals = Mapping[str, Sequence[float]]


def scores_table(columns: Mapping[str, tuple[Mapping[str, float], Intervals]], rows: int) -> Table:
    """Metrics by line, with their 95 % intervals; a column for each of the base and the adapters."""
    table = Table(title=f"on {counted(rows, 'row')}, 95 % intervals", title_justify="left", title_style="dim")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for metric in dict.fromkeys(name for scores, _ in columns.values() for name in scores):
        cells = [_cell(scores.get(metric), intervals.get(metric)) for scores, intervals in columns.values()]
        table.add_row(metric, *cells)
    return table


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or interval is None:
        return number(value)
    return f"{number(value)}  ({number(interval[0])} – {number(interval[1])})"
