"""The parts of house.py: each measures one thing in a process of its own and prints its figures as one JSON line.

PYTHONPATH=src python benchmarks/house_parts.py write-bf16 --new-tokens 8      # a single part, by hand
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kernel_speed import bandwidth
from rich.console import Console

__all__ = ["PARTS", "ROWS", "last_json", "make_rows"]

Figures = dict[str, float]
PROMPT = "The capital of France is a city that I"
RANKS = (2, 4, 6, 8, 12, 16, 24, 32)
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
ROWS = {"short": ("rotten_tomatoes", 256, 16), "long": ("imdb", 240, 4)}
"""Source of the reviews, their longest in tokens, and rows a step."""
progress = Console(stderr=True, highlight=False)


def make_rows(folder: Path, rows: int) -> None:
    """The reviews of both lengths as prompt and completion, drawn and cut as train_speed.py does."""
    from train_speed import rows_of

    from inlay.bases.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    for name, (source, longest, _) in ROWS.items():
        drawn = argparse.Namespace(source=source, rows=4 * rows if name == "long" else rows, max_length=longest)
        made = rows_of(drawn, tokenizer)
        if name == "long":  # those alone that fill their 240 tokens
            made = sorted(made, key=lambda pair: -len(tokenizer(pair[0])["input_ids"]))[:rows]
        lines = [json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in made]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf8")


def last_json(command: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON line that a process ends with; its stderr is ours. Raises RuntimeError where there is none."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"exit code {done.returncode} from {' '.join(command[:4])}")
    return json.loads(lines[-1])


def train(a: argparse.Namespace, kind: str) -> Figures:
    """The command itself, so that what is inside may be renamed; its own figures count the first step in."""
    rows, dtype = ("long", "float32") if kind == "long" else ("short", DTYPES[kind])
    with tempfile.TemporaryDirectory() as out:
        given: list[object] = ["train", "--json", "--base", "smollm2", "--data", a.folder / f"{rows}.jsonl"]
        given += ["--out", Path(out) / "run", "--method", "lora", "--set", "r=8", "--dtype", dtype, "--heldout", 0]
        given += ["--template", "{prompt}", "--batch-size", ROWS[rows][2], "--steps", a.steps, "--max-length", 512]
        program = "from inlay.cli.app import app; app()"
        if time.perf_counter is time.process_time:
            program = f"import time; time.perf_counter = time.process_time; {program}"
        result = last_json([sys.executable, "-c", program, *map(str, given)])
    return {"tokens/s": result["tokens_per_second"], "peak MB": result["peak_memory_mb"]}


def race(a: argparse.Namespace, kind: str) -> Figures:
    """Tokens a second of one adapter and of 16: of a long training less a short one: starts and ends cancel."""
    import inlay
    from inlay.bases.load import load_base
    from inlay.data.encode import Example
    from inlay.training.loop import train as train_together
    from inlay.training.plan import Plan

    base = load_base("smollm2", DTYPES[kind])
    bank = inlay.attach(base.model)
    examples = []
    for number, line in enumerate((a.folder / "short.jsonl").read_text(encoding="utf8").splitlines()):
        row = json.loads(line)
        prompt, answer = (base.tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))  # pyright: ignore
        loss_mask = (False,) * len(prompt) + (True,) * len(answer)
        examples.append(Example((*prompt, *answer), loss_mask, sample=number))
    kinds = {
        "one LoRA": [inlay.LoRA(r=8)],
        "16 alike": [inlay.LoRA(r=8)] * 16,
        "16 of ranks 1 to 16": [inlay.LoRA(r=n + 1, alpha=4 + 4 * (7 * n % 16)) for n in range(16)],
        "16 of ranks 2 to 32": [inlay.LoRA(r=2 * n + 2, alpha=4 + 4 * (7 * n % 16)) for n in range(16)],
    }

    def trained(methods: Sequence[Any], steps: int) -> tuple[int, float]:
        plans = [
            Plan(f"a{n}", method, lr=1e-6, batch_size=16 // len(methods), steps=steps)  # so small that none diverges
            for n, method in enumerate(methods)
        ]
        begun = time.perf_counter()
        tokens = sum(one.tokens for one in train_together(bank, plans, examples, tokens_at_once=1 << 14))
        seconds = time.perf_counter() - begun
        for plan in plans:
            bank.remove(plan.name)
        return tokens, seconds

    def speed(methods: Sequence[Any]) -> float:
        (few, short), (many, long) = trained(methods, 1), trained(methods, 1 + a.steps)
        return (many - few) / (long - short)

    return shares(kinds, speed, tries=2)


def write(a: argparse.Namespace, kind: str) -> Figures:
    """New tokens a second of 32 rows under each kind of route."""
    import torch

    import inlay
    from inlay.bases.load import load_base

    base = load_base("smollm2", DTYPES[kind])
    given = base.tokenizer([PROMPT] * 32, return_tensors="pt")  # pyright: ignore[reportOptionalCall]

    @torch.no_grad()
    def speed(route: list[str | None] | None) -> float:
        begun = time.perf_counter()
        with nullcontext() if route is None else bank.route(route):
            base.model.generate(  # pyright: ignore[reportCallIssue]
                **given, max_new_tokens=a.new_tokens, min_new_tokens=a.new_tokens, do_sample=False, pad_token_id=0
            )
        return 32 * a.new_tokens / (time.perf_counter() - begun)

    untouched = shares({"not attached": None}, speed, tries=2)
    bank = inlay.attach(base.model)
    routes = {"none": [None] * 32, **routes_of(bank)}
    figures, rate = shares(routes, speed, tries=3), bandwidth()
    step = 32 / figures["none tokens/s"]  # seconds for a token of each row
    for name, route in routes.items():
        used = {one for one in route if one is not None}
        size = sum(p.numel() for one in used for p in bank.parameters(one)) * base.dtype.itemsize
        if used:
            figures[f"{name} may"] = step / (step + size / rate)
    return {**untouched, **figures, "read GB/s": rate / 1e9}


def routes_of(bank: Any) -> dict[str, list[str | None]]:
    """Adds every adapter that the kinds of routes need; returns the routes, 32 rows each."""
    import torch

    import inlay
    from inlay.methods.table import METHODS

    for n in range(32):
        bank.add(f"r8-{n}", inlay.LoRA(r=8), seed=n)
        bank.add(f"kind-{n}", inlay.LoRA(r=RANKS[n % 8], alpha=4 + 4 * (7 * n % 16)), seed=n)
    names = [name for name in ("lora", "ia3", "houlsby", "pfeiffer", "norm", "prefix", "prompt") if name in METHODS]
    for name in names:
        bank.add(name, METHODS[name](), seed=0)
    bank.add("lora again", inlay.LoRA(r=16, alpha=8), seed=0)
    with torch.no_grad():  # as if trained: none is the base
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    methods = [*names, "lora again"]
    return {
        "one LoRA": ["r8-0"] * 32,
        "32 LoRAs": [f"r8-{n}" for n in range(32)],
        "32 LoRAs of 8 kinds": [f"kind-{n}" for n in range(32)],
        f"{len(methods)} methods": [methods[n * len(methods) // 32] for n in range(32)],
    }


def load(a: argparse.Namespace) -> Figures:
    """Milliseconds to load an adapter, and by how much longer than the base's its first forward takes."""
    import torch

    import inlay
    from inlay.bases.load import load_base

    base = load_base("smollm2", "float32")
    bank = inlay.attach(base.model)
    bank.add("wide", inlay.LoRA(r=64), seed=0)
    bank.add("one", inlay.LoRA(r=8), seed=0)
    ids = torch.tensor([[1]])

    @torch.no_grad()
    def forward(route: str | None) -> float:
        begun = time.perf_counter()
        with bank.route([route]):
            base.model(input_ids=ids, use_cache=False)
        return (time.perf_counter() - begun) * 1e3

    with tempfile.TemporaryDirectory() as folder:
        bank.save("one", folder)
        for file in filter(Path.is_file, Path(folder).rglob("*")):
            file.read_bytes()
        bank.remove("one")
        forward("wide")
        plain = statistics.median(forward(None) for _ in range(9))
        taken, uses = [], {}
        for n in range(a.loads):
            begun = time.perf_counter()
            bank.load(f"a{n}", folder)
            taken.append((time.perf_counter() - begun) * 1e3)
            if n in (0, a.loads - 1):
                uses[n] = forward(f"a{n}") - plain
    figures = {"first ms": taken[0], f"number {a.loads} ms": taken[-1], "last ten ms": statistics.median(taken[-10:])}
    return {**figures, "first's first use ms": uses[0], "last's first use ms": uses[a.loads - 1]}


def shares(kinds: dict[str, Any], speed: Callable[[Any], float], tries: int) -> Figures:
    """Medians of `speed` for each kind, all in turn, and what share of the first kind's speed each has."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(tries + 1):
        for name, kind in kinds.items():
            value = speed(kind)
            progress.print(f"    {name} {value:,.0f} tokens/s{' (warming up)' if turn == 0 else ''}")
            if turn:
                found[name].append(value)
    first, *others = found
    figures = {f"{name} tokens/s": statistics.median(own) for name, own in found.items()}
    for name in others:
        pairs = zip(found[name], found[first], strict=True)
        figures[f"{name} share"] = statistics.median(own / whole for own, whole in pairs)
    return figures


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "train-fp32": lambda a: train(a, "fp32"),
    "train-bf16": lambda a: train(a, "bf16"),
    "train-long": lambda a: train(a, "long"),
    "race-fp32": lambda a: race(a, "fp32"),
    "race-bf16": lambda a: race(a, "bf16"),
    "write-fp32": lambda a: write(a, "fp32"),
    "write-bf16": lambda a: write(a, "bf16"),
    "load": load,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, help="where the rows lie (default: they are made first)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--loads", type=int, default=1000)
    parser.add_argument("--expected", type=Path, help="the package's folder: a check that this tree is measured")
    parser.add_argument("--cpu-time", action="store_true", help="count the process's own seconds, with one thread")
    a = parser.parse_args()
    if a.cpu_time:
        import torch

        torch.set_num_threads(1)
        time.perf_counter = time.process_time  # the package's own figures are taken by it too
    import inlay

    if a.expected and Path(inlay.__file__).resolve().parent != a.expected.resolve():
        raise SystemExit(f"inlay comes from {inlay.__file__}, not from {a.expected}: set PYTHONPATH")
    with tempfile.TemporaryDirectory() as made:
        if a.folder is None:
            a.folder = Path(made)
            make_rows(a.folder, 256)
        print(json.dumps(PARTS[a.part](a)))


if __name__ == "__main__":
    main()
