"""What virtual tokens and prefixes cost: time of training and of answers, memory, and score, by their number.

0 to 100 of them, as prompt tuning's and as prefix tuning's, against rows of 32 to 1,024 tokens, beside LoRA r=8. "none"
is the base with nothing trained: its answers, and its forward and backward down to the embeddings. All cases of one
length take turns in one process, so that each is paired with none; memory is a process of its own a cell; scores are
of 480 film reviews, trained in one mixed stream at the methods' usual rates. Cells are appended to a file as they are
done, so that a call goes on where the last one stopped; steps and answers come first, a quarter of an hour of quiet.

    python benchmarks/prefix_cost.py --minutes 15
    python benchmarks/prefix_cost.py --kinds score --minutes 60
    python benchmarks/prefix_cost.py --minutes 0 --page docs/performance.md --plot docs/prefix_cost.svg
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import write_between
from prefix_cost_parts import CASES, COUNTS, LENGTHS, LORA, METHODS, NONE, TOKENS
from prefix_cost_plot import plot
from rich.console import Console

Cell = dict[str, Any]
HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- prefix cost: begin -->", "<!-- prefix cost: end -->"
KINDS = ("step", "answer", "memory", "score")
console = Console(stderr=True, highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="begin no cell after so many")
    parser.add_argument("--cells", type=Path, default=HERE / "prefix_cost.jsonl", help="the file of finished cells")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which cells: step, answer, memory, score")
    parser.add_argument("--seeds", type=int, default=1, help="of the scores")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step that is timed")
    parser.add_argument("--rows", type=int, default=480, help="reviews to train on")
    parser.add_argument("--test", type=int, default=1000, help="reviews to score on")
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    parser.add_argument("--plot", type=Path, help="draw the times into this SVG")
    a = parser.parse_args()
    a.kinds = a.kinds.split(",")
    if unknown := set(a.kinds) - set(KINDS):
        parser.error(f"unknown: {', '.join(unknown)}. Kinds: {', '.join(KINDS)}")
    return a


def wanted(a: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """The cells, as `prefix_cost_parts.py` is called for each."""
    for kind in a.kinds:
        if kind in ("step", "answer"):
            yield from ((kind, str(length)) for length in LENGTHS)
        elif kind == "memory":
            yield from ((kind, str(length), case) for length in LENGTHS for case in CASES)
        else:
            yield from ((kind, str(seed)) for seed in range(a.seeds))


def key(cell: Cell) -> tuple[str, ...]:
    if cell["kind"] == "score":
        return "score", str(cell["seed"])
    return cell["kind"], str(cell["length"]), *([cell["case"]] if cell["kind"] == "memory" else [])


def read_cells(a: argparse.Namespace) -> dict[tuple[str, ...], Cell]:
    """The last of each that was measured with this base in this dtype."""
    lines = a.cells.read_text(encoding="utf8").splitlines() if a.cells.exists() else []
    cells = [cell for cell in map(json.loads, lines) if (cell["base"], cell["dtype"]) == (a.base, a.dtype)]
    return {key(cell): cell for cell in cells}


def fill(a: argparse.Namespace) -> None:
    end, there = time.monotonic() + 60 * a.minutes, read_cells(a)
    for one in wanted(a):
        if one in there or time.monotonic() >= end:
            continue
        command = [sys.executable, str(HERE / "prefix_cost_parts.py"), *one, "--base", a.base, "--dtype", a.dtype]
        command += ["--tokens", str(a.tokens), "--rows", str(a.rows), "--test", str(a.test)]
        begun = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"kind"')]
        if done.returncode or not lines:
            why = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
            console.print(f"{' '.join(one)}: failed: {why}", style="red")
            continue
        with a.cells.open("a", encoding="utf8") as file:
            file.write(lines[-1] + "\n")
        console.print(f"{' '.join(one)}: {time.monotonic() - begun:.0f} s")


# ---- the tables


def ratio(cell: Cell, case: str, what: str) -> float:
    """The median over rounds of the case's time by that of none."""
    own, none = cell["cases"][case][what], cell["cases"][NONE][what]
    return statistics.median(a / b for a, b in zip(own, none, strict=True))


def middle(cell: Cell, case: str, what: str) -> float:
    return statistics.median(cell["cases"][case][what])


def times(cells: dict[tuple[str, ...], Cell], what: str, unit: str, factor: float) -> list[str]:
    """A table of one time: none in its unit, all others as multiples of it."""
    kind = "step" if what == "step" else "answer"
    found = {length: cells[one] for length in LENGTHS if (one := (kind, str(length))) in cells}
    if not found:
        return ["Not measured yet."]
    lines = ["| | " + " | ".join(f"rows of {length:,}" for length in found) + " |", "|---" * (len(found) + 1) + "|"]
    lines.append(
        f"| none, {unit} | " + " | ".join(f"{factor * middle(cell, NONE, what):,.1f}" for cell in found.values()) + " |"
    )
    for case in CASES[1:]:
        own = [f"{ratio(cell, case, what):.2f}" for cell in found.values()]
        lines.append(f"| {named(case)} | " + " | ".join(own) + " |")
    return lines


def named(case: str) -> str:
    name, _, count = case.partition(" ")
    return "LoRA r 8" if case == LORA else f"{name} tuning, {count}"


def memory(cells: dict[tuple[str, ...], Cell]) -> list[str]:
    lengths = [length for length in LENGTHS if ("memory", str(length), NONE) in cells]
    if not lengths:
        return ["Not measured yet."]
    lines = ["| | " + " | ".join(f"rows of {length:,}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for case in CASES:
        own = [cells.get(("memory", str(length), case)) for length in lengths]
        shown = ["–" if cell is None else f"{cell['peak_mb']:,.0f}" for cell in own]
        lines.append(f"| {'none' if case == NONE else named(case)} | " + " | ".join(shown) + " |")
    return lines


def scores(cells: dict[tuple[str, ...], Cell]) -> list[str]:
    found = [cell for one, cell in sorted(cells.items()) if one[0] == "score"]
    if not found:
        return ["Not measured yet."]
    lines = ["| | accuracy, % | 95 % interval of the first seed | loss |", "|---|---|---|---|"]
    for case in CASES:
        own = [cell["cases"][case] for cell in found if case in cell["cases"]]
        if not own:
            lines.append(f"| {named(case)} | diverged | | |")
            continue
        low, high = own[0]["interval"]
        shown = ", ".join(f"{100 * one['accuracy']:.1f}" for one in own)
        name = "0: the base" if case == NONE else named(case)
        loss = statistics.fmean(one["loss"] for one in own)
        lines.append(f"| {name} | {shown} | {100 * low:.1f} to {100 * high:.1f} | {loss:.3f} |")
    first = found[0]
    rows = f"{first['rows']:,} film reviews to train on, one pass, {first['test']:,} others to score on"
    return [*lines, "", f"{rows}; {len(found)} seed{'s' if len(found) > 1 else ''}, usual rates."]


def report(a: argparse.Namespace) -> str:
    cells = read_cells(a)
    picture = [f"![time of a step by virtual tokens]({a.plot.name})", ""] if a.plot and a.plot.exists() else []
    return "\n".join([
        f"{a.base} in {a.dtype}, {os.cpu_count()} cores; {a.tokens:,} tokens a step, virtual ones left out.", "",
        *picture,
        "Forward and backward of a step, as multiples of none's:", "", *times(cells, "step", "s", 1), "",
        "A token of an answer to one row, as multiples of none's:", "", *times(cells, "token", "ms", 1e3), "",
        "Until the first token, as multiples of none's:", "", *times(cells, "first", "ms", 1e3), "",
        "Peak memory of a step, MB, a process each:", "", *memory(cells), "",
        "Score:", "", *scores(cells),
    ])  # fmt: skip


def draw(a: argparse.Namespace) -> None:
    """The picture, where all lengths are measured."""
    cells = read_cells(a)
    found = {length: cells[one] for length in LENGTHS if (one := ("step", str(length))) in cells}
    if found:
        curves = {
            (method, length): [(0.0, 1.0), *((float(n), ratio(cell, f"{method} {n}", "step")) for n in COUNTS)]
            for method in METHODS for length, cell in found.items()
        }  # fmt: skip
        a.plot.write_text(plot(curves), encoding="utf8")


def main() -> None:
    a = arguments()
    fill(a)
    if a.plot:
        draw(a)
    text = report(a)
    print(text)
    if a.page:
        write_between(a.page, (BEGIN, END), text)


if __name__ == "__main__":
    main()
