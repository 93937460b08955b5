"""Many contenders in one stream beside as many HF PEFT + TRL runs one after another, in one run on one machine.

Sixteen contenders of 4 rows a step on film reviews with SmolLM2-135M: LoRAs of eight ranks, and DoRA, IA3, prompt,
prefix with its network, VeRA, norm tuning, Houlsby's and Pfeiffer's adapters. PEFT has none of the last two: they are
counted apart. TRL runs with the setting (padding-free or not) and the dtype that are fastest for LoRA here, measured
first. Its seconds are those of trainer.train() alone, ours from the first batch to the last step: starting a process
and loading the base count for neither. A halving done with TRL is reckoned from its seconds a step, as if a run could
be gone on with for nothing; ours is timed with the rungs of `inlay race`, without scoring on either side.

    python benchmarks/race_speed.py --minutes 45
    python benchmarks/race_speed.py --minutes 0 --page docs/performance.md         nothing but the tables
needs: pip install -e '.[bench]'
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pages import write_between
from rich.console import Console

HERE = Path(__file__).resolve().parent
RANKS = (4, 6, 8, 12, 16, 20, 24, 32)
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("dora", {}), "ia3": ("ia3", {}), "prompt": ("prompt", {"num_virtual_tokens": 20}),
    "prefix": ("prefix", {"num_virtual_tokens": 20, "prefix_projection": True}), "vera": ("vera", {}),
    "norm": ("norm", {}), "houlsby": ("houlsby", {}), "pfeiffer": ("pfeiffer", {}),
}  # fmt: skip
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"lora{r}": ("lora", {"r": r, "alpha": 2 * r}) for r in RANKS}, **OTHERS,
}  # fmt: skip
LACKS = ("houlsby", "pfeiffer")
BATCH, STEPS, MANY = 4, 40, (1, 4, 16, 64)
MARKS = "<!-- race speed: begin -->", "<!-- race speed: end -->"
console = Console(stderr=True, highlight=False)
Cell = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45, help="begin no process after so many")
    parser.add_argument("--cells", type=Path, default=HERE / "race_speed.jsonl", help="the file of finished processes")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def texts(count: int) -> list[tuple[str, str]]:
    from method_parts import reviews

    return [
        (f"Review: {row.values['text']}\nSentiment:", " positive" if row.values["label"] == "1" else " negative")
        for row in reviews(count)[0]
    ]


# ---- one process


def ours(names: list[str], dtype: str, steps: int, halving: bool) -> Cell:
    """Contenders in one stream; a name may stand there several times."""
    import inlay
    from inlay.bases.load import load_base
    from inlay.data.encode import Encoder
    from inlay.data.prepare import prepare
    from inlay.data.table import Row
    from inlay.data.template import Template
    from inlay.methods.table import METHODS
    from inlay.race.rungs import choices, kept, rungs_of
    from inlay.runtime.memory import TokenBudget
    from inlay.training.loop import add_learners, train_steps
    from inlay.training.plan import Plan

    base = load_base("smollm2", dtype)
    rows = [Row({"prompt": p, "completion": c}, n, "rows", n) for n, (p, c) in enumerate(texts(BATCH * steps))]
    examples = prepare(Encoder(base.tokenizer, Template("completion", "{prompt}", "completion"), 512), rows).examples
    bank = inlay.attach(base.model)
    plans = [
        Plan(f"{name}-{n}", METHODS[CONTENDERS[name][0]](**CONTENDERS[name][1]), batch_size=BATCH, lr=1e-4)
        for n, name in enumerate(names)
    ]  # fmt: skip
    learners = add_learners(bank, plans, len(examples))
    rungs = rungs_of(steps, choices(len(names))[0])[:-1] if halving else ()
    budget, start = TokenBudget(4096, device=base.model.device), time.perf_counter()
    for stepped in train_steps(bank, learners, examples, budget):
        if stepped[0].step in rungs:  # who stays does not matter to the clock: every third one, so that all kinds do
            live = [own for own in stepped if own.live]
            stay = set(range(0, len(live), 3)[: kept(len(live))])
            for n, own in enumerate(live):
                if n not in stay:
                    own.stop("dropped")
    return {"seconds": time.perf_counter() - start, "tokens": sum(own.tokens for own in learners)}


def theirs(name: str, dtype: str, steps: int, tuned: bool) -> Cell:
    import tempfile

    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from inlay.bases.load import resolve

    task = {"task_type": "CAUSAL_LM"}
    method, given = CONTENDERS[name]
    configs: dict[str, Any] = {
        "lora": lambda: peft.LoraConfig(
            r=given["r"], lora_alpha=given["alpha"], target_modules="all-linear", **task
        ),
        "dora": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=True, **task),
        "ia3": lambda: peft.IA3Config(**task),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=20, **task),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=20, prefix_projection=True, **task),
        "vera": lambda: peft.VeraConfig(r=256, target_modules=["q_proj", "v_proj"], **task),
        "norm": lambda: peft.LNTuningConfig(
            target_modules=["input_layernorm", "post_attention_layernorm", "norm"], **task
        ),
    }  # fmt: skip
    folder = resolve("smollm2")
    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in texts(BATCH * steps)])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)),
        processing_class=AutoTokenizer.from_pretrained(folder), train_dataset=data, peft_config=configs[method](),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_length=None, num_train_epochs=1,
            learning_rate=1e-4, logging_steps=10, report_to=[], save_strategy="no", bf16=False,
            use_cpu=not torch.cuda.is_available(), padding_free=tuned, gradient_checkpointing=False,
            completion_only_loss=True, dataloader_pin_memory=False,
        ),
    )  # fmt: skip
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)  # pyright: ignore
    start = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


# ---- what is to be done


def read_cells(path: Path) -> dict[str, Cell]:
    lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    return {cell["what"]: cell for cell in map(json.loads, lines)}


def best_setting(cells: dict[str, Cell]) -> tuple[str, bool] | None:
    """TRL's fastest dtype and whether without padding; None while one of the four is missing."""
    tried = {
        (dtype, tuned): cells.get(f"try {dtype}{' tuned' if tuned else ''}")
        for dtype in ("float32", "bfloat16") for tuned in (False, True)
    }  # fmt: skip
    there = {key: cell["seconds"] for key, cell in tried.items() if cell and "seconds" in cell}
    return min(there, key=there.__getitem__) if all(cell is not None for cell in tried.values()) else None


def due(cells: dict[str, Cell]) -> tuple[str, list[Any]] | None:
    """The next process: its name, and what it is told."""
    for dtype in ("float32", "bfloat16"):
        for tuned in (False, True):
            if (what := f"try {dtype}{' tuned' if tuned else ''}") not in cells:
                return what, ["theirs", "lora8", dtype, tuned]
    found = best_setting(cells)
    assert found is not None
    dtype, tuned = found
    calls: dict[str, list[Any]] = {}
    for name in CONTENDERS:  # ours between theirs, so that a slow hour is slow for both
        if name not in LACKS:
            free = tuned and name not in ("prompt", "prefix")  # which put rows together that belong apart
            calls[f"theirs {name}"] = ["theirs", name, dtype, free]
    both = [name for name in CONTENDERS if name not in LACKS]
    mine: dict[str, list[Any]] = {
        "ours both have": ["ours", both, dtype, False],
        "ours all": ["ours", [*CONTENDERS], dtype, False],
    }
    mine["ours halving"] = ["ours", both, dtype, True]
    mine["ours nothing"] = ["ours", ["norm"] * len(both), dtype, False]
    mine |= {f"ours {many}": ["ours", ["lora8"] * many, dtype, False] for many in MANY}
    order = [*calls.items()]
    for place, item in zip((3, 7, 10, 12, 13, 14, 14, 14), mine.items(), strict=True):
        order.insert(place, item)
    return next(((what, told) for what, told in order if what not in cells), None)


def fill(a: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * a.minutes
    while time.monotonic() < end and (call := due(read_cells(a.cells))) is not None:
        what, told = call
        command = [sys.executable, __file__, "--one", json.dumps(told), "--steps", str(a.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
        found = json.loads(lines[-1]) if lines and not done.returncode else {"error": done.stderr.strip()[-300:]}
        with a.cells.open("a", encoding="utf8") as file:
            file.write(json.dumps({"what": what, "steps": a.steps, "told": told, **found}) + "\n")
        console.print(what, f"{found['seconds']:.1f} s" if "seconds" in found else f"failed: {found['error']}")


def report(cells: dict[str, Cell]) -> str:
    found = best_setting(cells)
    if found is None:
        return "missing: TRL's best setting"
    free = ", padding-free" if found[1] else ""
    lines = [f"TRL's fastest here: {found[0]}{free}; seconds for {STEPS} steps of {BATCH} rows.", ""]
    own = [f"theirs {name}" for name in CONTENDERS if name not in LACKS]
    lines += ["| contender | PEFT + TRL, s |", "|---|---|"]
    lines += [f"| {what[7:]} | {_seconds(cells.get(what))} |" for what in own]
    lines += ["", *_ratios(cells, own), ""]
    lines += [
        "| LoRAs r=8 in one stream | seconds | tokens/s | as fast as PEFT + TRL one after another |",
        "|---|---|---|---|",
    ]
    for many in MANY:
        cell = cells.get(f"ours {many}", {})
        speed = f"{cell['tokens'] / cell['seconds']:,.0f}" if "seconds" in cell else "–"
        alone = cells.get("theirs lora8", {}).get("seconds")
        times = f"{many * alone / cell['seconds']:.2f} times" if alone and "seconds" in cell else "–"
        lines.append(f"| {many} | {_seconds(cell)} | {speed} | {times} |")
    return "\n".join(lines)


def _seconds(cell: Cell | None) -> str:
    return "missing" if not cell else cell.get("error") or f"{cell['seconds']:.1f}"


def _ratios(cells: dict[str, Cell], own: list[str]) -> list[str]:
    from inlay.race.rungs import choices, work

    lines = []
    there = [cells[what]["seconds"] for what in own if "seconds" in cells.get(what, {})]
    mine = {
        name: cells[f"ours {name}"].get("seconds")
        for name in ("both have", "all", "halving")
        if f"ours {name}" in cells
    }
    if len(there) == len(own) and mine.get("both have"):
        whole, ours_took = sum(there), mine["both have"]
        ratio = whole / ours_took
        lines.append(
            f"{len(own)} one after another: {whole:.0f} s; in one stream: {ours_took:.0f} s, {ratio:.2f} times as fast."
        )
    if len(there) == len(own) and mine.get("halving"):
        halved = sum(there) / len(own) * work(len(own), choices(len(own))[0])
        lines.append(
            f"The same halving: {halved:.0f} s and {mine['halving']:.0f} s, {halved / mine['halving']:.2f} times."
        )
    if len(there) == len(own) and (least := cells.get("ours nothing", {}).get("seconds")):
        lines.append(
            f"As many norm tunings, which add next to nothing to the base's own products: {least:.0f} s, "
            f"so that more than {sum(there) / least:.1f} times cannot be had here."
        )
    if mine.get("all"):
        lines.append(f"All {len(CONTENDERS)}, with those PEFT lacks: {mine['all']:.0f} s.")
    return lines


def main() -> None:
    a = arguments()
    if a.one:
        kind, what, dtype, flag = json.loads(a.one)
        print(json.dumps((ours if kind == "ours" else theirs)(what, dtype, a.steps, flag)))
        return
    fill(a)
    text = report(read_cells(a.cells))
    print(text)
    if a.page:
        write_between(a.page, MARKS, text)


if __name__ == "__main__":
    main()
