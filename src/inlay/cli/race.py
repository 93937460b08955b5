"""inlay race"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from inlay.race.settings import ASKED, WITHOUT, RaceSettings

from . import flags
from .board import Board
from .common import console, counted, emit, number
from .train import earlier

__all__ = ["command"]


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
        result = race(settings, board.step, board.message, board.preparing)
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
    out.print(places(result))
    if result["winner"] is None:
        out.print("no contender has a score: all diverged. Try a third of these rates, or --warmup 0.1.")
        return
    saved = result["whole_tokens"] / max(result["tokens"], 1)
    out.print(
        f"{result['winner']} wins: {counted(result['tokens'], 'token')} in all, {saved:.1f} times fewer than training "
        f"all to the end",
        soft_wrap=True,
    )
    out.print(f"adapter  {result['adapter']}\nreport   {settings.out}/report.html", markup=False, soft_wrap=True)


def places(result: Mapping[str, Any]) -> Table:
    """The contenders in their places."""
    metric = result["metric"]
    rows = counted(result["final_rows"], "final row")
    table = Table(title=f"{metric} on {rows}, 95 % interval; base {number(result['base'])}", title_justify="left")
    for name in ("", "contender", metric, "choosing", "parameters", "tokens", "state"):
        table.add_column(name, justify="left" if name in ("contender", "state") else "right", overflow="fold")
    for place, own in enumerate(result["contenders"], 1):
        interval = own["interval"]
        within = "" if interval is None else f" ({number(interval[0])} – {number(interval[1])})"
        table.add_row(
            str(place), own["name"], f"{number(own['score'])}{within}", number(own["choosing"]),
            f"{own['trainable_parameters'] or 0:,}", f"{own['tokens'] or 0:,}", own["status"],
        )  # fmt: skip
    return table
