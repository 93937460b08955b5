"""Writing: tokens a second of the decode loop with no adapter, one, many, eight methods; transformers, HF PEFT beside.

SmolLM2-135M, prompts of 32 random tokens; where CUDA is, a random Llama of 1B parameters in bfloat16 on it, and our
steps uncaptured and transformers' compiled ones beside them. All sides are in one process and take turns, so that a
noisy machine is noisy for all; a figure is the median over steps, the first of which do not count. Each share is of
what stands beside it.

    python benchmarks/decode.py                                     both dtypes, about five minutes of two cores
    python benchmarks/decode.py --dtypes bfloat16 --rounds 2 --page docs/performance.md
    python benchmarks/decode.py --shape 1b --new 64 --cells benchmarks/decode_gpu.json    what a GPU is given
    python benchmarks/decode.py --profile                           where a step's time goes

Machines whose cores are shared should run it alone: a step has hundreds of parallel regions, and each waits for the
slower core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_speed import SHAPES
from pages import write_between
from rich.console import Console

ROWS, PROMPT = 32, 32
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CHANGES = (12, 16, 20)
WARM = 8 if CUDA else 4  # the first ones are captured on a GPU
MARKS = "<!-- decode on a GPU: begin -->" if CUDA else "<!-- decode: begin -->"
EIGHT = {
    "lora": {}, "ia3": {}, "houlsby": {}, "norm": {}, "prefix": {"init": "random"}, "prompt": {"init": "random"},
    "dora": {}, "bitfit": {"add_bias": True},
}  # fmt: skip
console = Console(stderr=True, highlight=False)
Side = Callable[[], list[float]]
"""Runs once, and gives the seconds of its steps."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--shape", choices=["", *SHAPES], default="1b" if CUDA else "", help="random weights")
    parser.add_argument("--dtypes", default="bfloat16" if CUDA else "float32,bfloat16")
    parser.add_argument("--new", type=int, default=64 if CUDA else 24, help="steps of each side in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cells", type=Path, default=Path(__file__).with_name("decode_gpu.json" if CUDA else "decode.json")
    )
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-peft", action="store_true")
    return parser.parse_args()


class Bench:
    """A base with a bank of adapters whose values are random, and the same base again, without."""

    def __init__(self, base: str, shape: str, dtype: str, new: int, peft: bool) -> None:
        import inlay
        from inlay.methods.table import METHODS

        self.new = new
        torch.manual_seed(0)
        self.plain = base_of(base, shape, dtype)
        self.bank = inlay.attach(base_of(base, shape, dtype))
        for number in range(ROWS):
            self.bank.add(f"lora {number}", inlay.LoRA(r=8, alpha=16), seed=number)
        for name, settings in EIGHT.items():
            self.bank.add(name, METHODS[name](**settings), seed=1)
        with torch.no_grad():
            for parameter in self.bank.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
        generator = torch.Generator().manual_seed(3)
        self.prompts = torch.randint(3, min(40000, self.plain.config.vocab_size), (ROWS, PROMPT), generator=generator)
        self.peft = self._peft(base_of(base, shape, dtype)) if peft else None

    def _peft(self, model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        def config() -> Any:
            return LoraConfig(
                r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
            )

        wrapped: Any = get_peft_model(model, config(), adapter_name="a0")
        for number in range(1, ROWS):
            wrapped.add_adapter(f"a{number}", config())
        return wrapped.eval()

    def ours(self, routes: list[Any], change: str = "", captured: bool = True) -> list[float]:
        """The seconds of each step; before the steps of CHANGES a row "joins" or "leaves", as `change` says."""
        from inlay.runtime.decode import Decoder

        decoder = Decoder(self.bank, 2**30, 4096)
        decoder._captured.on &= captured
        for route, ids in zip(routes, self.prompts.tolist(), strict=False):
            decoder.add(route, ids, self.new + 8, scope=str(len(decoder.waiting)))
        times: list[float] = []
        while len(times) < self.new:
            if change == "leaves" and len(times) in CHANGES:
                decoder.end(decoder.rows[0])
            if change == "joins" and len(times) in CHANGES:
                decoder.add(routes[0], self.prompts[len(times)].tolist(), self.new, scope=f"later {len(times)}")
            begun = time.perf_counter()
            rows, logits = decoder.step()
            chosen = [] if logits is None else logits.max(-1).indices.tolist()  # as `sample` does for greedy rows
            times.append(time.perf_counter() - begun)
            for row, token in zip(rows, chosen, strict=True):
                decoder.write(row, token)
        for row in [*decoder.rows, *decoder.waiting]:
            decoder.end(row)
        return times

    def generate(self, model: Any, rows: int, new: int = 0, **more: Any) -> list[float]:
        """transformers' own loop, step by step."""
        new = new or self.new
        marks = [time.perf_counter()]

        def mark(ids: Any, scores: Any, **kwargs: Any) -> Any:
            marks.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        ids = self.prompts[:rows].to(DEVICE)
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0, stopping_criteria=[mark], **more,
            )  # fmt: skip
        return [after - before for before, after in pairwise(marks)]

    def sides(self) -> dict[str, Side]:
        loras = [f"lora {n}" for n in range(ROWS)]
        found: dict[str, Side] = {
            "no adapter": lambda: self.ours([None] * ROWS),
            "one LoRA for all": lambda: self.ours(["lora 0"] * ROWS),
            "8 LoRAs": lambda: self.ours([loras[n % 8] for n in range(ROWS)]),
            "32 LoRAs": lambda: self.ours(loras),
            "eight methods": lambda: self.ours([[*EIGHT][n % 8] for n in range(ROWS)]),
            "transformers": lambda: self.generate(self.plain, ROWS),
            "one row": lambda: self.ours([None]),
            "one row, LoRA": lambda: self.ours(["lora 0"]),
            "one row, transformers": lambda: self.generate(self.plain, 1),
        }
        if CUDA:
            found["no adapter, uncaptured"] = lambda: self.ours([None] * ROWS, captured=False)
            found["32 LoRAs, uncaptured"] = lambda: self.ours(loras, captured=False)
            static = {"cache_implementation": "static"}  # which transformers compiles
            found["transformers, compiled"] = lambda: self.generate(self.plain, ROWS, **static)
            found["one row, transformers, compiled"] = lambda: self.generate(self.plain, 1, **static)
        if self.peft is not None:
            names = [f"a{n}" for n in range(ROWS)]
            found["HF PEFT, 32 LoRAs"] = lambda: self.generate(self.peft, ROWS, 24, adapter_names=names)
        return found


def base_of(base: str, shape: str, dtype: str) -> Any:
    """A base that is at hand, or one of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from inlay.bases.load import load_base

    if not shape:
        return load_base(base, dtype).model.to(DEVICE)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def measured(a: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """By side: milliseconds of a step, the median of all rounds; and what a row costs that joins."""
    bench = Bench(a.base, a.shape, dtype, a.new, not a.no_peft)
    times: dict[str, list[float]] = {}
    for round_ in range(a.rounds):
        for name, side in bench.sides().items():
            times.setdefault(name, []).extend(side()[WARM:])
            console.print(f"{dtype}, round {round_ + 1}, {name}: {1e3 * statistics.median(times[name]):.2f} ms")
    steps, fewer = (bench.ours([f"lora {n}" for n in range(ROWS)], change) for change in ("joins", "leaves"))
    alone = bench.ours(["lora 0"])[0]
    plain = statistics.median(steps[n] for n in range(WARM, a.new) if n not in CHANGES and n - 1 not in CHANGES)
    return {
        "ms": {name: 1e3 * statistics.median(own) for name, own in times.items()},
        "join": {
            "step": 1e3 * plain, "own prompt": 1e3 * alone,
            "its step": 1e3 * statistics.median(steps[n] for n in CHANGES),
            "the step behind it": 1e3 * statistics.median(steps[n + 1] for n in CHANGES),
            "a step that a row has left": 1e3 * statistics.median(fewer[n] for n in CHANGES),
        },
        "memory": memory(bench.bank), "threads": torch.get_num_threads(),
        "where": f"{torch.cuda.get_device_name()}, random Llama {a.shape}" if CUDA else "",
    }  # fmt: skip


def memory(bank: Any) -> dict[str, float]:
    """Bytes of a LoRA's file, and of what a bank that only answers holds for it while rows go on."""
    from inlay.bank.narrowing import narrow
    from inlay.runtime.decode import Decoder

    with tempfile.TemporaryDirectory() as folder:
        bank.save("lora 0", folder)
        file = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    decoder = Decoder(bank, 2**30)
    for number in range(ROWS):
        narrow(bank.adapters[f"lora {number}"])
        decoder.add(f"lora {number}", [5, 6, 7], 4)
    for _ in range(2):
        rows, logits = decoder.step()
        assert logits is not None
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            decoder.write(row, token)
    flight: Any = decoder._flight
    held = {own.data_ptr(): own.untyped_storage().nbytes() for own in tensors([bank.adapters, flight[1].route], set())}
    base = {own.data_ptr() for own in bank.model.parameters()}
    for row in [*decoder.rows]:
        decoder.end(row)
    return {"file": file, "held": sum(size for own, size in held.items() if own not in base) / ROWS}


def tensors(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """All tensors that can be reached from a thing, but for modules, and key-value stores."""
    if isinstance(thing, torch.Tensor):
        yield thing
    if id(thing) in seen or isinstance(thing, (torch.Tensor, torch.nn.Module, str, bytes, type)):
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        parts = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set)):
        parts = [*thing]
    else:
        parts = [value for name, value in getattr(thing, "__dict__", {}).items() if name != "store"]
    for part in parts:
        yield from tensors(part, seen)


def table(found: dict[str, Any]) -> str:
    """Both dtypes' figures as a page has them."""
    lines = []
    for dtype, own in found.items():
        ms = own["ms"]
        rows = {name: 1 if name.startswith("one row") else ROWS for name in ms}
        lines += [f"| {dtype} | ms a step | tokens/s | share |", "|---|---|---|---|"]
        against = {name: "transformers" if name == "no adapter" else "no adapter" for name in ms}
        against |= {"32 LoRAs, uncaptured": "no adapter, uncaptured"}
        against |= {"one row": "one row, transformers", "one row, LoRA": "one row"}
        for name, value in ms.items():
            other = against[name]
            share = "" if "transformers" in name else f"{ms[other] / value:.2f} of {other}"
            if name.startswith("HF PEFT"):
                share = f"32 LoRAs here are {value / ms['32 LoRAs']:.1f} times as fast"
            lines.append(f"| {name} | {value:.2f} | {1e3 * rows[name] / value:.0f} | {share} |")
        join, held = own["join"], own["memory"]
        left = join.get("a step that a row has left")
        left = "" if left is None else f", and one that a row has left {left:.1f}"
        where = f"{own['where']}." if own.get("where") else f"{own['threads']} threads."
        lines += [
            "",
            f"A row that joins 32 with LoRAs: its step takes {join['its step']:.0f} ms, where a step takes "
            f"{join['step']:.1f} and reading its prompt alone {join['own prompt']:.0f}; the step behind it "
            f"{join['the step behind it']:.1f}{left}. A LoRA's file has {held['file'] / 2**20:.2f} MiB, and "
            f"{held['held'] / 2**20:.2f} MiB are held for it while its rows write "
            f"({held['held'] / held['file']:.2f} times). {where}",
            "",
        ]
    return "\n".join(lines).rstrip()


def profile(a: argparse.Namespace) -> None:
    """The operations of ten steps of 32 rows with 32 LoRAs."""
    from torch.profiler import ProfilerActivity, profile

    bench = Bench(a.base, a.shape, a.dtypes.split(",")[0], a.new, False)
    bench.ours([f"lora {n}" for n in range(ROWS)])
    with profile(activities=[ProfilerActivity.CPU]) as made:
        bench.ours([f"lora {n}" for n in range(ROWS)])
    console.print(made.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), markup=False)


def main() -> None:
    a = arguments()
    if a.profile:
        profile(a)
        return
    found = json.loads(a.cells.read_text(encoding="utf8")) if a.cells.exists() else {}
    for dtype in [name for name in a.dtypes.split(",") if name and a.rounds]:
        found[dtype] = measured(a, dtype)
        a.cells.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")
    print(table(found))
    if a.page:
        write_between(a.page, (MARKS, MARKS.replace("begin", "end")), table(found))


if __name__ == "__main__":
    main()
