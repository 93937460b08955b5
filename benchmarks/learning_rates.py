"""Which learning rate each method wants: film reviews, the default base, every rate of a method trained in one stream.

One epoch of 640 Rotten Tomatoes reviews (16 a step, AdamW, linear schedule, one seed), scored on 300 others by the loss
of the right label among the labels, and by accuracy. Rates that are
far off are left out.

    python benchmarks/learning_rates.py [--only "lora; ia3"] [--rows 640] [--test 300] [--dtype auto] [--out rates.json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import inlay
from inlay.bases.load import load_base
from inlay.bases.reviews import reviews_csv
from inlay.data.encode import Encoder
from inlay.data.prepare import prepare
from inlay.data.table import Row, read_table, shuffled
from inlay.data.template import Template
from inlay.evaluation.score import evaluate
from inlay.methods.table import METHODS
from inlay.training.loop import train
from inlay.training.plan import Plan

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
CASES: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "lora": ("lora", {}, GRID[1:5]),
    "ia3": ("ia3", {}, GRID[3:7]),
    "houlsby": ("houlsby", {}, GRID[1:5]),
    "pfeiffer": ("pfeiffer", {}, GRID[1:5]),
    "parallel": ("parallel", {}, GRID[:4]),
    "scaled parallel": ("scaled_parallel", {}, GRID[:4]),
    "mam": ("mam", {}, GRID[:4]),
    "loreft": ("loreft", {}, GRID[1:5]),
    "norm": ("norm", {}, GRID[1:5]),
    "prefix": ("prefix", {}, GRID[3:7]),
    "prefix, projected": ("prefix", {"prefix_projection": True}, GRID[1:5]),
    "prompt": ("prompt", {}, GRID[4:8]),
}
"""Method, its settings and the rates that are tried, by what a row of the table is called."""
TEMPLATE = Template(
    kind="label", prompt="Review: {text}\nSentiment:", answer="label",
    verbalizer={"0": ("negative",), "1": ("positive",)},
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some of " + "; ".join(CASES))
    parser.add_argument("--rates", help="others than usual, for all of them: 1e-3,3e-3")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a file for the numbers, one JSON object a line, added to what it holds")
    return parser.parse_args()


def reviews(a: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    rows = [row for row in shuffled(read_table(reviews_csv()).rows, 0) if row.values["source"] == "rotten_tomatoes"]
    return rows[: a.rows], rows[a.rows : a.rows + a.test]


def tried(bank: inlay.Bank, encoder: Encoder, case: str, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and score every rate of a case; adapters are dropped again."""
    name, settings, rates = CASES[case]
    rates = [float(rate) for rate in a.rates.split(",")] if a.rates else rates
    rows, test = reviews(a)
    plans = [Plan(f"{rate:g}", METHODS[name](**settings), lr=rate, seed=a.seed) for rate in rates]
    start = time.perf_counter()
    learners = {c.plan.name: c for c in train(bank, plans, prepare(encoder, rows).examples)}
    seconds = time.perf_counter() - start
    fine = [name for name, learner in learners.items() if not learner.diverged]
    scores = evaluate(bank, encoder, test, [None, *fine])
    found = [
        {"case": case, "rate": float(name), "seed": a.seed, "seconds": seconds / len(rates), "stopped": c.stopped,
         "base": scores[None], **scores.get(name, {})}
        for name, c in learners.items()
    ]  # fmt: skip
    for name in learners:
        bank.remove(name)
    return found


def main() -> None:
    a = arguments()
    console = Console(width=110)
    base = load_base("smollm2", a.dtype)
    bank = inlay.attach(base.model)
    encoder = Encoder(base.tokenizer, TEMPLATE, 256)
    chosen = [part.strip() for part in a.only.split(";")] if a.only else list(CASES)
    table = Table("method", "rate", "accuracy", "loss", "s")
    for case in chosen:
        for one in tried(bank, encoder, case, a):
            shown = [f"{one[key]:.{n}f}" if key in one else one["stopped"] for key, n in (("accuracy", 3), ("loss", 4))]
            table.add_row(case, f"{one['rate']:g}", *shown, f"{one['seconds']:.0f}")
            console.print(case, f"{one['rate']:g}", *shown, f"{one['seconds']:.0f} s", highlight=False)
            if a.out:
                with Path(a.out).open("a", encoding="utf8") as file:
                    file.write(json.dumps(one) + "\n")
        table.add_section()
    console.print(f"{base.dtype}, {a.rows} rows, scored on {a.test}", table, highlight=False)


if __name__ == "__main__":
    main()
