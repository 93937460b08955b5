"""Training speed and GPU memory beside HF PEFT + TRL on a random Llama of 1B parameters, in one run on one machine.

Every contestant is a process of its own: LoRA r=8 on all linear layers, AdamW, the same rows of random tokens in
bfloat16; of ours also 16 such LoRAs in one stream, a row of each a step. PEFT and TRL run padding-free with each
attention that is installed (flash_attention_2, flex_attention, sdpa). Two passes are made, and the second one is timed.
Variants: the base in 4 bits, and norms and MLPs of ours through torch.compile.

    python benchmarks/gpu_speed.py [--rows 256] [--batch 16] [--rounds 3]
needs: pip install -e '.[bench,quantize]'

Without CUDA it rehearses everything on the CPU with a tiny model; those figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

SHAPES = {
    "1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=1024,
    ),
}  # fmt: skip
CUDA = torch.cuda.is_available()
RATE = 2e-4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b" if CUDA else "tiny")
    parser.add_argument("--rows", type=int, default=256 if CUDA else 32)
    parser.add_argument("--batch", type=int, default=16 if CUDA else 4)
    parser.add_argument("--shortest", type=int, default=32 if CUDA else 8)
    parser.add_argument("--longest", type=int, default=512 if CUDA else 48)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--who", default="", help="which contestants, with semicolons between (default: all)")
    parser.add_argument("--limit", type=int, default=600, help="seconds that one process may take")
    parser.add_argument("--only", help="one contestant, in this process")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    return parser.parse_args()


def contestants() -> list[str]:
    attentions = [name for name, package in (("flash_attention_2", "flash_attn"),) if find_spec(package)]
    attentions += ["flex_attention", "sdpa"] if CUDA else ["sdpa"]
    names = [f"peft+trl, {attention}" for attention in attentions] + ["inlay", "inlay, 16 adapters", "inlay, compiled"]
    if find_spec("bitsandbytes"):
        names += [f"peft+trl, {attentions[0]}, 4bit", "inlay, 4bit"]
    return names


def rows_of(a: argparse.Namespace) -> list[list[int]]:
    draw = random.Random(0)
    size = SHAPES[a.shape]["vocab_size"]
    lengths = [draw.randint(a.shortest, a.longest) for _ in range(a.rows)]
    return [[draw.randrange(3, size) for _ in range(n)] for n in lengths]


def make_base(a: argparse.Namespace, folder: str) -> None:
    """A random model, and the least tokenizer that TRL asks for."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[a.shape], tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device("cuda" if CUDA else "cpu"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


class Clock:
    """Time, loss and peak memory of the second of two passes."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.steps = -(-a.rows // a.batch)
        self.done, self.marks, self.losses = 0, [0.0, 0.0], []

    def step(self, loss: float | None = None) -> None:
        self.done += 1
        if loss is not None:
            self.losses.append(loss)
        if self.done in (self.steps, 2 * self.steps):
            if CUDA:
                torch.cuda.synchronize()
            self.marks[self.done // self.steps - 1] = time.perf_counter()

    def result(self, tokens: int) -> dict:
        from inlay.runtime.memory import peak_memory_mb

        seconds = self.marks[1] - self.marks[0]
        peak = torch.cuda.max_memory_allocated() / 2**20 if CUDA else peak_memory_mb()
        last = self.losses[-self.steps :]
        return {"tokens_per_second": tokens / seconds, "peak_mb": peak, "loss": statistics.mean(last)}


def ours(a: argparse.Namespace, rows: list[list[int]]) -> dict:
    import inlay
    from inlay.bases.load import load_base
    from inlay.data.encode import Example
    from inlay.runtime.memory import TokenBudget
    from inlay.training.loop import add_learners, train_steps
    from inlay.training.plan import Plan

    if "compiled" in a.only:
        compiled()
    bank = inlay.attach(load_base(a.base, "bfloat16", quantize="4bit" if "4bit" in a.only else None).model)
    clock = Clock(a)
    examples = [
        Example(tuple(row), tuple(n >= len(row) // 2 for n in range(len(row))), sample=number)
        for number, row in enumerate(rows)
    ]
    many = 16 if "16" in a.only else 1  # learners in one stream, which share the rows of a step among them
    batch, steps = a.batch // many, 2 * clock.steps
    plans = [
        Plan(f"a{n}", inlay.LoRA(r=8, alpha=16 + n % 4), lr=RATE, batch_size=batch, steps=steps, seed=n)
        for n in range(many)
    ]
    learners = add_learners(bank, plans, len(examples))
    seen = [0, 0]
    for _ in train_steps(bank, learners, examples, TokenBudget(1 << 20, device=bank.model.device)):
        clock.step(statistics.mean(learner.loss for learner in learners))
        seen[clock.done > clock.steps] = sum(learner.tokens for learner in learners)
    return clock.result(seen[1] - seen[0])


def compiled() -> None:
    """Norms and gated MLPs through torch.compile: what is one function already becomes one kernel."""
    from inlay.kernels import gate, norm

    gate.gated, gate.gated_backward = (torch.compile(f, dynamic=True) for f in (gate.gated, gate.gated_backward))
    norm.normed, norm.normed_backward = (torch.compile(f, dynamic=True) for f in (norm.normed, norm.normed_backward))


def theirs(a: argparse.Namespace, rows: list[list[int]]) -> dict:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from inlay.bases.dtypes import pick_device
    from inlay.bases.quantize import quantization

    bits = "4bit" if "4bit" in a.only else None  # the very settings that ours has
    more = quantization(bits, {}, Path(a.base), torch.bfloat16, pick_device())
    model = AutoModelForCausalLM.from_pretrained(
        a.base, dtype=torch.bfloat16, attn_implementation=a.only.split(", ")[1], **more
    )
    clock = Clock(a)

    class Timed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step()

    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(a.base),
        train_dataset=Dataset.from_list(
            [{"input_ids": row, "completion_mask": [int(n >= len(row) // 2) for n in range(len(row))]} for row in rows]
        ),
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear"),
        callbacks=[Timed()],
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=a.batch, max_length=None, num_train_epochs=2,
            learning_rate=RATE, logging_steps=1, report_to=[], save_strategy="no", bf16=CUDA, use_cpu=not CUDA,
            padding_free=True, gradient_checkpointing=False, completion_only_loss=True,
        ),
    )  # fmt: skip
    trainer.train()
    clock.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.result(sum(map(len, rows)))


def measured(command: list[str], limit: int) -> dict:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired as late:
        print((late.stderr or b"").decode(errors="replace")[-3000:], file=sys.stderr)
        return {"error": f"it took longer than {limit} seconds"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]}
    return json.loads(lines[-1])


def main() -> None:
    a = arguments()
    if a.only:
        faulthandler.dump_traceback_later(a.limit - 3)  # where it was when it was ended
        made = (ours if a.only.startswith("inlay") else theirs)(a, rows_of(a))
        return print(json.dumps(made))
    console = Console(width=110)
    where = torch.cuda.get_device_name() if CUDA else "no CUDA: a rehearsal on the CPU, which says nothing about a GPU"
    chosen = [name.strip() for name in a.who.split(";") if name.strip()] or contestants()
    if unknown := sorted(set(chosen) - set(contestants())):
        sys.exit(f"no contestant here is called {'; '.join(unknown)}: choose from {'; '.join(contestants())}")
    runs: dict[str, list[dict]] = {name: [] for name in chosen}
    same = [f"--{name}={getattr(a, name)}" for name in ("shape", "rows", "batch", "shortest", "longest", "limit")]
    with tempfile.TemporaryDirectory() as folder:
        make_base(a, folder)
        for _ in range(a.rounds):
            for name, own in runs.items():
                own.append(measured([sys.executable, __file__, *same, "--base", folder, "--only", name], a.limit))
                console.print(name, own[-1], highlight=False)
    table = Table("who", "tokens/s", "beside the best opponent", "peak MB", "mean loss")
    made = {name: [run for run in own if "error" not in run] for name, own in runs.items()}
    speed = {name: statistics.median(r["tokens_per_second"] for r in own) for name, own in made.items() if own}
    for name, own in speed.items():
        alike = [v for n, v in speed.items() if n.startswith("peft") and ("4bit" in n) == ("4bit" in name)]
        beside = f"{own / max(alike):.2f}" if alike else "–"
        peak, loss = (statistics.median(r[key] for r in made[name]) for key in ("peak_mb", "loss"))
        table.add_row(name, f"{own:,.0f}", beside, f"{peak:,.0f}", f"{loss:.4f}")
    console.print(f"{where}; {a.shape}, {a.rows} rows of {a.shortest} to {a.longest} tokens, {a.batch} a step", table)
    print(json.dumps({"settings": vars(a), "runs": runs}))


if __name__ == "__main__":
    main()
