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


def screened(cells: dict[tuple[Any, ...], Cell]) -> list[str]:
    columns = ["method", "accuracy, %", "95 %", "rate", "trained", "of the base", "file, KB", "tokens/s", "peak MB"]
    columns += ["ms a token more", "merges"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    found = [(case, cells.get(("screen", case, 0)), cells.get(("cost", case, 0)) or {}) for case in CASES]
    for case, own, cost in sorted(found, key=lambda one: -(one[1] or {}).get("accuracy", 0)):
        if own is None or "error" in own:
            lines.append(f"| {case} | {'missing' if own is None else own['error']} |" + " |" * 9)
            continue
        low, high = own["interval"]
        there = "error" not in cost and bool(cost)
        costs = [
            f"{cost['trained']:,}", f"{100 * cost['trained'] / cost['base']:.3f} %", f"{cost['bytes'] / 1024:,.0f}",
            f"{cost['tokens/s']:,.0f}", f"{cost['peak MB']:,.0f}", f"{cost['ms a token']:+.1f}",
            "yes" if cost["merges"] else "no",
        ] if there else ["missing"] * 7  # fmt: skip
        row = [case, percent(own["accuracy"]), f"{percent(low)} to {percent(high)}", f"{own['rate']:g}", *costs]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def mains(cells: dict[tuple[Any, ...], Cell]) -> list[str]:
    lines = ["| method | rate | accuracy by seed, % | mean | HF PEFT's own, seed 0 |", "|---|---|---|---|---|"]
    for case in MAIN:
        own = [cells.get(("main", case, seed)) for seed in SEEDS]
        there = [cell for cell in own if cell is not None and "error" not in cell]
        shown = ", ".join(percent(cell["accuracy"]) for cell in there) or "missing"
        if len(there) < len(SEEDS):
            shown += f" ({len(SEEDS) - len(there)} of {len(SEEDS)} missing)"
        theirs = cells.get(("peft", case, 0))
        other = (
            "–" if case not in PEFT else percent(theirs["accuracy"]) if theirs and "accuracy" in theirs else "missing"
        )
        mean = percent(statistics.mean(cell["accuracy"] for cell in there)) if there else "–"
        rate = f"{there[0]['rate']:g}" if there else "–"
        lines.append(f"| {case} | {rate} | {shown} | {mean} | {other} |")
    return lines


def tables(cells: dict[tuple[Any, ...], Cell]) -> str:
    base = next((cell["base accuracy"] for cell in cells.values() if "base accuracy" in cell), None)
    plain = "" if base is None else f" The base without an adapter: {percent(base)} %."
    return "\n".join([
        f"480 rows, best of three rates, scored on 1,000 others:{plain}", "", *screened(cells), "",
        "2,000 rows, three seeds, the same 1,000 rows:", "", *mains(cells),
    ])  # fmt: skip


def main() -> None:
    a = arguments()
    fill(a)
    text = tables(read_cells(a.cells))
    print(text)
    if a.page:
        page = a.page.read_text(encoding="utf8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        a.page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf8")


if __name__ == "__main__":
    main()
