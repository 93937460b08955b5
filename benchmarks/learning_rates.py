"""Which learning rate each method wants: film reviews, the default base, every rate of a method trained in one stream.

One epoch of 480 Rotten Tomatoes reviews (16 a step, AdamW, linear schedule), scored on 300 others by the loss of the
right label among the labels, and by accuracy: the rows of methods.py, whose cases these are. Rates are those that
methods.py tries, unless some are given.

    python benchmarks/learning_rates.py --only "lora; miss" --rates 1e-4,3e-4 --seed 1 --out rates.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from method_parts import CASES, ROWS, SPREAD, Bench, reviews
from rich.console import Console
from rich.table import Table

from inlay.evaluation.score import evaluate
from inlay.training.plan import Plan


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="; ".join(CASES), help="some of " + "; ".join(CASES))
    parser.add_argument("--settings", type=json.loads, default={}, help='more settings for all of them: {"r": 4}')
    parser.add_argument("--rates", help="others than usual, for all of them: 1e-3,3e-3")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file that the numbers are added to, one JSON object a line")
    return parser.parse_args()


def tried(bench: Bench, case: str, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and score every rate of a case; adapters are dropped again."""
    method = bench.method(case, a.settings)
    rates = [float(rate) for rate in a.rates.split(",")] if a.rates else [one * method.usual_rate for one in SPREAD]
    rows, choose, _ = reviews(a.rows)
    start = time.perf_counter()
    plans = [Plan(f"{rate:g}", method, lr=rate, seed=a.seed) for rate in rates]
    learners = {learner.plan.name: learner for learner in bench.train(plans, rows)}
    seconds = time.perf_counter() - start
    scores = evaluate(bench.bank, bench.encoder, choose, [n for n, learner in learners.items() if not learner.diverged])
    found = [
        {**bench.cell("rate", case, a.seed), "settings": a.settings, "rows": a.rows, "rate": float(name),
         "seconds": seconds / len(rates), "stopped": learner.stopped, **scores.get(name, {})}
        for name, learner in learners.items()
    ]  # fmt: skip
    for name in learners:
        bench.bank.remove(name)
    return found


def main() -> None:
    a = arguments()
    console = Console(width=110)
    bench = Bench(a.dtype)
    table = Table("method", "rate", "accuracy", "loss", "s")
    for case in [part.strip() for part in a.only.split(";")]:
        for one in tried(bench, case, a):
            shown = [f"{one[key]:.{n}f}" if key in one else one["stopped"] for key, n in (("accuracy", 3), ("loss", 4))]
            table.add_row(case, f"{one['rate']:g}", *shown, f"{one['seconds']:.0f}")
            console.print(case, f"{one['rate']:g}", *shown, f"{one['seconds']:.0f} s", highlight=False)
            if a.out:
                with a.out.open("a", encoding="utf8") as file:
                    file.write(json.dumps(one) + "\n")
        table.add_section()
    console.print(f"{bench.base.dtype}, {a.rows} rows", table, highlight=False)


if __name__ == "__main__":
    main()
