"""The demonstration: a base, film reviews and a few minutes give a measurably better model.

Run by `make demo`. Writes demo/result.json, and below demo/run the adapter, its run's record and the merged model.
"""

from __future__ import annotations

import csv
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import inlay
from inlay.bases.load import load_base, pull
from inlay.bases.quiet import hush
from inlay.bases.reviews import reviews_csv
from inlay.data.encode import Encoder
from inlay.data.prompting import prompting_of
from inlay.data.rows import Row, shuffled
from inlay.data.table import read_table
from inlay.evaluation.score import evaluate
from inlay.files import write_json
from inlay.merging.merge import merge_to_folder
from inlay.runs.run import run
from inlay.runs.settings import Settings
from inlay.runtime.memory import peak_memory_mb

HERE = Path(__file__).parent
ROWS, TEST_ROWS = (int(os.environ.get(f"INLAY_DEMO_{name}", usual)) for name, usual in (("ROWS", 2000), ("TEST", 1000)))
ASKED = (
    "A warm, funny film that I will gladly see again.",
    "Two hours of noise; I wanted my money back.",
    "The plot is thin, but the actors make it shine.",
)
console = Console(highlight=False)
say = partial(console.print, markup=False, soft_wrap=True)


def prepare(folder: Path) -> tuple[Path, Path]:
    """Rotten Tomatoes rows to train on, and others to test on."""
    rows = [row for row in shuffled(read_table(reviews_csv()).rows, 0) if row.values["source"] == "rotten_tomatoes"]
    files = folder / "train.csv", folder / "test.csv"
    for file, part in zip(files, (rows[:ROWS], rows[ROWS : ROWS + TEST_ROWS]), strict=True):
        with open(file, "w", encoding="utf8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["text", "label"])
            writer.writerows([row.values["text"], row.values["label"]] for row in part)
    return files


def answers(bank: inlay.Bank, encoder: Encoder) -> list[tuple[str, str, str]]:
    """Each question with the next words of the base and of the adapter."""
    shown = []
    for number, text in enumerate(ASKED):
        ids = torch.tensor([encoder.prompt_ids(Row({"text": text}, number, "demo", number + 1))])
        said = []
        for row in (None, "adapter"):
            with bank.route([row]):
                out = bank.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
                    pad_token_id=encoder.tokenizer.pad_token_id,
                )  # fmt: skip
            said.append(encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        shown.append((text, *said))
    return shown


def trained(train_file: Path, folder: Path) -> dict[str, Any]:
    """Train LoRA; its loss is shown every ten steps."""

    def on_step(learner: Any, total: int) -> None:
        if learner.step % 10 == 0:
            say(f"  step {learner.step} of {total}, loss {learner.loss:.3f}")

    settings = Settings(
        base="smollm2", data=[str(train_file)], out=str(folder), heldout="0", max_length=256, set={"r": 8}, lr=1e-3,
        template="Review: {text}\nSentiment:", verbalizer="0=negative,1=positive",  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return run(settings, on_step, lambda line: say(f"  {line}"))


def compared(adapter: Path, test_file: Path) -> tuple[dict[str | None, float], list[tuple[str, str, str]]]:
    """Accuracy of the base and of the adapter, and what both say."""
    base = load_base("smollm2")
    bank = inlay.attach(base.model)
    bank.load("adapter", adapter)
    prompting = prompting_of([adapter])
    assert prompting is not None
    encoder = Encoder(base.tokenizer, prompting.template, prompting.max_length)
    scores = evaluate(bank, encoder, read_table(test_file).rows, [None, "adapter"])
    return {name: own["accuracy"] for name, own in scores.items()}, answers(bank, encoder)


def show(said: list[tuple[str, str, str]], result: dict[str, float], adapter: Path, merged: Path) -> None:
    table = Table(title="\nwhat comes after the review", title_justify="left", title_style="")
    for name in ("review", "base", "adapter"):
        table.add_column(name)
    for row in said:
        table.add_row(*map(repr, row))
    console.print(table)
    say(
        f"\naccuracy on {TEST_ROWS:,} reviews that were not trained on: base {result['base_accuracy']:.1%}, "
        f"adapter {result['adapter_accuracy']:.1%}"
    )
    say(f"merged model: logits within {result['merged_max_difference']:.1e} of base and adapter")
    for name, path in (("adapter", adapter), ("merged model", merged), ("numbers", HERE / "result.json")):
        say(f"{name:12}  {path}")


def main() -> None:
    start = time.perf_counter()
    folder = HERE / "run"
    adapter, merged = folder / "reviews" / "adapter", folder / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say("getting the base and the reviews, which are kept in ~/.cache/inlay, or where INLAY_HOME says")
    pull("smollm2", lambda line: say(f"  {line}"))
    train_file, test_file = prepare(folder)
    say(f"training LoRA on {ROWS:,} reviews")
    told = trained(train_file, folder / "reviews")
    say(f"scoring base and adapter on {TEST_ROWS:,} other reviews")
    accuracy, said = compared(adapter, test_file)
    say("merging in float32")
    difference = merge_to_folder("smollm2", str(adapter), str(merged), "float32")["max_difference"]
    result = {
        "base_accuracy": accuracy[None],
        "adapter_accuracy": accuracy["adapter"],
        "merged_max_difference": difference,
        "seconds": time.perf_counter() - start,
        "training_seconds": told["seconds"],
        "tokens_per_second": told["tokens_per_second"],
        "peak_memory_mb": peak_memory_mb(),
    }
    write_json(HERE / "result.json", result)
    show(said, result, adapter, merged)


if __name__ == "__main__":
    hush()
    main()
