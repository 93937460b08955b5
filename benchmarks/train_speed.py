"""Training speed and memory beside HF PEFT + TRL, in one run on one machine.

Every contestant is a process of its own that trains LoRA with the same rows, targets, optimizer, dtype and initial
adapter; all run in turn, `--rounds` times, so that a noisy machine is noisy for all. Prints a table and one JSON line.

    python benchmarks/train_speed.py --opponent PATH/trl_baseline.py [--dtype float32] [--rows 128] [--source imdb]
needs: pip install -e '.[bench]'
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opponent", help="the script that trains with PEFT and TRL")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--source", default="rotten_tomatoes")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--initial", help=argparse.SUPPRESS)
    return parser.parse_args()


def rows_of(a: argparse.Namespace, tokenizer) -> list[tuple[str, str]]:
    """Prompt and completion of each row, drawn and cut as the opponent's script does."""
    from inlay.bases.reviews import reviews_csv

    csv.field_size_limit(1 << 30)
    with open(reviews_csv(), encoding="utf8", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == a.source]
    random.Random(0).shuffle(rows)
    made = []
    for row in rows[: a.rows]:
        text = tokenizer.decode(tokenizer(row["text"])["input_ids"][: a.max_length - 16])
        made.append((f"Review: {text}\nSentiment:", " positive" if row["label"] == "1" else " negative"))
    return made


def ours(a: argparse.Namespace) -> None:
    """Train with Inlay and print one JSON line."""
    import torch

    import inlay
    from inlay.bases.load import load_base
    from inlay.data.encode import Encoder
    from inlay.data.prepare import prepare
    from inlay.data.table import Row
    from inlay.data.template import Template
    from inlay.methods.table import METHODS
    from inlay.runtime.memory import TokenBudget
    from inlay.training.loop import add_learners, train_steps
    from inlay.training.plan import Plan

    base = load_base("smollm2", a.dtype)
    rows = rows_of(a, base.tokenizer)
    table = [Row({"prompt": p, "completion": c}, n, "rows", n) for n, (p, c) in enumerate(rows)]
    start = time.perf_counter()
    encoder = Encoder(base.tokenizer, Template("completion", "{prompt}", "completion"), a.max_length * 2)
    examples = prepare(encoder, table).examples
    bank = inlay.attach(base.model)
    method = started_from(a.initial) if a.initial and a.method == "lora" else METHODS[a.method]()
    plan = Plan("a", method, lr=a.lr, batch_size=a.batch)
    learner = add_learners(bank, [plan], len(examples))[0]
    budget = TokenBudget(4096, device=base.model.device)
    losses = [learner.loss for _ in train_steps(bank, [learner], examples, budget)]
    seconds = time.perf_counter() - start
    del torch
    print(json.dumps({
        "who": "inlay", "tokens": learner.tokens, "seconds": round(seconds, 2),
        "tokens_per_second": round(learner.tokens / seconds, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "losses": [round(loss, 4) for loss in losses], "products": products(base.model, examples, a),
    }))  # fmt: skip


def started_from(folder: str):
    """LoRA that starts from the adapter in an HF PEFT folder."""
    from safetensors.torch import load_file

    import inlay

    stored = load_file(Path(folder) / "adapter_model.safetensors")

    class Given(inlay.LoRA):
        def create(self, site, generator):
            return {key: stored[f"base_model.model.{site.path}.lora_{key}.weight"].float() for key in "AB"}

    return Given()


def products(model, examples, a: argparse.Namespace) -> float:
    """Seconds that the base's own matrix products of the whole run take alone: forward, and gradient of the input."""
    import torch
    from torch.nn import functional as F

    weights = [
        m.weight.detach() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n
    ]
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(examples), a.batch):
            tokens = sum(len(e.ids) for e in examples[start : start + a.batch])
            inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], dtype=w.dtype) for w in weights}
            grads = {w.shape[0]: torch.randn(tokens, w.shape[0], dtype=w.dtype) for w in weights}
            tries = []
            for _ in range(3):  # the fastest: what the machine does when nothing else wants it
                begun = time.perf_counter()
                for weight in weights:
                    F.linear(inputs[weight.shape[1]], weight)
                    grads[weight.shape[0]] @ weight
                tries.append(time.perf_counter() - begun)
            total += min(tries)
    return round(total, 2)


def measured(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def main() -> None:
    a = arguments()
    if a.ours:
        return ours(a)
    from inlay.bases.load import resolve
    from inlay.bases.reviews import reviews_csv

    same = ["--dtype", a.dtype, "--rows", str(a.rows), "--batch", str(a.batch), "--source", a.source, "--lr", str(a.lr)]
    same += ["--max-length", str(a.max_length)]
    commands: dict[str, list[str]] = {}
    own = [sys.executable, __file__, "--ours", "--method", a.method, *same]
    if a.opponent:
        initial = tempfile.mkdtemp()
        theirs = [sys.executable, str(Path(__file__).with_name("with_initial.py")), initial, a.opponent]
        theirs += ["--model", str(resolve("smollm2")), "--csv", str(reviews_csv()), *same]
        commands |= {"peft+trl": theirs, "peft+trl, tuned": [*theirs, "--tuned"]}
        own += ["--initial", initial]
    commands["inlay"] = own
    for file in Path(resolve("smollm2")).iterdir():  # nobody pays for the disk
        file.read_bytes()
    runs: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(a.rounds):
        for name, command in commands.items():
            runs[name].append(measured(command))
            print(name, runs[name][-1]["tokens_per_second"], file=sys.stderr, flush=True)
    report(a, runs)


def report(a: argparse.Namespace, runs: dict[str, list[dict]]) -> None:
    best = {name: max(each, key=lambda run: run["tokens_per_second"]) for name, each in runs.items()}
    table = Table("who", "tokens/s", "× inlay's", "peak MB", "first losses", "last losses")
    for name, run in best.items():
        ratio = best["inlay"]["tokens_per_second"] / run["tokens_per_second"]
        table.add_row(
            name, f"{run['tokens_per_second']:.0f}", f"{ratio:.2f}", str(run["peak_rss_mb"]),
            str(run["losses"][:3]), str(run["losses"][-3:]),
        )  # fmt: skip
    console = Console(width=120)
    console.print(f"{a.source}, {a.rows} rows, {a.batch} a step, {a.dtype}, {Path(__file__).name}", table)
    share = best["inlay"]["products"] / best["inlay"]["seconds"]
    console.print(f"the base's own matrix products alone: {best['inlay']['products']} s, {share:.0%} of inlay's time")
    print(json.dumps({"settings": vars(a), "runs": runs}))


if __name__ == "__main__":
    main()
