"""Kill a training run again and again at random moments, go on each time, and compare the end with an undisturbed run.

    python benchmarks/kill_resume.py --kills 100 [--base smollm2] [--rows 256]

Every process is killed with SIGKILL after a random time since its start, so that kills fall into loading, steps,
checkpoints, scoring and the writing of the end alike. Prints one JSON line; exit code 1 where the files differ.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track

console = Console(stderr=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def data(folder: Path, rows: int) -> Path:
    from inlay.bases.reviews import reviews_csv
    from inlay.data.table import read_table, shuffled

    file = folder / "reviews.csv"
    table = [row for row in read_table(reviews_csv()).rows if row.values["source"] == "rotten_tomatoes"]
    with open(file, "w", encoding="utf8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "label"])
        writer.writerows([row.values["text"], row.values["label"]] for row in shuffled(table, 0)[:rows])
    return file


def command(a: argparse.Namespace, file: Path, out: Path) -> list[str]:
    program = "from inlay.cli.app import app; app()"
    given = ["train", "--base", a.base, "--data", file, "--out", out, "--steps", a.steps, "--batch-size", 2]
    given += ["--template", r"Review: {text}\nSentiment:", "--verbalizer", "0=negative,1=positive", "--resume"]
    given += ["--set", "dropout=0.1", "--set", "r=4", "--checkpoint-every", 3, "--eval-every", 20, "--heldout", "0.1"]
    return [sys.executable, "-c", program, *map(str, given), "--json"]


def digests(out: Path) -> dict[str, str]:
    files = [*(out / "adapter").iterdir(), *(out / "last").iterdir()]
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def killed(command: list[str], out: Path, draw: random.Random, longest: float) -> bool:
    """Start a process and kill it at a random moment; whether that came before its end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + draw.uniform(0, longest)
    begun = draw.random() < 0.8  # most kills fall after the start-up, which takes longer than anything else
    size = (out / "metrics.jsonl").stat().st_size if (out / "metrics.jsonl").exists() else 0
    while process.poll() is None:
        metrics = out / "metrics.jsonl"
        if begun and metrics.exists() and metrics.stat().st_size > size:
            time.sleep(draw.uniform(0, 3.0))
            break
        if not begun and time.monotonic() > deadline:
            break
        time.sleep(0.002)
    if process.poll() is not None:
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return True


def main() -> None:
    a = arguments()
    draw = random.Random(a.seed)
    folder = Path(tempfile.mkdtemp())
    file = data(folder, a.rows)
    begun = time.monotonic()
    subprocess.run(command(a, file, folder / "whole"), check=True, capture_output=True)
    longest = time.monotonic() - begun
    expected, expected_steps = digests(folder / "whole"), steps(folder / "whole")
    kills = runs = same = 0
    out = folder / "killed-0"
    for _ in track(range(a.kills), "kills", console=console):
        while not killed(command(a, file, out), out, draw, longest):
            runs += 1
            same += digests(out) == expected and steps(out) == expected_steps
            out = folder / f"killed-{runs}"
        kills += 1
    subprocess.run(command(a, file, out), check=True, capture_output=True)
    runs += 1
    same += digests(out) == expected and steps(out) == expected_steps
    result = {"kills": kills, "runs": runs, "identical": same, "steps": a.steps, "files": len(expected)}
    print(json.dumps({**result, "undisturbed_seconds": round(longest, 1)}))
    sys.exit(same != runs)


if __name__ == "__main__":
    main()
