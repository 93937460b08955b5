"""The demonstration: a base, film reviews and a few minutes give a measurably better model.

Run by `make demo`. Writes demo/result.json, and below demo/run the adapter and its story, and the merged model.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console

import inlay
from inlay.bases.load import load_base
from inlay.bases.reviews import reviews_csv
from inlay.data.encode import Encoder
from inlay.data.table import read_table, shuffled
from inlay.data.template import Template
from inlay.evaluation.score import evaluate
from inlay.files import write_json
from inlay.formats.notes import read_notes
from inlay.merging.merge import merge_to_folder
from inlay.training.run import Settings, peak_memory_mb, run

HERE = Path(__file__).parent
ROWS, TEST_ROWS = 2000, 1000
ASKED = (
    "A warm, funny film that I will gladly see again.",
    "Two hours of noise; I wanted my money back.",
    "The plot is thin, but the actors make it shine.",
)
console = Console()


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
    for text in ASKED:
        ids = torch.tensor([encoder.tokenizer(encoder.template.prompt.format(text=text))["input_ids"]])
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


def main() -> None:
    start = time.perf_counter()
    folder = HERE / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    console.print("fetching the base and the reviews (kept in ~/.cache/inlay, or where INLAY_HOME says)")
    train_file, test_file = prepare(folder)
    console.print(f"training LoRA on {ROWS} reviews")
    trained = run(
        Settings(
            base="smollm2", data=[str(train_file)], out=str(folder / "reviews"), heldout="0", max_length=256,
            set={"r": 8}, lr=1e-3, template="Review: {text}\nSentiment:", verbalizer="0=negative,1=positive",
        ),
        lambda contender, total: console.print(
            f"step {contender.step}/{total}  loss {contender.loss:.3f}", highlight=False
        ) if contender.step % 10 == 0 else None,
    )  # fmt: skip
    adapter = folder / "reviews" / "adapter"
    console.print(f"scoring base and adapter on {TEST_ROWS} other reviews")
    base = load_base("smollm2")
    bank = inlay.attach(base.model)
    bank.load("adapter", adapter)
    encoder = Encoder(base.tokenizer, Template.from_dict(read_notes(adapter)["template"]), 256)
    scores = evaluate(bank, encoder, read_table(test_file).rows, [None, "adapter"])
    said = answers(bank, encoder)
    bank.detach()
    del bank, base
    console.print("merging in float32")
    merged = merge_to_folder("smollm2", str(adapter), str(folder / "merged"), "float32")
    result = {
        "base_accuracy": scores[None]["accuracy"],
        "adapter_accuracy": scores["adapter"]["accuracy"],
        "merged_max_difference": merged["max_difference"],
        "seconds": time.perf_counter() - start,
        "training_seconds": trained["seconds"],
        "tokens_per_second": trained["tokens_per_second"],
        "peak_memory_mb": peak_memory_mb(),
    }
    write_json(HERE / "result.json", result)
    for text, before, after in said:
        console.print(f"\n{text}\n  before: {before!r}\n  after:  {after!r}", highlight=False)
    console.print(f"\naccuracy on {TEST_ROWS} held-out reviews: base {result['base_accuracy']:.1%}, "
                  f"adapter {result['adapter_accuracy']:.1%}", highlight=False)  # fmt: skip
    console.print(f"merged model: logits within {merged['max_difference']:.1e} of base and adapter", highlight=False)
    console.print(f"adapter: {adapter}\nmerged model: {folder / 'merged'}\nresult: {HERE / 'result.json'}")
    console.print(json.dumps(result))


if __name__ == "__main__":
    main()
