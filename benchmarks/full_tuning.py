"""LoRA against full fine-tuning on the same rows: the paired difference of their scores, with its interval.

Film reviews (Rotten Tomatoes), SmolLM2-135M, 3,000 rows, one pass, 16 a step, AdamW, linear schedule, three seeds; both
are scored on the same 4,000 others. Each side's learning rate is the best of three on 500 rows that are neither, after
one pass by the first seed. Each training is a process of its own, and its answers are kept in a file, so that a call
goes on where the last one stopped.

    python benchmarks/full_tuning.py --minutes 60
    python benchmarks/full_tuning.py --processes 6            where a GPU is
    python benchmarks/full_tuning.py --minutes 0 --page docs/methods.md      nothing but the table, from what is there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from pages import write_between
from rich.console import Console

HERE = Path(__file__).resolve().parent
ROWS, CHOOSE, TEST = 3000, 500, 4000
SEEDS = (0, 1, 2)
RATES = {"lora": (3e-4, 1e-3, 3e-3), "full": (1e-5, 3e-5, 1e-4)}
BEGIN, END = "<!-- full tuning: begin -->", "<!-- full tuning: end -->"
Cell = dict[str, Any]
console = Console(stderr=True, highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90, help="begin no training after so many")
    parser.add_argument("--cells", type=Path, default=HERE / "full_tuning.jsonl", help="the file of finished trainings")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--processes", type=int, default=1, help="so many trainings at once")
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def reviews(a: argparse.Namespace) -> tuple[list[Any], list[Any], list[Any]]:
    from method_parts import film_reviews

    drawn = film_reviews()
    return drawn[TEST + CHOOSE :][: a.rows], drawn[TEST:][:CHOOSE], drawn[:TEST]


def train_one(a: argparse.Namespace) -> None:
    """Train one side once, and print what it got right: of the choosing rows, or of the test rows."""
    import torch

    import inlay
    from inlay.bases.load import load_base
    from inlay.data.encode import Encoder
    from inlay.data.prepare import prepare
    from inlay.data.template import Template
    from inlay.evaluation.score import score_rows
    from inlay.methods.table import METHODS
    from inlay.runtime.memory import TokenBudget, peak_memory_mb
    from inlay.training.loop import train
    from inlay.training.plan import Plan

    side, rate, seed, final = json.loads(a.one)
    rows, choose, test = reviews(a)
    base = load_base("smollm2", a.dtype)
    bank = inlay.attach(base.model)
    template = Template(
        kind="label", prompt="Review: {text}\nSentiment:", answer="label",
        verbalizer={"0": ("negative",), "1": ("positive",)},
    )  # fmt: skip
    encoder = Encoder(base.tokenizer, template, 256)
    device = base.model.device
    at_once = 4096 if device.type == "cpu" else 16384
    begun = time.perf_counter()
    plan = Plan("it", METHODS[side](), lr=rate, seed=seed)
    (learner,) = train(bank, [plan], prepare(encoder, rows).examples, at_once)
    seconds = time.perf_counter() - begun
    cell: Cell = {"side": side, "rate": rate, "seed": seed, "final": final, "seconds": seconds, "dtype": a.dtype}
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory_mb()
    cell |= {"trained": sum(p.numel() for p in learner.parameters), "peak MB": peak, "rows": len(rows)}
    cell |= {"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    if learner.diverged:
        print(json.dumps({**cell, "error": learner.stopped}))
        return
    scored = score_rows(bank, encoder, test if final else choose, ["it"], TokenBudget(at_once, device=device))["it"]
    told = {"accuracy": scored.scores["accuracy"], "loss": scored.scores["loss"]}
    print(json.dumps({**cell, **told, "hits": [int(hit) for hit in scored.rows.hits] if final else []}))


def read_cells(path: Path) -> list[Cell]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()] if path.exists() else []


def rate_of(cells: list[Cell], side: str) -> float | None:
    """The best rate on the choosing rows; None while one of them is missing."""
    own = {cell["rate"]: cell.get("loss", float("inf")) for cell in cells if cell["side"] == side and not cell["final"]}
    return min(own, key=own.__getitem__) if len(own) == len(RATES[side]) else None


def missing(cells: list[Cell]) -> Iterator[tuple[str, float, int, bool]]:
    done = {(cell["side"], cell["rate"], cell["seed"], cell["final"]) for cell in cells}
    for side, rates in RATES.items():
        yield from ((side, rate, 0, False) for rate in rates if (side, rate, 0, False) not in done)
    for seed in SEEDS:
        for side in RATES:
            rate = rate_of(cells, side)
            if rate is not None and (side, rate, seed, True) not in done:
                yield side, rate, seed, True


def fill(a: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * a.minutes

    def training(call: tuple[str, float, int, bool]) -> None:
        if time.monotonic() >= end:
            return
        command = [sys.executable, __file__, "--one", json.dumps(call), "--dtype", a.dtype, "--rows", str(a.rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            console.print(f"{call}: failed: {(done.stderr.strip().splitlines() or ['nothing was printed'])[-1]}")
            return
        cell = {**json.loads(lines[-1]), "at once": a.processes}
        with a.cells.open("a", encoding="utf8") as file:
            file.write(json.dumps(cell) + "\n")
        console.print(*call, f"accuracy {cell.get('accuracy', float('nan')):.4f}, {cell['seconds']:.0f} s")

    for _ in ("choosing rates", "with the rates"):
        with ThreadPoolExecutor(a.processes) as pool:
            list(pool.map(training, [*missing(read_cells(a.cells))]))


def difference(hits: dict[str, np.ndarray]) -> tuple[float, float, float]:
    """LoRA's accuracy less the other's, seeds and rows both drawn anew (4,000 times) for the 95 % interval."""
    apart = hits["lora"] - hits["full"]  # (seeds, rows)
    draw = np.random.default_rng(0)
    seeds, rows = apart.shape
    means = [
        apart[draw.integers(seeds, size=seeds)][:, draw.integers(rows, size=rows)].mean() for _ in range(4000)
    ]  # fmt: skip
    low, high = np.quantile(means, [0.025, 0.975])
    return float(apart.mean()), float(low), float(high)


def at_the_edge(cells: list[Cell]) -> list[str]:
    """A sentence for each side whose best rate is the lowest or the highest of those that were tried."""
    best = {side: rate_of(cells, side) for side in RATES}
    found = {side: rate for side, rate in best.items() if rate in (RATES[side][0], RATES[side][-1])}
    return [
        f"The best rate of {side}, {rate:g}, is the last one that was tried on that side."
        for side, rate in found.items()
    ]


def report(cells: list[Cell]) -> str:
    lines = ["| | rate | trained | accuracy by seed, % | seconds a training | peak MB |", "|---|---|---|---|---|---|"]
    places = sorted({f"{cell['device']} in {cell['dtype']}" for cell in cells if cell["final"]})
    hits: dict[str, np.ndarray] = {}
    for side in RATES:
        own = {cell["seed"]: cell for cell in cells if cell["side"] == side and cell["final"] and "hits" in cell}
        if not own:
            lines.append(f"| {side} | missing | | | | |")
            continue
        one = next(iter(own.values()))
        shown = ", ".join(f"{100 * own[s]['accuracy']:.2f}" if s in own else "missing" for s in SEEDS)
        seconds, peak = (max(cell[key] for cell in own.values()) for key in ("seconds", "peak MB"))
        shared = max(cell["at once"] for cell in own.values()) > 1  # of one machine
        took = "not alone" if shared else f"{seconds:,.0f}"
        lines.append(f"| {side} | {one['rate']:g} | {one['trained']:,} | {shown} | {took} | {peak:,.0f} |")
        if len(own) == len(SEEDS):
            hits[side] = np.array([own[s]["hits"] for s in SEEDS], dtype=float)
    if len(hits) == len(RATES):
        apart, low, high = (100 * value for value in difference(hits))
        told = f"LoRA less full fine-tuning: {apart:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}, which"
        lines += ["", f"{told} {'holds' if low <= 0 <= high else 'leaves out'} 0).", *at_the_edge(cells)]
    return "\n".join([f"{ROWS:,} rows, one pass, {TEST:,} others to score on, {' and '.join(places)}.", "", *lines])


def main() -> None:
    a = arguments()
    if a.one:
        return train_one(a)
    fill(a)
    text = report(read_cells(a.cells))
    print(text)
    if a.page:
        write_between(a.page, (BEGIN, END), text)


if __name__ == "__main__":
    main()
