"""inlay race"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from inlay.race.settings import ASKED, WITHOUT, RaceSettings
from inlay.runs.folder import RunFolder

from . import flags
from .board import Board
from .common import console, counted, emit, number
from .train import earlier

__all__ = ["command"]

WIDE = 110
"""Columns of a terminal that takes the whole table."""
NAME = 24
"""Letters of a name that stay in one line."""


def _earlier(given: dict[str, Any]) -> Mapping[str, Any]:
    """The settings of the race that is resumed, or of which something is asked."""
    asked = any(given.get(name) for name in ASKED)
    found = dict(earlier(RaceSettings)({**given, "resume": True} if asked else given))
    return {**found, "resume": True} if asked else found


@flags.command(RaceSettings, "the race", _earlier, without=WITHOUT)
def command(settings: RaceSettings, as_json: bool) -> None:
    """Find the method, rank, targets and learning rate for your data: contenders train together, the worse ones leave.

        inlay race --data reviews.csv --out runs/race --budget 20m

    The best adapter is RUN/adapter, every contender's is in RUN/adapters, and RUN/report.html shows what came of it.
    """
    from inlay.race.race import race

    with Board() as board:
        result = race(settings, board.step, board.message, board.preparing, board.turn)
    if as_json:
        emit(result, True)
    elif "asked" in result:
        console.print("asked; the race does it after its next step", highlight=False)
    else:
        _show(settings, result)
    if "asked" not in result and result["winner"] is None:
        raise typer.Exit(1)


def _show(settings: RaceSettings, result: Mapping[str, Any]) -> None:
    """The places, the winner, and what to type next."""
    out = Console(highlight=False)
    out.print(places(result, out.width >= WIDE))
    out.print(_advice(settings, result), markup=False, soft_wrap=True)
    if result["winner"] is None:
        return
    saved = result["whole_tokens"] / max(result["tokens"], 1)
    out.print(
        f"{counted(result['tokens'], 'token')} in all, {saved:.1f} times fewer than training all to the end",
        soft_wrap=True,
    )
    out.print(f"adapter  {result['adapter']}\nreport   {settings.out}/report.html", markup=False, soft_wrap=True)


def _advice(settings: RaceSettings, result: Mapping[str, Any]) -> str:
    """The recommendation, as the report says it."""
    from inlay.reporting.race_advice import advice
    from inlay.reporting.race_entrants import read_race

    folder = RunFolder(settings.out)
    return advice(read_race(folder.path, result, folder.read())).words


def places(result: Mapping[str, Any], wide: bool = True) -> Table:
    """The contenders in their places; with what each took where it is to be `wide`."""
    metric = result["metric"]
    rows = counted(result["final_rows"], "final row")
    table = Table(
        title=f"{metric} on {rows}, 95 % interval; base {number(result['base'])}", title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    timed = wide and any(own.get("token_ms") is not None for own in result["contenders"])
    costs = ["tokens", *(["ms a token"] if timed else [])] if wide else []
    for name in ("", "contender", metric, "choosing", "parameters", *costs, "state"):
        words = name in ("contender", "state")
        least = min(NAME, max(len(own["name"]) for own in result["contenders"])) if name == "contender" else None
        justify = "left" if words else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=not words, min_width=least)
    for place, own in enumerate(result["contenders"], 1):
        interval, trained = own["interval"], own["trainable_parameters"] or 0
        within = "" if interval is None else f" ({number(interval[0])} – {number(interval[1])})"
        state = own["status"] if wide else own["status"].removeprefix("dropped at ")
        took = [f"{own['tokens'] or 0:,}", *([_more(own.get("token_ms"))] if timed else [])] if wide else []
        table.add_row(
            str(place), own["name"], f"{number(own['score'])}{within}", number(own["choosing"]),
            f"{trained:,}" if wide else _short(trained), *took, state,
        )  # fmt: skip
    return table


def _short(count: int) -> str:
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count / 1e3:.3g}k" if count >= 1e3 else str(count)


def _more(milliseconds: float | None) -> str:
    """What a decoded token takes more than with the base alone."""
    return "–" if milliseconds is None else f"{milliseconds:+.2g}"
