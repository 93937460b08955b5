"""What a training step costs: by method, rank, row length, amount of data, tokens a step and learners in a stream.

All cases of a table are trained in turn, step by step, in one process, so that a noisy machine is noisy for all; memory
is what a process of its own needs at most. Figures are medians of warm steps.

    python benchmarks/scaling.py methods|ranks|lengths|data|steps|learners [--dtype float32]
    python benchmarks/scaling.py startup
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*TABLES, "data", "startup"])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=12, help="warm steps that are timed")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


class Case:
    """One row of a table: learners that take steps of `rows` rows of `length` random tokens, 2 of them learned."""

    def __init__(self, label: str, rows: int, length: int, learners: int = 1, method: str = "lora", **settings):
        self.label, self.rows, self.length = label, rows, length
        self.learners, self.method, self.settings = learners, method, settings

    @property
    def tokens(self) -> int:
        return self.rows * self.length * self.learners

    def add_learners(self, bank, number: int) -> None:
        from inlay.data.encode import Example
        from inlay.methods.table import METHODS
        from inlay.training.loop import add_learners
        from inlay.training.plan import Plan

        draw = random.Random(number)
        count = bank.model.get_input_embeddings().num_embeddings
        learned = (*[False] * (self.length - 2), True, True)
        self.examples = [
            Example(tuple(draw.randrange(count) for _ in range(self.length)), learned, sample=n)
            for n in range(self.rows * max(4, self.learners))
        ]
        method = METHODS[self.method](**self.settings)
        plans = [Plan(f"{number}-{n}", method, batch_size=self.rows, steps=10**6, seed=n) for n in range(self.learners)]
        self.plans = add_learners(bank, plans, len(self.examples))

    def step(self, bank) -> float:
        from inlay.runtime.memory import TokenBudget
        from inlay.training.loop import _step

        begun = time.perf_counter()
        _step(bank, self.plans, self.examples, TokenBudget(1 << 20, device=bank.model.device))
        return time.perf_counter() - begun


def methods() -> list[Case]:
    from inlay.methods.table import METHODS

    return [Case(name, 16, 32, method=name) for name in METHODS]


def ranks() -> list[Case]:
    return [Case(f"r={r}", 16, 32, r=r) for r in (1, 4, 8, 16, 64, 256)]


def lengths() -> list[Case]:
    return [Case(f"{1024 // n} rows of {n}", 1024 // n, n) for n in (16, 64, 256, 1024)]


def steps() -> list[Case]:
    return [Case(f"{rows * 64} tokens", rows, 64) for rows in (1, 2, 4, 8, 16)]


def learners() -> list[Case]:
    return [Case("1 adapter, 16 rows of 64", 16, 64), Case("16 adapters, a row of 64 each", 1, 64, learners=16)]


TABLES = {f.__name__: f for f in (methods, ranks, lengths, steps, learners)}


def attached(a: argparse.Namespace):
    import inlay
    from inlay.bases.load import load_base

    bank = inlay.attach(load_base(a.base, a.dtype).model)
    bank.model.eval()
    return bank


def alone(a: argparse.Namespace, number: int) -> int:
    """Peak memory in MB of a process that trains nothing but one case."""
    command = [sys.executable, __file__, a.what, "--base", a.base, "--dtype", a.dtype, "--only", str(number)]
    bare = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=bare).stdout.split()[-1])


def table(a: argparse.Namespace) -> None:
    from inlay.runtime.memory import peak_memory_mb

    cases = TABLES[a.what]()
    bank = attached(a)
    if a.only is not None:
        cases[a.only].add_learners(bank, a.only)
        for _ in range(4):
            cases[a.only].step(bank)
        print(round(peak_memory_mb()))
        return
    times: list[list[float]] = [[] for _ in cases]
    for number, case in enumerate(cases):
        case.add_learners(bank, number)
    for turn in range(a.rounds + 2):
        for case, own in zip(cases, times, strict=True):
            own.append(case.step(bank))
            del own[: 1 if turn < 2 else 0]
    shown = Table(a.what, "trained", "ms a step", "tokens/s", "speed beside the first", "peak MB")
    first = cases[0].tokens
    for number, (case, own) in enumerate(zip(cases, times, strict=True)):
        ratio = statistics.median(x / first / (y / case.tokens) for x, y in zip(times[0], own, strict=True))
        size = len(bank.adapters[f"{number}-0"])
        middle = statistics.median(own)
        cells = f"{middle * 1000:.0f}", f"{case.tokens / middle:.0f}", f"{ratio:.2f}", str(alone(a, number))
        shown.add_row(case.label, f"{size:,}", *cells)
    Console(width=110).print(f"{a.base}, {a.dtype}", shown)


def amount(a: argparse.Namespace) -> None:
    """Whole runs over growing data: the time must grow with it, and with nothing else."""
    from inlay.methods.table import METHODS
    from inlay.runtime.memory import peak_memory_mb
    from inlay.training.loop import train
    from inlay.training.plan import Plan

    shown = Table("data", "seconds", "ms a row", "peak MB so far")
    bank = attached(a)
    for number, (label, rows) in enumerate((("warm-up", 64), ("1x", 64), ("4x", 256), ("16x", 1024))):
        case = Case(label, 16, 32)
        case.add_learners(bank, number)
        made = [case.examples[n % len(case.examples)] for n in range(rows)]
        begun = time.perf_counter()
        train(bank, [Plan(f"run-{number}", METHODS["lora"]())], made)
        seconds = time.perf_counter() - begun
        if number:
            shown.add_row(
                f"{label}, {rows} rows", f"{seconds:.1f}", f"{seconds / rows * 1000:.1f}", f"{peak_memory_mb():.0f}"
            )
    Console(width=110).print(f"{a.base}, {a.dtype}", shown)


def startup(a: argparse.Namespace) -> None:
    """Seconds from a command to its result, the fastest of five, and what a first training step waits for."""

    def fastest(*command: str) -> str:
        tries = []
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            tries.append(time.perf_counter() - begun)
        return f"{min(tries):.2f}"

    command = str(Path(sys.executable).with_name("inlay"))
    shown = Table("start-up", "seconds")
    shown.add_row("python -c pass", fastest(sys.executable, "-c", "pass"))
    shown.add_row("import inlay", fastest(sys.executable, "-c", "import inlay"))
    shown.add_row("inlay --help", fastest(command, "--help"))
    shown.add_row("inlay train --help", fastest(command, "train", "--help"))
    for label, code in {
        "import torch": "import torch",
        "... and the training code": "import inlay.runs.run",
        "... and the base": f"from inlay.bases.load import load_base; load_base({a.base!r}, {a.dtype!r})",
    }.items():
        shown.add_row(label, fastest(sys.executable, "-c", code))
    bank = attached(a)
    begun = time.perf_counter()
    case = Case("first", 16, 32)
    case.add_learners(bank, 0)
    shown.add_row("adapter and optimizer made", f"{time.perf_counter() - begun:.2f}")
    shown.add_row("first step of 512 tokens", f"{case.step(bank):.2f}")
    shown.add_row("second step", f"{case.step(bank):.2f}")
    Console(width=110).print(f"{a.base}, {a.dtype}", shown)


def main() -> None:
    a = arguments()
    if a.only is None:  # cases in turn would throw one another's compiled products out, which no run does
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    {"startup": startup, "data": amount}.get(a.what, table)(a)


if __name__ == "__main__":
    main()
