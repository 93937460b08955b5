"""What each place of virtual tokens does on chat data: before BOS, behind the system turn, before the answer.

English dialogue of chatterbot-corpus as conversations (a system turn, a question, an answer) in SmolLM2-135M-Instruct's
own chat template. A cell is one place: prompt tuning of all seeds in one mixed stream, then the loss of the answers on
held-out rows, which is paired with that of the start row by row. SmolLM2's BOS is what opens its turns, <|im_start|>.

    python benchmarks/places.py --minutes 10 --dtype bfloat16
    python benchmarks/places.py --minutes 0 --page docs/methods.md      nothing but the table, from what is there
    python benchmarks/places.py --rows 32 --held 32 --seeds 1 --cells /tmp/cells.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from pages import write_between
from rich.console import Console

Cell = dict[str, Any]
HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- places: begin -->", "<!-- places: end -->"
PLACES = {
    "start": "before the opening token of the first turn",
    "after-system": "behind the system turn, before the user's",
    "before-answer": "behind the words that open the answer",
}
SYSTEM = "You are good company. Answer in one short sentence."
TOKENS, EPOCHS, BATCH = 20, 2, 8
console = Console(stderr=True, highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="begin no place after so many")
    parser.add_argument("--cells", type=Path, default=HERE / "places.jsonl", help="the file of finished places")
    parser.add_argument("--rows", type=int, default=240, help="conversations to train on")
    parser.add_argument("--held", type=int, default=300, help="conversations to score on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    return parser.parse_args()


def talks(a: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Conversations to train on, and those held out, as rows."""
    from race_worth import dialogue

    from inlay.data.table import Row

    parts = []
    for pairs in dialogue(a.rows):
        rows = []
        for number, pair in enumerate(pairs):
            turns = ("system", SYSTEM), ("user", pair["prompt"]), ("assistant", pair["completion"])
            messages = [{"role": role, "content": words} for role, words in turns]
            rows.append(Row({"messages": messages}, number, "dialogue", number + 1))
        parts.append(rows)
    return parts[0], parts[1][: a.held]


def cell_of(a: argparse.Namespace, place: str, base: Any, rows: tuple[list[Any], list[Any]]) -> Cell:
    """Train prompts of all seeds at the place; losses and tokens of every held-out row."""
    import inlay
    from inlay.data.encode import Encoder
    from inlay.data.prepare import prepare
    from inlay.data.template import Template
    from inlay.evaluation.score import score_rows
    from inlay.runtime.memory import TokenBudget
    from inlay.training.loop import train
    from inlay.training.plan import Plan

    train_rows, held = rows
    encoder = Encoder(base.tokenizer, Template("messages", answer="messages", chat=True), 256, place)
    bank = inlay.attach(base.model)
    method = inlay.PromptTuning(num_virtual_tokens=TOKENS, init="vocab")
    plans = [Plan(f"seed {n}", method, epochs=EPOCHS, batch_size=BATCH, seed=n) for n in range(a.seeds)]
    begun = time.perf_counter()
    try:
        train(bank, plans, prepare(encoder, train_rows).examples)
        seconds = time.perf_counter() - begun
        names: list[str | None] = [None, *(plan.name for plan in plans)]
        scored = score_rows(bank, encoder, held, names, TokenBudget(4096, device=base.model.device))
    finally:
        bank.detach()
    nats = {"base" if name is None else name: own.rows.nats.tolist() for name, own in scored.items()}
    tokens = [int(count) for count in scored[None].rows.tokens]
    return {"place": place, **_setting(a), "train_seconds": seconds, "tokens": tokens, "nats": nats}


def _setting(a: argparse.Namespace) -> Cell:
    return {"rows": a.rows, "held": a.held, "seeds": a.seeds, "dtype": a.dtype, "base": a.base}


def fill(a: argparse.Namespace) -> None:
    lacking = [place for place in PLACES if place not in read_cells(a)]
    if not lacking or a.minutes <= 0:
        return
    from inlay.bases.load import load_base

    end = time.monotonic() + 60 * a.minutes
    base, rows = load_base(a.base, a.dtype), talks(a)
    for place in lacking:
        if time.monotonic() >= end:
            return
        cell = cell_of(a, place, base, rows)
        with a.cells.open("a", encoding="utf8") as file:
            file.write(json.dumps(cell) + "\n")
        console.print(f"{place}: {cell['train_seconds']:.0f} s, loss {np.mean(losses(cell)):.3f}")


def read_cells(a: argparse.Namespace) -> dict[str, Cell]:
    """The last cell of each place with these settings."""
    lines = a.cells.read_text(encoding="utf8").splitlines() if a.cells.exists() else []
    return {cell["place"]: cell for cell in map(json.loads, lines) if _setting(a).items() <= cell.items()}


def losses(cell: Cell) -> list[float]:
    """Of each seed, nats a token of the answers."""
    return [sum(own) / sum(cell["tokens"]) for name, own in cell["nats"].items() if name != "base"]


def table(cells: dict[str, Cell]) -> str:
    from inlay.evaluation.intervals import mean_interval

    found = [cells[place] for place in PLACES if place in cells]
    if not found:
        return "Nothing has been measured yet."
    first = found[0]
    tokens = np.array(first["tokens"])
    base = sum(first["nats"]["base"]) / tokens.sum()
    lines = [
        "| place | virtual tokens stand | loss by seed | mean | less that of the start (95 %, paired) |",
        "|---" * 5 + "|",
    ]
    for cell in found:
        own = losses(cell)
        apart = "–"
        if cell is not first:
            if first["place"] != "start" or cell["tokens"] != first["tokens"]:
                raise SystemExit("The places were not scored on the same tokens: remove the file of cells.")
            differs = _mean_nats(cell) - _mean_nats(first)
            low, high = mean_interval(differs, tokens) or (float("nan"), float("nan"))
            apart = f"{differs.sum() / tokens.sum():+.3f} ({low:+.3f} to {high:+.3f})"
        seeds = ", ".join(f"{one:.3f}" for one in own)
        lines.append(f"| {cell['place']} | {PLACES[cell['place']]} | {seeds} | {np.mean(own):.3f} | {apart} |")
    lines += [
        "",
        f"Prompt tuning, {TOKENS} virtual tokens that start as random tokens of the table, {EPOCHS} passes over "
        f"{first['rows']:,} conversations, {BATCH} a step, its usual rate, {first['dtype']}; nats a token of the "
        f"answer on {len(tokens):,} held-out conversations, and intervals over those. The base alone: {base:.3f}.",
    ]
    if lacking := [place for place in PLACES if place not in cells]:
        lines += ["", f"Missing: {', '.join(lacking)}."]
    return "\n".join(lines)


def _mean_nats(cell: Cell) -> np.ndarray:
    """(rows,) nats of each row in the mean over seeds."""
    return np.mean([own for name, own in cell["nats"].items() if name != "base"], axis=0)


def main() -> None:
    a = arguments()
    fill(a)
    text = table(read_cells(a))
    print(text)
    if a.page:
        write_between(a.page, (BEGIN, END), text)


if __name__ == "__main__":
    main()
