"""One process of prefix_cost.py: a JSON line with what virtual tokens cost in time, in memory, or in score.

python benchmarks/prefix_cost_parts.py step 128
python benchmarks/prefix_cost_parts.py memory 128 "prefix 20"
python benchmarks/prefix_cost_parts.py score 0
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

COUNTS, LENGTHS = (5, 10, 20, 50, 100), (32, 128, 512, 1024)
"""Virtual tokens, and tokens of a row."""
NONE, LORA = "none", "lora"
METHODS = ("prompt", "prefix")
CASES = (NONE, LORA, *(f"{method} {count}" for method in METHODS for count in COUNTS))
TOKENS, LEARNED, NEW, ROUNDS = 1024, 4, 16, 4
"""Tokens of a step, of a row's answer, of what is written, and rounds, the first of which does not count."""


def method_of(case: str) -> Any:
    """The method of a case; a prefix starts as its default does."""
    import inlay

    name, _, count = case.partition(" ")
    if case == LORA:
        return inlay.LoRA(r=8)
    return {"prompt": inlay.PromptTuning, "prefix": inlay.PrefixTuning}[name](num_virtual_tokens=int(count))


class Bench:
    """The base, and a step of rows of one length, whose last tokens are learned; what they are does not matter."""

    def __init__(self, a: argparse.Namespace, length: int) -> None:
        import torch

        import inlay
        from inlay.bases.load import load_base
        from inlay.data.encode import Example
        from inlay.runtime.memory import TokenBudget

        self.base = load_base(a.base, a.dtype)
        self.bank: Any = inlay.attach(self.base.model)
        drawn = torch.Generator().manual_seed(0)
        table: Any = self.base.model.get_input_embeddings()
        ids = torch.randint(len(table.weight), (max(1, a.tokens // length), length), generator=drawn)
        mask = (*[False] * (length - LEARNED), *[True] * LEARNED)
        self.rows = [Example(tuple(row.tolist()), mask, number) for number, row in enumerate(ids)]
        self.budget = TokenBudget(1 << 20, device=self.base.model.device)

    def learner(self, case: str) -> Any:
        from inlay.training.loop import add_learners
        from inlay.training.plan import Plan

        if case == NONE:
            return None
        method = method_of(case).with_tokenizer(self.base.tokenizer)
        plan = Plan(case, method, steps=100, batch_size=len(self.rows), lr=1e-6)
        return add_learners(self.bank, [plan], len(self.rows), examples=self.rows)[0]

    def step(self, learner: Any) -> float:
        """Seconds of a step's forward and backward."""
        from inlay.runs.timing import base_seconds, gradient_seconds
        from inlay.runtime.tasks import GENERATE

        if learner is None:
            return base_seconds(self.bank, self.rows, self.budget, GENERATE)
        return gradient_seconds(self.bank, learner, self.rows, self.budget, GENERATE)


def step_cell(a: argparse.Namespace) -> dict[str, Any]:
    """All cases in turn on the same rows, in rounds: seconds of a step."""
    length = int(a.what[0])
    bench = Bench(a, length)
    learners = {case: bench.learner(case) for case in CASES}
    found: dict[str, dict[str, list[float]]] = {case: {"step": []} for case in CASES}
    for _ in range(ROUNDS):
        for case, learner in learners.items():
            found[case]["step"].append(bench.step(learner))
    return {"kind": "step", "length": length, "cases": {case: _counted(own) for case, own in found.items()}}


def answer_cell(a: argparse.Namespace) -> dict[str, Any]:
    """All cases in turn, in rounds: seconds of an answer's first token, with the reading of its row, and of each one
    behind it."""
    from inlay.runtime.latency import token_times

    length = int(a.what[0])
    bench = Bench(a, length)
    for case in CASES:
        bench.learner(case)
    found: dict[str, dict[str, list[float]]] = {case: {"first": [], "token": []} for case in CASES}
    for _ in range(ROUNDS):
        for case, own in found.items():
            first, *others = token_times(bench.bank, None if case == NONE else case, bench.rows[0], NEW + 1)
            own["first"].append(first)
            own["token"].append(statistics.median(others))
    return {"kind": "answer", "length": length, "cases": {case: _counted(own) for case, own in found.items()}}


def _counted(own: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: values[1:] for name, values in own.items()}


def memory_cell(a: argparse.Namespace) -> dict[str, Any]:
    """The peak of a process that takes two steps of one case."""
    length, case = int(a.what[0]), a.what[1]
    bench = Bench(a, length)
    learner = bench.learner(case)
    forget_peak()
    for _ in range(2):
        bench.step(learner)
    return {"kind": "memory", "length": length, "case": case, "peak_mb": peak_mb()}


def forget_peak() -> None:
    """Let the peak count from here: what opening the base took does not matter. Linux alone can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mb() -> float:
    from inlay.runtime.memory import peak_memory_mb

    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return peak_memory_mb()


def score_cell(a: argparse.Namespace) -> dict[str, Any]:
    """All cases trained in one mixed stream on the film reviews of method_parts.py, at their usual rates."""
    import method_parts

    from inlay.training.plan import Plan

    seed = int(a.what[0])
    rows, _, test = method_parts.reviews(a.rows)
    bench = method_parts.Bench(a.dtype)
    plans = [
        Plan(case, method_of(case).with_tokenizer(bench.base.tokenizer), seed=seed) for case in CASES if case != NONE
    ]
    learners = bench.train(plans, rows)
    names = [None, *(one.plan.name for one in learners if not one.diverged)]
    scored = bench.scored(test[: a.test], names)
    own = {NONE if name is None else name: method_parts.told(one) for name, one in scored.items()}
    return {"kind": "score", "seed": seed, "rows": len(rows), "test": len(test[: a.test]), "cases": own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["step", "answer", "memory", "score"])
    parser.add_argument("what", nargs="+")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--test", type=int, default=1000)
    a = parser.parse_args()
    cell = {"step": step_cell, "answer": answer_cell, "memory": memory_cell, "score": score_cell}[a.kind](a)
    print(json.dumps({**cell, "base": a.base, "dtype": a.dtype, "cores": os.cpu_count()}), flush=True)


if __name__ == "__main__":
    main()
