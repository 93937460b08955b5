"""The settings that folklore.py compares, and one process of it: a stream of some of them by one seed, or their times.

python benchmarks/folklore_parts.py rank --seed 0
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from method_parts import CHOOSE, ROWS, TEST, Bench, reviews

USUAL = 1e-3
THIRDS, HALVED = (USUAL / 3, USUAL, 3 * USUAL), (USUAL / 3, USUAL)
FEW, PASSES = 200, 2
"""Rows that dropout is tried on, and how often each of them is seen."""
SEEDS = (0, 1, 2)
TIMED_STEPS, ROUNDS = 3, 2
Setting = tuple[str, dict[str, Any], Sequence[float] | str]
"""A method, its settings, and the rates that are tried by the first seed: the best one by the choosing rows is that of
the others. Instead of rates, the case whose rate it takes."""


def lora(r: int, alpha: int, rates: Sequence[float] | str, **more: Any) -> Setting:
    return "lora", {"r": r, "alpha": alpha, **more}, rates


def prefix(tokens: int, **more: Any) -> Setting:
    return "prefix", {"num_virtual_tokens": tokens, **more}, "prefix with network" if more else "prefix"


STREAMS: Mapping[str, Mapping[str, Setting]] = {
    "rank": {f"r={r}": lora(r, 2 * r, THIRDS) for r in (4, 8, 16, 32, 64)},
    "prefix": {
        **{f"prefix {n}": prefix(n) for n in (5, 10, 20, 50)}, "prefix 20, network": prefix(20, prefix_projection=True),
    },
    "targets": {
        **{f"{where} r=8": lora(8, 16, HALVED, targets=where) for where in ("qv", "qkv", "attention", "mlp")},
        "qv r=42": lora(42, 84, HALVED, targets="qv"),
    },
    "alpha": {
        "r=8 alpha=8": lora(8, 8, "r=8"), "r=32 alpha=32": lora(32, 32, "r=32"), "r=32 alpha=16": lora(32, 16, "r=32"),
        "r=4 alpha=16": lora(4, 16, "r=4"),
    },
    "dropout": {f"dropout {p:g}": lora(8, 16, "r=8", dropout=p) for p in (0.0, 0.05, 0.1, 0.2)},
}  # fmt: skip
"""By stream, in the order in which they are trained: the rates of the first one are those of others."""
TIMED = {
    "r=8": STREAMS["rank"]["r=8"], **STREAMS["prefix"],
}  # fmt: skip
CASES: Mapping[str, Setting] = {name: own for stream in STREAMS.values() for name, own in stream.items()}


def stream_rows(stream: str, scale: float) -> tuple[list[Any], list[Any], list[Any], int]:
    """Rows to train on, to choose by and to score on, and how often the first ones are seen; a share of them for a
    trial."""
    few = stream == "dropout"
    rows, choose, test = reviews(FEW if few else ROWS)
    cut = [part[: max(16, round(scale * len(part)))] for part in (rows, choose[:CHOOSE], test[:TEST])]
    return cut[0], cut[1], cut[2], PASSES if few else 1


def method(bench: Bench, name: str) -> Any:
    from inlay.methods.table import METHODS

    own, settings, _ = CASES[name]
    return METHODS[own](**settings).with_tokenizer(bench.base.tokenizer)


def train_and_score(stream: str, seed: int, rates: Mapping[str, Sequence[float]], dtype: str, scale: float) -> None:
    """A line for each case: its best rate by the choosing rows, and what it scored on each final row."""
    from inlay.training.plan import Plan

    bench, (rows, choose, test, passes) = Bench(dtype), stream_rows(stream, scale)
    plans = {
        f"{name} @ {rate:g}": Plan(f"{name} @ {rate:g}", method(bench, name), lr=rate, seed=seed, epochs=passes)
        for name in STREAMS[stream] for rate in rates[name]
    }  # fmt: skip
    begun = time.perf_counter()
    learners = {learner.plan.name: learner for learner in bench.train([*plans.values()], rows)}
    seconds, best = time.perf_counter() - begun, dict[str, str]()
    several = [name for name in plans if len(rates[name.partition(" @ ")[0]]) > 1 and not learners[name].diverged]
    tried: Any = bench.scored(choose, [*several]) if several else {}
    losses = {name: tried[name].scores["loss"] for name in several}
    for name in STREAMS[stream]:
        own = [plan for plan in plans if plan.partition(" @ ")[0] == name and not learners[plan].diverged]
        if own:
            best[name] = min(own, key=lambda plan: losses.get(plan, 0.0))
    final: Any = bench.scored(test, [*best.values()])
    for name in STREAMS[stream]:
        cell = bench.cell(stream, name, seed) | {"scale": scale, "seconds": seconds / len(plans)}
        cell["tried"] = {
            plan.partition(" @ ")[2]: loss for plan, loss in losses.items() if plan.startswith(f"{name} @")
        }
        if name not in best:
            print(json.dumps({**cell, "error": "diverged at all rates"}))
            continue
        scored = final[best[name]]
        cell |= {"rate": plans[best[name]].rate, "trained": sum(p.numel() for p in learners[best[name]].parameters)}
        hits, nats = scored.rows.hits.tolist(), [round(own, 5) for own in scored.rows.nats.tolist()]
        print(json.dumps({**cell, "hits": [int(hit) for hit in hits], "nats": nats}))


def times(dtype: str, scale: float) -> None:
    """A line for each case: tokens a second in training, alone, and what a decoded token takes more than the base's."""
    from inlay.data.prepare import prepare
    from inlay.runtime.latency import added_time
    from inlay.runtime.memory import TokenBudget
    from inlay.training.loop import add_learners, train_steps
    from inlay.training.plan import Plan

    bench = Bench(dtype)
    steps = max(2, round(scale * TIMED_STEPS)) + 1
    examples = prepare(bench.encoder, reviews(16 * steps)[0]).examples
    seconds = {name: list[float]() for name in TIMED}
    tokens = dict[str, int]()
    for number in range(ROUNDS):
        for name in TIMED:
            plan = Plan(f"{name} {number}", method(bench, name), lr=1e-6)
            learners = add_learners(bench.bank, [plan], len(examples))
            marks = [time.perf_counter()]
            for _ in train_steps(bench.bank, learners, examples, TokenBudget(bench.at_once, device=bench.device)):
                marks.append(time.perf_counter())
            seconds[name].append((marks[-1] - marks[1]) / (len(marks) - 2))  # the first one does not count
            tokens[name] = learners[0].tokens
            if number + 1 < ROUNDS:
                bench.bank.remove(plan.name)
    for name in TIMED:
        added = added_time(bench.bank, f"{name} {ROUNDS - 1}", examples[0], 3 * scale)
        print(json.dumps({
            **bench.cell("time", name, 0), "scale": scale, "tokens/s": tokens[name] / steps / min(seconds[name]),
            "ms a token": 1e3 * added.median, "base ms a token": 1e3 * added.base,
        }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", choices=[*STREAMS, "time"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rates", type=json.loads, default={}, help="lists of rates by case, in place of the own ones")
    parser.add_argument("--scale", type=float, default=1.0, help="a share of all rows and steps, for a trial")
    a = parser.parse_args()
    if a.stream == "time":
        times(a.dtype, a.scale)
        return
    own = {name: [USUAL] if isinstance(rates, str) else [*rates] for name, (_, _, rates) in STREAMS[a.stream].items()}
    train_and_score(a.stream, a.seed, own | a.rates, a.dtype, a.scale)


if __name__ == "__main__":
    main()
