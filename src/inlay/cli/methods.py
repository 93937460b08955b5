"""inlay methods"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from inlay.errors import UsageError
from inlay.methods.table import METHODS
from inlay.values import Field, fields_of

from .common import Json, emit, guarded


def command(
    name: Annotated[str | None, typer.Argument(help="one method, with all its settings")] = None, json: Json = False
) -> None:
    """List the methods with their papers and learning rates, or explain the settings of one.

    inlay methods lora
    """
    with guarded("listing methods"):
        if name is not None and name not in METHODS:
            raise UsageError(f"no method is called {name!r}", f"Methods: {', '.join(METHODS)}.")
        chosen = {key: METHODS[key] for key in ([name] if name else METHODS)}
        if json:
            emit({"methods": {key: _told(kind) for key, kind in chosen.items()}}, True)
            return
        out = Console(highlight=False)
        table = Table("method", "title", "paper", "learning rate")
        for key, kind in chosen.items():
            table.add_row(key, kind.title, kind.paper, f"{kind().usual_rate:g}")
        out.print(table)
        for key, kind in chosen.items():
            out.print(f"\n[bold]--method {key}[/bold]: the settings that --set takes")
            out.print(_settings(kind))


def _told(kind: Any) -> dict[str, Any]:
    settings = {
        field.name: {"default": _plain(field), "help": field.help.words, "values": field.expected()}
        for field in fields_of(kind)
    }
    return {"title": kind.title, "paper": kind.paper, "lr": kind().usual_rate, "settings": settings}


def _settings(kind: Any) -> Table:
    table = Table("setting", "default", "what it means", "values", box=None, pad_edge=False)
    for field in fields_of(kind):
        default = _plain(field)
        table.add_row(field.name, "" if default in (None, {}) else str(default), field.help.words, field.expected())
    return table


def _plain(field: Field) -> Any:
    return None if field.default is dataclasses.MISSING else field.default
