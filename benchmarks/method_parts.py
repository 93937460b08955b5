"""One process of methods.py: trains and scores some methods, or measures what one costs; a JSON line for each.

python benchmarks/method_parts.py screen lora,ia3
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inlay.methods.table import METHODS

ASKED = "Here is a review of a film. Say whether it is negative or positive."
STARTS = ("orthogonal", "pissa", "olora", "eva", "corda", "lora_ga")
Case = tuple[str, dict[str, Any]]
SPECIAL: dict[str, Case] = {
    "rslora": ("lora", {"r": 32, "use_rslora": True}),
    "prefix with network": ("prefix", {"prefix_projection": True}),
    "prefix at random": ("prefix", {"init": "random"}),
    "prefix from text": ("prefix", {"init": "text", "init_text": ASKED}),
    "prompt from text": ("prompt", {"init": "text", "init_text": ASKED}),
    **{f"lora from {init}": ("lora", {"init": init}) for init in STARTS},
}
FITTING: dict[str, dict[str, Any]] = {  # what the defaults cannot be on this base, whose widths are 576, 192 and 1536
    "c3a": {"block_size": 192},
    "bitfit": {"add_bias": True},
    "miss": {"r": 64},
    "alora": {"invocation": "\nSentiment:"},
    "trained_tokens": {"token_indices": [42, 198, 2572, 2731, 3524, 21465, 35658]},  # all of a prompt but the review
}
ELSEWHERE = ("merged_lora", "fusion")
"""The first one is for fused queries, keys and values, which this base has not; the second for trained adapters."""
CASES: dict[str, Case] = {**{n: (n, FITTING.get(n, {})) for n in METHODS if n not in ELSEWHERE}, **SPECIAL}
"""By what a row of the table is called: the method and its settings."""
MAIN = (
    "lora", "rslora", "dora", "houlsby", "prefix", "prefix at random", "prefix with network", "prefix from text",
    "prompt", "ia3", "norm",
)  # fmt: skip
PEFT = ("lora", "ia3", "prefix at random", "prompt")
SEEDS = (0, 1, 2)
ROWS, MORE, CHOOSE, TEST = 480, 2000, 300, 1000
SPREAD = (1 / 3, 1.0, 3.0)
"""Rates that are tried, times the method's own."""


def film_reviews() -> list[Any]:
    """All rows of Rotten Tomatoes, in one drawn order."""
    from inlay.bases.reviews import reviews_csv
    from inlay.data.table import read_table, shuffled

    return [row for row in shuffled(read_table(reviews_csv()).rows, 0) if row.values["source"] == "rotten_tomatoes"]


def reviews(rows: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Rows to train on, to choose by and to score on; the last two are the same for every number of the first."""
    drawn = film_reviews()
    return drawn[TEST + CHOOSE :][:rows], drawn[TEST:][:CHOOSE], drawn[:TEST]


class Bench:
    """The base, a bank on it, and rows made ready."""

    def __init__(self, dtype: str) -> None:
        import inlay
        from inlay.bases.load import load_base
        from inlay.data.encode import Encoder
        from inlay.data.template import Template

        self.base = load_base("smollm2", dtype)
        self.device = self.base.model.device
        self.at_once = 4096 if self.device.type == "cpu" else 16384
        self.bank = inlay.attach(self.base.model)
        template = Template(
            kind="label", prompt="Review: {text}\nSentiment:", answer="label",
            verbalizer={"0": ("negative",), "1": ("positive",)},
        )  # fmt: skip
        self.encoder = Encoder(self.base.tokenizer, template, 256)

    def train(self, plans: list[Any], rows: list[Any]) -> list[Any]:
        from inlay.data.prepare import prepare
        from inlay.training.loop import train

        return train(self.bank, plans, prepare(self.encoder, rows).examples, self.at_once)

    def scored(self, rows: list[Any], names: list[str | None]) -> dict[str | None, Any]:
        from inlay.evaluation.score import score_rows
        from inlay.runtime.memory import TokenBudget

        return score_rows(self.bank, self.encoder, rows, names, TokenBudget(self.at_once, device=self.device))

    def cell(self, kind: str, case: str, seed: int) -> dict[str, Any]:
        import torch

        where = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return {"kind": kind, "case": case, "seed": seed, "dtype": str(self.base.dtype), "device": where}

    def method(self, case: str, more: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """The method of a case, with `more` settings than the case has."""
        name, settings = CASES[case]
        return METHODS[name](**{**settings, **more}).with_tokenizer(self.base.tokenizer)


def told(scored: Any) -> dict[str, Any]:
    return {
        "accuracy": scored.scores["accuracy"],
        "interval": scored.intervals["accuracy"],
        "loss": scored.scores["loss"],
    }


def screen(a: argparse.Namespace, bench: Bench) -> None:
    from inlay.training.plan import Plan

    rows, choose, test = reviews(ROWS)
    plans = [
        Plan(f"{case} {share:.3g}", bench.method(case), lr=share * bench.method(case).usual_rate, seed=a.seed)
        for case in a.cases for share in a.spread
    ]  # fmt: skip
    learners = {learner.plan.name: learner for learner in bench.train(plans, rows)}
    fine = [name for name, learner in learners.items() if not learner.diverged]
    tried = bench.scored(choose, [*fine])
    for case in a.cases:
        own = {name: tried[name].scores["loss"] for name in fine if name.rpartition(" ")[0] == case}
        cell = bench.cell("screen", case, a.seed)
        if not own:
            print(json.dumps({**cell, "error": "diverged at all rates"}), flush=True)
            continue
        best = min(own, key=own.__getitem__)
        final = bench.scored(test, [best, *([None] if case == a.cases[0] else [])])
        base = {"base accuracy": final[None].scores["accuracy"]} if None in final else {}
        rates = {f"{learners[name].plan.rate:g}": loss for name, loss in own.items()}
        print(
            json.dumps({**cell, "rate": learners[best].plan.rate, "tried": rates, **told(final[best]), **base}),
            flush=True,
        )


def main_cell(a: argparse.Namespace, bench: Bench) -> None:
    from inlay.training.plan import Plan

    (case,) = a.cases
    rows, _, test = reviews(MORE)
    rate = a.rates.get(case, bench.method(case).usual_rate)
    bench.train([Plan("it", bench.method(case), lr=rate, seed=a.seed)], rows)
    cell = {**bench.cell("main", case, a.seed), "rate": rate}
    print(json.dumps({**cell, **told(bench.scored(test, ["it"])["it"])}))


def peft_cell(a: argparse.Namespace, bench: Bench) -> None:
    """HF PEFT's model in a plain loop: the same rows, batches of 16, AdamW, linear schedule, clipping at 1."""
    import peft
    import torch

    (case,) = a.cases
    rows, _, test = reviews(MORE)
    rate = a.rates.get(case, bench.method(case).usual_rate)
    configs = {
        "lora": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
        "prefix at random": lambda: peft.PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
    }
    bench.bank.detach()
    torch.manual_seed(a.seed)
    model: Any = peft.get_peft_model(bench.base.model, configs[case]())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    from inlay.data.prepare import prepare

    examples = prepare(bench.encoder, rows).examples
    steps = -(-len(rows) // 16)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(a.seed)).tolist()
    model.train()
    for start in range(0, len(order), 16):
        batch = [examples[i] for i in order[start : start + 16]]
        width = max(len(e.ids) for e in batch)
        ids, labels, mask = (torch.full((len(batch), width), fill) for fill in (0, -100, 0))
        for row, example in enumerate(batch):
            n = len(example.ids)
            ids[row, :n], mask[row, :n] = torch.tensor(example.ids), 1
            kept = torch.tensor(example.loss_mask)
            labels[row, :n] = torch.where(kept, ids[row, :n], -100)
        ids, mask, labels = (tensor.to(bench.device) for tensor in (ids, mask, labels))
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fresh = Bench(a.dtype)
        fresh.bank.load("theirs", folder)
    cell = {**bench.cell("peft", case, a.seed), "rate": rate}
    print(json.dumps({**cell, **told(fresh.scored(test, ["theirs"])["theirs"])}))


def cost(a: argparse.Namespace, bench: Bench) -> None:
    """Training alone for some steps, the first of which does not count; then one row's answer with and without."""
    from inlay.data.prepare import prepare
    from inlay.errors import UsageError
    from inlay.runtime.latency import added_time
    from inlay.runtime.memory import TokenBudget, peak_memory_mb
    from inlay.training.loop import add_learners, train_steps
    from inlay.training.plan import Plan

    (case,) = a.cases
    rows, _, _ = reviews(16 * 7)
    examples = prepare(bench.encoder, rows).examples
    learners = add_learners(bench.bank, [Plan("it", bench.method(case), lr=1e-6)], len(examples), examples=examples)
    marks = []
    for _ in train_steps(bench.bank, learners, examples, TokenBudget(4096)):
        marks.append((time.perf_counter(), learners[0].tokens))
    (begun, few), (ended, many) = marks[0], marks[-1]
    peak = peak_memory_mb()
    added = added_time(bench.bank, "it", examples[0], seconds=3.0)
    with tempfile.TemporaryDirectory() as folder:
        bench.bank.save("it", folder)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    try:
        bench.bank.merge("it")
        merges = True
    except UsageError:
        merges = False
    trained = sum(p.numel() for p in learners[0].parameters)
    print(json.dumps({
        **bench.cell("cost", case, 0), "trained": trained,
        "base": sum(p.numel() for p in bench.base.model.parameters()), "bytes": size, "peak MB": peak,
        "tokens/s": (many - few) / (ended - begun), "ms a token": 1e3 * added.median,
        "merges": merges,
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["screen", "main", "peft", "cost"])
    parser.add_argument("cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--spread", default=",".join(f"{share:.4g}" for share in SPREAD), help="rates, times its own")
    parser.add_argument("--rates", type=json.loads, default={})
    a = parser.parse_args()
    a.cases, a.spread = a.cases.split(","), [float(share) for share in a.spread.split(",")]
    {"screen": screen, "main": main_cell, "peft": peft_cell, "cost": cost}[a.kind](a, Bench(a.dtype))


if __name__ == "__main__":
    main()
