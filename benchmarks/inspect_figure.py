"""What `inlay inspect` finds in two adapters of one task: LoRA r=8, and a prompt of 10 virtual tokens.

Both are trained on 480 film reviews with SmolLM2-135M at their methods' usual rates, and looked at on 100 others. A
cell is one adapter: its run goes on where it was broken off, and what was found is appended to a file. Adapters that
are there already are taken with --adapter, which may be named for each case.

    python benchmarks/inspect_figure.py --minutes 20
    python benchmarks/inspect_figure.py --minutes 0 --page docs/inspect.md      nothing but the tables
    python benchmarks/inspect_figure.py --rows 32 --look 12 --cells /tmp/cells.jsonl --runs /tmp/runs
    python benchmarks/inspect_figure.py --adapter lora=runs/reviews
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from inspect_tables import tables
from pages import write_between
from rich.console import Console

Cell = dict[str, Any]
HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- inspect: begin -->", "<!-- inspect: end -->"
CASES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "set": {"r": 8}},
    "prompt": {"method": "prompt", "set": {"num_virtual_tokens": 10, "init": "vocab"}},
}
WORDS: dict[str, Any] = {"template": "Review: {text}\nSentiment:", "verbalizer": "0=negative,1=positive"}
LEFT_OUT = ("modules", "changed_rows", "moved_words", "attention")
"""Of what is found: what no table shows, hundreds of lines."""
console = Console(stderr=True, highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="begin no adapter after so many")
    parser.add_argument("--cells", type=Path, default=HERE / "inspect_figure.jsonl", help="the file of what was found")
    parser.add_argument("--runs", type=Path, default=Path("runs/inspect_figure"), help="the folder of the two runs")
    parser.add_argument("--rows", type=int, default=480, help="reviews to train on")
    parser.add_argument("--look", type=int, default=100, help="reviews to look at the adapters on")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--adapter", action="append", default=[], metavar="CASE=FOLDER", help="a run that is there")
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    a = parser.parse_args()
    a.given = dict(one.partition("=")[::2] for one in a.adapter)
    if unknown := [case for case, folder in a.given.items() if case not in CASES or not folder]:
        parser.error(f"--adapter {unknown[0]!r}: write {' or '.join(f'{case}=FOLDER' for case in CASES)}")
    return a


def setting(a: argparse.Namespace, case: str) -> Cell:
    """What a cell is of."""
    shared = {"case": case, "look": a.look, "base": a.base, "dtype": a.dtype}
    if case in a.given:
        return shared | {"adapter": str(Path(a.given[case]).resolve())}
    return shared | {"adapter": None, "rows": a.rows, "epochs": a.epochs, "seed": a.seed}


def read_cells(a: argparse.Namespace) -> dict[str, Cell]:
    """The last cell of each case with these settings."""
    lines = a.cells.read_text(encoding="utf8").splitlines() if a.cells.exists() else []
    found = [json.loads(line) for line in lines]
    return {
        cell["case"]: cell
        for cell in found
        if cell["case"] in CASES and setting(a, cell["case"]).items() <= cell.items()
    }


def data(a: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Files of reviews to train on, to choose the best step by, and to look at; none is in two of them."""
    from method_parts import reviews

    a.runs.mkdir(parents=True, exist_ok=True)
    train, choose, test = reviews(a.rows)
    paths = []
    for name, rows in (("train", train), ("choose", choose[: a.look]), ("look", test[: a.look])):
        paths.append(a.runs / f"{name}.csv")
        with paths[-1].open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows({key: row.values[key] for key in ("text", "label")} for row in rows)
    return paths[0], paths[1], paths[2]


def trained(a: argparse.Namespace, case: str, train: Path, choose: Path) -> Path:
    """The folder of the case's run, which goes on where it was broken off."""
    from inlay.runs.run import run
    from inlay.runs.settings import Settings

    out = a.runs / f"{case}-{a.rows}-{a.epochs:g}-{a.seed}-{a.dtype}"
    settings = Settings(
        base=a.base, data=[str(train)], heldout=str(choose), out=str(out), dtype=a.dtype, epochs=a.epochs, seed=a.seed,
        max_length=256, resume=(out / "run.json").exists(), **CASES[case], **WORDS,
    )  # fmt: skip
    run(settings, on_message=lambda line: None)
    return out


def looked_at(a: argparse.Namespace, folder: Path, look: Path) -> Cell:
    """What `inlay inspect --json` says of an adapter. Exits with its message where it cannot."""
    given = ["--adapter", folder, "--base", a.base, "--data", look, "--limit", a.look, "--dtype", a.dtype, "--json"]
    command = [sys.executable, "-m", "inlay", "inspect", *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return {name: value for name, value in json.loads(done.stdout).items() if name not in LEFT_OUT}


def fill(a: argparse.Namespace) -> None:
    lacking = [case for case in CASES if case not in read_cells(a)]
    if not lacking or a.minutes <= 0:
        return
    end = time.monotonic() + 60 * a.minutes
    train, choose, look = data(a)
    for case in lacking:
        if time.monotonic() >= end:
            return
        begun = time.monotonic()
        folder = Path(a.given[case]) if case in a.given else trained(a, case, train, choose)
        cell = {**setting(a, case), "found": looked_at(a, folder, look), "seconds": time.monotonic() - begun}
        with a.cells.open("a", encoding="utf8") as file:
            file.write(json.dumps(cell) + "\n")
        console.print(f"{case}: {cell['seconds']:.0f} s")


def main() -> None:
    a = arguments()
    fill(a)
    cells = read_cells(a)
    text = tables({case: cells[case] for case in CASES if case in cells}, [*CASES])
    print(text)
    if a.page:
        write_between(a.page, (BEGIN, END), text)


if __name__ == "__main__":
    main()
