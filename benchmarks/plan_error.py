"""What `inlay plan` predicts against what happens: time of a step and peak memory, on twelve settings.

Film reviews, SmolLM2-135M. A cell is two processes: one plans the setting, one trains it for some steps. Cells are
appended to a file as they are done, so that a call goes on where the last one stopped.

    python benchmarks/plan_error.py --minutes 30                 go on for half an hour
    python benchmarks/plan_error.py --minutes 0                  nothing but the table, from what is there
    python benchmarks/plan_error.py --only "lora" --base FOLDER --cells /tmp/cells.jsonl
    python benchmarks/plan_error.py --minutes 0 --page docs/performance.md
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pages import write_between
from rich.console import Console

Cell = dict[str, Any]
HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"
SHORT, LONG = "rotten_tomatoes", "imdb"
CASES: dict[str, tuple[str, dict[str, Any], int, int, str]] = {
    "lora": ("lora", {}, 16, 128, SHORT),
    "lora r 4, 4 rows": ("lora", {"r": 4}, 4, 128, SHORT),
    "lora r 32": ("lora", {"r": 32}, 16, 128, SHORT),
    "lora, long rows": ("lora", {}, 4, 256, LONG),
    "dora": ("dora", {}, 16, 128, SHORT),
    "ia3": ("ia3", {}, 16, 128, SHORT),
    "norm, long rows": ("norm", {}, 8, 256, LONG),
    "houlsby": ("houlsby", {}, 16, 128, SHORT),
    "prefix": ("prefix", {}, 16, 128, SHORT),
    "prompt 40, 8 rows": ("prompt", {"num_virtual_tokens": 40}, 8, 128, SHORT),
    "loreft": ("loreft", {}, 16, 128, SHORT),
    "full, 4 rows": ("full", {}, 4, 128, SHORT),
}
"""Method, settings, rows a step, the longest row in tokens, and where the reviews are from."""
ROWS, STEPS, SECONDS = 400, 10, 60.0
GOAL_TIME, GOAL_MEMORY = 0.20, 0.15
console = Console(stderr=True, highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="begin no cell after so many")
    parser.add_argument("--cells", type=Path, default=HERE / "plan_error.jsonl", help="the file of finished cells")
    parser.add_argument("--only", default="", help="some of the cases, with semicolons between")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.only = [name.strip() for name in a.only.split(";") if name.strip()] or list(CASES)
    if unknown := [name for name in a.only if name not in CASES]:
        parser.error(f"unknown: {', '.join(unknown)}. Cases: {'; '.join(CASES)}")
    return a


def reviews(source: str, path: Path) -> None:
    """Some reviews of one source as a csv file."""
    from inlay.bases.reviews import reviews_csv
    from inlay.data.table import read_table, shuffled

    drawn = [row.values for row in shuffled(read_table(reviews_csv()).rows, 0) if row.values["source"] == source]
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(drawn[:ROWS])


def flags(a: argparse.Namespace, case: str, data: Path) -> dict[str, Any]:
    """The settings that plan and run share."""
    _, _, batch, longest, _ = CASES[case]
    return {
        "base": a.base, "dtype": a.dtype, "data": [str(data)], "batch_size": batch, "max_length": longest,
        "steps": STEPS, "heldout": "0",
        "template": "Review: {text}\nSentiment:", "verbalizer": "0=negative,1=positive",
    }  # fmt: skip


def plan_one(a: argparse.Namespace) -> None:
    """Print what is predicted of a case, in this process."""
    from inlay.planning.plan import plan
    from inlay.planning.settings import PlanSettings

    case, data = json.loads(a.plan)
    method, own, *_ = CASES[case]
    result = plan(PlanSettings(**flags(a, case, Path(data)), seconds=SECONDS), console.print, only=("lora", method))
    found = [one for one in result["methods"] if one["method"] == method and one["set"] == own]
    if not found:
        console.print(f"the plan has no answer for {case}: {result['left_out']}", style="red")
        sys.exit(1)
    print(json.dumps({name: found[0][name] for name in ("step_seconds", "memory_mb", "how")}))


def train_one(a: argparse.Namespace, case: str, data: Path, out: Path) -> Cell:
    """What a run of the case took: seconds of a step (the first is left out) and peak memory."""
    method, own, *_ = CASES[case]
    command = [sys.executable, "-m", "inlay", "train", "--json", "--out", str(out), "--method", method]
    command += [part for name, value in own.items() for part in ("--set", f"{name}={value}")]
    for name, value in flags(a, case, data).items():
        command += [f"--{name.replace('_', '-')}", str(value[0] if name == "data" else value)]
    done = json.loads(last_line(command))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    seconds = [line["seconds"] for line in lines]
    a_step = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    return {"step_seconds": a_step, "memory_mb": done.get("peak_gpu_memory_mb") or done["peak_memory_mb"]}


def last_line(command: list[str]) -> str:
    """What a process printed last. Raises: RuntimeError with its last word where it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError((done.stderr.strip().splitlines() or ["nothing was printed"])[-1])
    return done.stdout.strip().splitlines()[-1]


def cell_of(a: argparse.Namespace, case: str) -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "reviews.csv"
        reviews(CASES[case][-1], data)
        call = [sys.executable, str(Path(__file__).resolve()), "--base", a.base, "--dtype", a.dtype]
        said = json.loads(last_line([*call, "--plan", json.dumps([case, str(data)])]))
        happened = train_one(a, case, data, Path(folder) / "run")
    return {
        "case": case, "base": a.base, "dtype": a.dtype, "cores": os.cpu_count(), "said": said, "happened": happened,
    }  # fmt: skip


def read_cells(path: Path) -> dict[str, Cell]:
    """The last cell of each case."""
    lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    return {cell["case"]: cell for cell in map(json.loads, lines)}


def fill(a: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * a.minutes
    for case in a.only:
        if case in read_cells(a.cells) or time.monotonic() >= end:
            continue
        try:
            cell = cell_of(a, case)
        except RuntimeError as error:
            console.print(f"{case}: failed: {error}", style="red")
            continue
        with a.cells.open("a", encoding="utf8") as file:
            file.write(json.dumps(cell) + "\n")
        console.print(f"{case}: time {off(cell, 'step_seconds'):+.0%}, memory {off(cell, 'memory_mb'):+.0%}")


def off(cell: Cell, name: str) -> float:
    """By which share of what happened the prediction was off."""
    return cell["said"][name] / cell["happened"][name] - 1


def table(cells: dict[str, Cell]) -> str:
    found = [cells[case] for case in CASES if case in cells]
    if not found:
        return "Nothing has been measured yet."
    columns = ["setting", "step, s: said", "happened", "off", "memory, MB: said", "happened", "off"]
    rows = [
        [
            cell["case"], f"{cell['said']['step_seconds']:.2f}", f"{cell['happened']['step_seconds']:.2f}",
            f"{off(cell, 'step_seconds'):+.0%}", f"{cell['said']['memory_mb']:,.0f}",
            f"{cell['happened']['memory_mb']:,.0f}", f"{off(cell, 'memory_mb'):+.0%}",
        ]
        for cell in found
    ]  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    lines.insert(1, "|" + "---|" * len(columns))
    for name, words, goal in (("step_seconds", "time", GOAL_TIME), ("memory_mb", "memory", GOAL_MEMORY)):
        errors = [abs(off(cell, name)) for cell in found]
        within = sum(error <= goal for error in errors)
        middle = statistics.median(errors)
        lines += ["", f"Error of {words}: median {middle:.0%}, {within} of {len(found)} within {goal:.0%}."]
    if lacking := [case for case in CASES if case not in cells]:
        lines += ["", f"Missing: {'; '.join(lacking)}."]
    return "\n".join(lines)


def main() -> None:
    a = arguments()
    if a.plan:
        plan_one(a)
        return
    fill(a)
    text = table(read_cells(a.cells))
    print(text)
    if a.page:
        write_between(a.page, (BEGIN, END), text)


if __name__ == "__main__":
    main()
