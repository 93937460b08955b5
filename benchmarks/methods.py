"""Every method on one task: which rate it wants, what it scores, what it costs. Fills the tables of docs/methods.md.

Film reviews (Rotten Tomatoes), SmolLM2-135M, 16 rows a step, AdamW, linear schedule. Four kinds of cells, each in a
process of its own, appended to a file as they are done, so that a call goes on where the last one stopped:

    screen   480 rows, three rates of each method, many methods in one stream; the rate is chosen on 300 rows, and the
             adapter of that rate scored on 1,000 others that nothing was chosen by
    main     the main methods on 2,000 rows with that rate, by three seeds
    peft     HF PEFT's own training of the same rows, rate and seed, for LoRA, IA3, prefix and prompt tuning
    cost     each method alone: speed of training, peak memory, file, time that a token of an answer takes more

    python benchmarks/methods.py --minutes 60                  go on for an hour
    python benchmarks/methods.py --minutes 0 --page docs/methods.md      nothing but the tables, from what is there
    python benchmarks/methods.py --only lora,ia3 --kinds screen,cost --cells /tmp/cells.jsonl
    python benchmarks/methods.py --kinds screen,main,peft --processes 10 --dtype float32      where a GPU is

Each cell names its device. Costs are measured one process at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from method_parts import CASES, MAIN, PEFT, SEEDS
from pages import write_between
from rich.console import Console

Cell = dict[str, Any]
HERE = Path(__file__).resolve().parent
KINDS = ("screen", "main", "peft", "cost")
TOGETHER = 2
"""Methods whose three rates are one stream."""
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
console = Console(stderr=True, highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90, help="begin no cell after so many")
    parser.add_argument("--cells", type=Path, default=HERE / "methods.jsonl", help="the file of finished cells")
    parser.add_argument("--only", default="", help="some of the cases, with commas between")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of " + ", ".join(KINDS))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--processes", type=int, default=1, help="so many cells at once, costs aside")
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    a = parser.parse_args()
    a.only = [name.strip() for name in a.only.split(",") if name.strip()] or list(CASES)
    a.kinds = [name.strip() for name in a.kinds.split(",")]
    if unknown := [name for name in (*a.only, *a.kinds) if name not in (*CASES, *KINDS)]:
        parser.error(f"unknown: {', '.join(unknown)}. Cases: {', '.join(CASES)}")
    return a


def read_cells(path: Path) -> dict[tuple[Any, ...], Cell]:
    """The last cell of each kind, case and seed."""
    lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    cells = [json.loads(line) for line in lines]
    return {(cell["kind"], cell["case"], cell.get("seed")): cell for cell in cells}


def missing(a: argparse.Namespace, cells: dict[tuple[Any, ...], Cell]) -> Iterator[tuple[str, list[str], int]]:
    """The next calls of method_parts.py: a kind, cases, a seed."""
    due = [case for case in a.only if ("screen", case, 0) not in cells and "screen" in a.kinds]
    for first in range(0, len(due), TOGETHER):
        yield "screen", due[first : first + TOGETHER], 0
    for kind, cases, seeds in (("main", MAIN, SEEDS), ("peft", PEFT, SEEDS[:1]), ("cost", CASES, (0,))):
        for seed in seeds:
            for case in [one for one in cases if one in a.only and kind in a.kinds]:
                if (kind, case, seed) not in cells:
                    yield kind, [case], seed


def run_cell(a: argparse.Namespace, kind: str, cases: Sequence[str], seed: int, rates: dict[str, float]) -> list[Cell]:
    """The cells of one process; where it fails, those of a process for each case, and cells that say so."""
    command = [sys.executable, str(HERE / "method_parts.py"), kind, ",".join(cases), "--seed", str(seed)]
    command += ["--dtype", a.dtype, "--rates", json.dumps(rates)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode and len(cases) > 1:
        return [cell for case in cases for cell in run_cell(a, kind, [case], seed, rates)]
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        console.print(f"{kind} {', '.join(cases)}: failed: {why}", style="red")
        found = [{"kind": kind, "case": case, "seed": seed, "error": why} for case in cases]
    return found


def fill(a: argparse.Namespace) -> None:
    """Do what is missing until the time is over, a kind after the other: the first one finds the rates of the next."""
    end = time.monotonic() + 60 * a.minutes

    def cell(call: tuple[str, list[str], int]) -> None:
        if (begun := time.monotonic()) >= end:
            return
        found = run_cell(a, *call, rates)
        with a.cells.open("a", encoding="utf8") as file:
            file.write("".join(json.dumps(one) + "\n" for one in found))
        console.print(f"{call[0]} {', '.join(call[1])}, seed {call[2]}: {time.monotonic() - begun:.0f} s")

    for kind, calls in groupby(missing(a, read_cells(a.cells)), key=lambda call: call[0]):
        cells = read_cells(a.cells).items()
        rates = {case: cell["rate"] for (made, case, _), cell in cells if made == "screen" and "rate" in cell}
        with ThreadPoolExecutor(1 if kind == "cost" else a.processes) as pool:
            list(pool.map(cell, calls))
    console.print(f"{sum(1 for _ in missing(a, read_cells(a.cells)))} calls left")


# ---- the tables


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], lacking: Sequence[str]) -> list[str]:
    """The rows that there are, and the names of those that are missing."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    lines.insert(1, "|" + "---|" * len(columns))
    return [*(lines if rows else ()), *([""] if rows and lacking else ()), *missed(lacking)]


def missed(lacking: Sequence[str]) -> list[str]:
    return [f"Missing: {', '.join(lacking)}."] if lacking else []


def place(cell: Cell) -> str:
    return f"{cell['device']} in {cell['dtype'].removeprefix('torch.')}"


def usual_place(cells: Sequence[Cell]) -> str:
    """Where most cells came about."""
    places = [place(cell) for cell in cells if "device" in cell]
    return max(places, key=places.count, default="nowhere")


def screened(cells: dict[tuple[Any, ...], Cell]) -> list[str]:
    found = {case: cells.get(("screen", case, 0), {}) for case in CASES}
    usual = usual_place([*found.values()])
    rows = []
    for case, own in sorted(found.items(), key=lambda one: -one[1].get("accuracy", 0)):
        if not own:
            continue
        name = case if place(own) == usual else f"{case} ({place(own)})"
        if "error" in own:
            rows.append([name, own["error"], "", "", ""])
            continue
        low, high = own["interval"]
        others = ", ".join(f"{float(rate):.2g} {loss:.3f}" for rate, loss in own["tried"].items())
        rows.append(
            [name, percent(own["accuracy"]), f"{percent(low)} to {percent(high)}", f"{own['rate']:.2g}", others]
        )
    lacking = [case for case, own in found.items() if not own]
    columns = ["method", "accuracy, %", "95 %", "rate", "rates that were tried, loss on the choosing rows"]
    elsewhere = " but for rows that say otherwise" if any(own and place(own) != usual for own in found.values()) else ""
    return [f"Trained and scored on {usual}{elsewhere}.", "", *table(columns, rows, lacking)]


def costs(cells: dict[tuple[Any, ...], Cell]) -> list[str]:
    found = {case: cells.get(("cost", case, 0), {}) for case in CASES}
    columns = ["method", "trained", "of the base", "file, KB", "tokens/s", "peak MB", "ms a token more", "merges"]
    rows = [
        [
            case, f"{cost['trained']:,}", f"{100 * cost['trained'] / cost['base']:.3f} %",
            f"{cost['bytes'] / 1024:,.0f}", f"{cost['tokens/s']:,.0f}", f"{cost['peak MB']:,.0f}",
            f"{cost['ms a token']:+.1f}", "yes" if cost["merges"] else "no",
        ]
        for case, cost in found.items() if "trained" in cost
    ]  # fmt: skip
    if not rows:
        return ["What each costs has not been measured yet."]
    lacking = [case for case, cost in found.items() if "trained" not in cost]
    return [f"What each costs, on {usual_place([*found.values()])}:", "", *table(columns, rows, lacking)]


def mains(cells: dict[tuple[Any, ...], Cell]) -> list[str]:
    rows, lacking = [], []
    for case in MAIN:
        own = {seed: cells.get(("main", case, seed), {}) for seed in SEEDS}
        there = [cell for cell in own.values() if "accuracy" in cell]
        lacking += [f"{case} with seed {seed}" for seed, cell in own.items() if "accuracy" not in cell]
        if not there:
            continue
        theirs = cells.get(("peft", case, 0), {})
        other = ("missing" if case in PEFT else "–") if "accuracy" not in theirs else percent(theirs["accuracy"])
        mean = percent(statistics.mean(cell["accuracy"] for cell in there))
        shown = ", ".join(percent(cell["accuracy"]) for cell in there)
        rows.append([case, place(there[0]), f"{there[0]['rate']:.2g}", shown, mean, other])
    if not rows:
        return ["2,000 rows with three seeds have not been trained on yet, nor HF PEFT's own training beside them."]
    columns = ["method", "on", "rate", "accuracy by seed, %", "mean", "HF PEFT's own, seed 0"]
    return ["2,000 rows, three seeds, the same 1,000 rows:", "", *table(columns, rows, lacking)]


def tables(cells: dict[tuple[Any, ...], Cell]) -> str:
    base = next((cell["base accuracy"] for cell in cells.values() if "base accuracy" in cell), None)
    plain = "" if base is None else f" The base without an adapter: {percent(base)} %."
    return "\n".join([
        f"480 rows, one pass, best of the rates by 300 rows, scored on 1,000 others, one seed.{plain}",
        *screened(cells), "", *costs(cells), "", *mains(cells),
    ])  # fmt: skip


def main() -> None:
    a = arguments()
    fill(a)
    text = tables(read_cells(a.cells))
    print(text)
    if a.page:
        write_between(a.page, (BEGIN, END), text)


if __name__ == "__main__":
    main()
