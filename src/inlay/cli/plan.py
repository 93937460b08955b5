"""inlay plan"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from inlay.planning.settings import WITHOUT, PlanSettings

from . import flags
from .common import console, counted, emit

__all__ = ["command"]

LEAST = 0.01
"""Share of the letters from which on a script is named."""


@flags.command(PlanSettings, "planning", without=WITHOUT)
def command(settings: PlanSettings, as_json: bool) -> None:
    """Say which method to take for your data, whether it fits, how long it takes, and what it costs in use.

        inlay plan --data reviews.csv --memory 8GB --budget 30m

    Every method is made on the base and counted; steps and answers are tried for --seconds. Nothing is kept.
    """
    from inlay.planning.plan import plan

    with console.status("opening data and base") as status:
        result = plan(
            settings,
            lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
            lambda what, done, total: status.update(f"{what} {done} of {total} methods and sizes"),
        )
    if as_json:
        emit(result, True)
    else:
        _show(result)


def _show(result: Mapping[str, Any]) -> None:
    out = Console(highlight=False)
    data, course, base = result["data"], result["course"], result["base"]
    sizes = data["lengths"]
    labels = ", ".join(f"{name} {count:,}" for name, count in data["labels"].items())
    out.print(
        f"{counted(data['rows'], 'row')} to train on{f' ({labels})' if labels else ''}, {sizes['mean']:,.0f} tokens in "
        f"the mean, {sizes['longest']:,} at most: {counted(course['steps'], 'step')} of {course['tokens_a_step']:,.0f} "
        "tokens",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    if line := _writing(data):
        out.print(line, soft_wrap=True, markup=False)
    out.print(
        f"{base['name']}: {base['parameters']:,} parameters in {base['dtype']} on {base['device']}, "
        f"{base['memory_mb']:,.0f} MB before training"
        + (f", {base['token_ms']:,.1f} ms a token of an answer" if base["token_ms"] else ""),
        soft_wrap=True, markup=False,
    )  # fmt: skip
    out.print(table(result))
    for one in result["left_out"]:
        out.print(f"left out: {one['label']}: {one['why']}", soft_wrap=True, markup=False, style="dim")
    out.print(_heldout(result["heldout"]), soft_wrap=True, markup=False)
    for one in result["warnings"]:
        whose = f"with {', '.join(one['methods'])}, " if one["methods"] else ""
        out.print(f"warning: {whose}{one['text']}", soft_wrap=True, markup=False, style="yellow")
    out.print("\n" + " ".join(result["why"]), soft_wrap=True, markup=False)
    if result["command"]:
        out.print("\nnext:", style="dim")
        out.print(f"  {result['command']}", soft_wrap=True, markup=False)


def _writing(data: Mapping[str, Any]) -> str:
    """The scripts of the rows, and how the base's tokenizer cuts them."""
    shares = [f"{name} {100 * share:.0f} %" for name, share in data["scripts"].items() if share >= LEAST]
    if not shares or data["characters_a_token"] is None:
        return ""
    said = f"script, by letters (what language it is, is not told): {', '.join(shares)}; "
    said += f"{data['characters_a_token']:.1f} characters a token"
    if data["characters_a_token"] < 1:
        said += ": the base's tokenizer hardly knows this writing, one that does will be faster"
    return said


def table(result: Mapping[str, Any]) -> Table:
    """The methods in their usual sizes, and all sizes of the one that is chosen."""
    chosen = result["choice"]
    shown = [own for own in result["methods"] if not own["set"] or (chosen and own["method"] == chosen["method"])]
    caption = (
        "memory in MB; ms for a token of an answer, merged where it merges; ~ as methods of its kind that "
        "were measured; other sizes are in --json"
    )
    found = Table(
        title="what each takes", title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for name in ("method", "trains", "file", "memory", "time", "ms", "merges", "fits"):
        right = name not in ("method", "fits")
        found.add_column(
            name, justify="right" if right else "left", no_wrap=name not in ("method", "fits"), overflow="fold"
        )
    for own in sorted(shown, key=lambda one: (bool(one["misses"]), one["seconds"])):
        rough = "" if own["how"] == "measured" else "≥" if own["how"].startswith("at least") else "~"
        style = "bold" if chosen and own["label"] == chosen["label"] else None
        merges, token = "yes" if own["merges"] else "no", _ms(own["token_ms"], rough and not own["merges"])
        found.add_row(
            own["label"], _short(own["trainable_parameters"]), f"{_short(own['file_mb'] * 2**20)}B",
            f"{own['memory_mb']:,.0f}", f"{rough}{_time(own['seconds'])}", token, merges, _fits(own["misses"]),
            style=style,
        )  # fmt: skip
    return found


def _short(count: float) -> str:
    """A count in three digits: 933k, 12.4M."""
    for size, mark in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{mark}" if count < 999.5 * size else f"{count / size:,.0f}{mark}"
    return f"{count:.0f}"


def _ms(value: float | None, rough: bool | str) -> str:
    return "–" if value is None else f"{'~' if rough else ''}{value:,.1f}"


def _fits(misses: Sequence[str]) -> str:
    return "yes" if not misses else "; ".join(misses)


def _heldout(held: Mapping[str, Any]) -> str:
    there, points = held["final_rows"], held["points_told_apart"]
    few = f"{'is' if there == 1 else 'are'} too few to tell anything"
    told = few if points is None else f"tell {points:.1f} points of accuracy apart"
    return (
        f"{counted(there, 'final row')} held out {told}; 1 point takes {held['rows_for_1_point']:,}, or "
        f"{held['rows_for_1_point_4_of_5']:,} to see it four times of five (models that disagree on "
        f"{100 * held['disagree']:.0f} of 100 rows)"
    )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
