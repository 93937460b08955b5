"""The field's advice put to the test on film reviews: rank, alpha, targets, prefixes, dropout, and what the rate does.

Rotten Tomatoes, SmolLM2-135M, the rows and splits of methods.py: 480 rows once (dropout: 200 rows twice), 16 a step,
AdamW, linear schedule, three seeds; 300 rows choose a rate, 1,000 others score and chose nothing. What is compared
trains in one stream. Ranks have a grid of three rates, targets one of two, tried with the first seed; the scales and
dropout take the rate of their rank, and prefixes that of methods.py's grid of three. What the rate does is read from
the cells of methods.py, and of race_worth.py where there are any. Streams are processes of their own, appended to a
file as they are done, so that a call goes on where the last one stopped, one seed of everything first. The whole is 1.4
million tokens of training and 2.8 million of scoring: an hour on two cores at 600 and 1,800 a second.

    python benchmarks/folklore.py --minutes 40
    python benchmarks/folklore.py --minutes 0 --page docs/folklore.md        nothing but the page, from what is there
    python benchmarks/folklore.py --only alpha,dropout --scale 0.05 --cells /tmp/cells.jsonl       a trial
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from folklore_page import page_text
from folklore_parts import SEEDS, STREAMS, TIMED
from pages import write_between
from rich.console import Console

WIDTH = 132
HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Cell = dict[str, Any]
Cells = dict[tuple[str, str, int], Cell]
"""The last cell of each stream, case and seed."""
console = Console(stderr=True, highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40, help="begin no stream after so many")
    parser.add_argument("--cells", type=Path, default=HERE / "folklore.jsonl", help="the file of finished streams")
    parser.add_argument("--only", default="", help="some of the streams, with commas between")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--scale", type=float, default=1.0, help="a share of all rows and steps, for a trial")
    parser.add_argument("--page", type=Path, help="write what came of it between the marks of this page")
    a = parser.parse_args()
    a.only = [name.strip() for name in a.only.split(",") if name.strip()] or [*STREAMS, "time"]
    if unknown := [name for name in a.only if name not in (*STREAMS, "time")]:
        parser.error(f"unknown: {', '.join(unknown)}. Streams: {', '.join(STREAMS)}, time")
    return a


def read_lines(path: Path) -> list[Cell]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()] if path.exists() else []


def read_cells(path: Path, scale: float) -> Cells:
    """Those of trials and of the whole are never mixed."""
    return {(one["kind"], one["case"], one["seed"]): one for one in read_lines(path) if one["scale"] == scale}


def due(a: argparse.Namespace, cells: Cells) -> Iterator[tuple[str, int]]:
    """The streams that are missing, one seed of everything first."""
    for seed in SEEDS:
        for stream, cases in STREAMS.items():
            if stream in a.only and any((stream, case, seed) not in cells for case in cases):
                yield stream, seed
        if seed == SEEDS[0] and "time" in a.only and any(("time", case, 0) not in cells for case in TIMED):
            yield "time", 0


def rates(stream: str, seed: int, cells: Cells, screens: dict[str, float]) -> dict[str, list[float]]:
    """What each case is trained at, where it is not a grid of its own."""
    chosen = {case: cell["rate"] for (_, case, by), cell in cells.items() if by == SEEDS[0] and "rate" in cell}
    found = {}
    for case, (_, _, own) in STREAMS.get(stream, {}).items():
        of = case if not isinstance(own, str) else own
        if seed != SEEDS[0] and case in chosen:
            found[case] = [chosen[case]]
        elif isinstance(own, str):
            found[case] = [rate for rate in (chosen.get(of), screens.get(of)) if rate is not None][:1]
    return {case: own for case, own in found.items() if own}


def fill(a: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * a.minutes
    screens = {
        one["case"]: one["rate"]
        for one in read_lines(HERE / "methods.jsonl")
        if one["kind"] == "screen" and "rate" in one
    }
    for stream, seed in due(a, read_cells(a.cells, a.scale)):
        if (begun := time.monotonic()) >= end:
            break
        own = rates(stream, seed, read_cells(a.cells, a.scale), screens)
        if lacking := {
            of for name, (_, _, of) in STREAMS.get(stream, {}).items() if isinstance(of, str) and name not in own
        }:
            console.print(f"{stream}, seed {seed}: waits for the rate of {', '.join(sorted(lacking))}")
            continue
        command = [sys.executable, str(HERE / "folklore_parts.py"), stream, "--seed", str(seed), "--dtype", a.dtype]
        command += ["--scale", str(a.scale), "--rates", json.dumps(own)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
            console.print(f"{stream}, seed {seed}: failed: {why}", style="red")
            continue  # it is due again at the next call
        with a.cells.open("a", encoding="utf8") as file:
            file.write("".join(line + "\n" for line in found))
        console.print(f"{stream}, seed {seed}: {time.monotonic() - begun:.0f} s")
    console.print(f"{sum(1 for _ in due(a, read_cells(a.cells, a.scale)))} streams left")


def wrapped(text: str) -> str:
    """Prose in lines of a page's width; tables and what is indented stay as they are."""
    lines = [
        [line] if line.startswith(("|", " ", "#")) else textwrap.wrap(line, WIDTH, break_on_hyphens=False) or [""]
        for line in text.splitlines()
    ]
    return "\n".join(itertools.chain.from_iterable(lines))


def main() -> None:
    a = arguments()
    fill(a)
    cells = read_cells(a.cells, a.scale)
    text = page_text(cells, read_lines(HERE / "methods.jsonl"), read_lines(HERE / "race_worth.jsonl"))
    print(text)
    if a.page:
        write_between(a.page, (BEGIN, END), wrapped(text))


if __name__ == "__main__":
    main()
