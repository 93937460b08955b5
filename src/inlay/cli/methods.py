"""inlay methods"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from inlay.errors import InlayError, UsageError
from inlay.methods.table import GROUPS, METHODS
from inlay.values import Field, fields_of

from .common import Json, emit, guarded

WIDTHS = (17, 6, 30, 16)
"""Of the columns, so that those of all groups stand below one another."""


def command(
    name: Annotated[str | None, typer.Argument(help="one method, with all its settings")] = None, json: Json = False
) -> None:
    """List the methods by what they touch, with their papers and learning rates, or explain one: its settings, what it
    costs, and its paper.

    inlay methods lora
    """
    with guarded("listing methods"):
        if name is not None and name not in METHODS:
            raise UsageError(f"no method is called {name!r}", f"Methods: {', '.join(METHODS)}.")
        if name is not None:
            _explain(name, json)
        elif json:
            emit({"methods": {key: _told(kind) for key, kind in METHODS.items()}}, True)
        else:
            _list()


def _list() -> None:
    out = Console(highlight=False)
    for touched, group in GROUPS.items():
        out.print(f"\n[bold]{touched}[/bold]")
        table = Table.grid(padding=(0, 2))
        for width in WIDTHS:
            table.add_column(min_width=width)
        for key in group:
            kind = METHODS[key]
            table.add_row(f"  {key}", f"{_rate(kind):g}", kind.title, kind.paper)
        out.print(table)
    out.print("\nThe number is the learning rate to begin with.")
    out.print("`inlay methods NAME` explains one: its settings, what it costs, and its paper.")


def _explain(name: str, json: bool) -> None:
    from .method_cost import cost_of

    kind = METHODS[name]
    touched = next(touched for touched, group in GROUPS.items() if name in group)
    cost = _cost(kind, cost_of)
    if json:
        emit({"methods": {name: {**_told(kind), "touches": touched, "cost": cost}}}, True)
        return
    out = Console(highlight=False)
    out.print(f"[bold]{kind.title}[/bold], {kind.paper}\n{touched}")
    out.print(f"Learning rate to begin with: {_rate(kind):g}. {cost}.")
    out.print(f"\n[bold]--method {name}[/bold]: the settings that --set takes")
    out.print(_settings(kind))


def _cost(kind: Any, count: Callable[[Any], Any]) -> str:
    try:
        said = count(kind()).words()
    except InlayError as error:  # no settings are usual
        return str(error).removesuffix(".")
    return said[0].upper() + said[1:].removesuffix(".")


def _rate(kind: Any) -> float:
    try:
        return kind().usual_rate
    except InlayError:  # it has settings without which there is none
        return kind.lr


def _told(kind: Any) -> dict[str, Any]:
    settings = {
        field.name: {"default": _plain(field), "help": field.help.words, "values": field.expected()}
        for field in fields_of(kind)
    }
    return {"title": kind.title, "paper": kind.paper, "lr": _rate(kind), "settings": settings}


def _settings(kind: Any) -> Table:
    table = Table("setting", "default", "what it means", "values", box=None, pad_edge=False)
    for field in fields_of(kind):
        default = _plain(field)
        table.add_row(field.name, "" if default in (None, {}) else str(default), field.help.words, field.expected())
    return table


def _plain(field: Field) -> Any:
    return None if field.default is dataclasses.MISSING else field.default
