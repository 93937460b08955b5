"""inlay train"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console

from inlay.errors import UsageError
from inlay.runs.settings import Settings

from . import flags
from .bar import Bar
from .common import console, counted, emit, scores_table


def earlier(kind: type[Settings]) -> flags.Earlier:
    """The settings, of a kind, of the run that is to be resumed, where there is one."""
    return lambda given: _earlier(kind, given)


def _earlier(kind: type[Settings], given: dict[str, Any]) -> dict[str, Any]:
    if not given.get("resume"):
        return {}
    if not given.get("out"):
        raise UsageError("--resume does not say what to go on with", "Give --out: the run's folder.")
    if not isinstance(given["out"], str):
        return {}
    from inlay.runs.folder import RunFolder
    from inlay.values import fields_of

    config = dict(RunFolder(given["out"]).read().get("config", {}))
    if not config and not given.get("data"):
        raise UsageError(f"{given['out']} holds no run to go on with", "Check --out, or begin one with --data.")
    names = {field.name for field in fields_of(kind)} - {"resume", "out"}
    if "epochs" in given and "steps" not in given:  # which else would win
        names.discard("steps")
    return {name: value for name, value in config.items() if name in names}


@flags.command(Settings, "training", earlier(Settings), several=True)
def command(settings: Settings, as_json: bool) -> None:
    """Train an adapter on a data file: LoRA by default.

    Columns text and label (scored over the labels' words), prompt and completion, or messages are recognised. With
    --task classify, regress or tag a head is trained: on text with labels or numbers, or on tokens with tags.

        inlay train --data reviews.csv --out runs/reviews
    """
    from inlay.runs.run import run

    with Bar() as bar:
        result = run(settings, bar.step, bar.message, bar.preparing)
    for reason, count in result["rows"].items():
        if count and reason != "rows":
            console.print(f"{count} of {result['rows']['rows']} rows {reason}", highlight=False)
    if result["duplicates"]:
        console.print(f"{result['duplicates']} rows stand there more than once", highlight=False)
    if as_json:
        emit(result, True)
    else:
        _show(settings, result)
    if result["status"].startswith("diverged"):
        raise typer.Exit(1)


def _show(settings: Settings, result: Mapping[str, Any]) -> None:
    """What came of it, where it is, and what to type next."""
    out = Console(highlight=False)
    if result.get("heldout"):
        names = {"base": "heldout_base", "adapter": "heldout"}
        scores = {name: (result[own], result.get(f"{own}_intervals", {})) for name, own in names.items() if result[own]}
        out.print(scores_table(scores, result["final_rows"]))
    out.print(
        f"{result['status']} after {counted(result['steps'], 'step')}, {result['tokens']:,} tokens "
        f"in {_time(result['seconds'])} ({result['tokens_per_second']:,.0f} tokens/s), "
        f"{result['peak_memory_mb']:,.0f} MB at most, {result['trainable_parameters']:,} parameters trained",
        soft_wrap=True,
    )
    predicted = result["predicted"]
    before = "" if predicted["seconds"] is None else f"{_time(predicted['seconds'])}, "
    out.print(f"predicted before: {before}{predicted['memory_mb']:,.0f} MB", style="dim")
    lines = [("adapter", result["adapter"]), ("report", f"{settings.out}/report.html")]
    out.print("\n".join(f"{name:8} {path}" for name, path in lines), markup=False, soft_wrap=True)
    base = "" if settings.base == "smollm2" else f" --base {shlex.quote(settings.base)}"
    adapter = f"{base} --adapter {shlex.quote(settings.out)}"
    if result["status"].startswith("diverged"):
        return
    out.print("\nnext:", style="dim")
    for line in (
        f"inlay predict{adapter} --data NEW.csv --out said.csv",
        f"inlay eval{adapter} --data TEST.csv",
        f"inlay merge{adapter} --out merged",
    ):
        out.print(f"  {line}", markup=False, soft_wrap=True)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
