"""What it takes to make a training run's tokens of its files: seconds and memory by part, for smollm2's tokenizer.

Rows are film reviews of some 35 tokens, numbered so that no two are equal. Private memory is what the process alone has
(RssAnon), beyond what it had before and at its peak; mapped is what it sees of files. CPU seconds are those of all
threads; what of them is not in one thread shares the cores. Linux only.

    python benchmarks/prepare.py [--rows 1000000] [--kind csv|jsonl|parquet]
    python benchmarks/prepare.py --long          one row of 10 MB, one of 3 million Chinese characters
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TEMPLATE = "Review: {text}\nSentiment:"
WORDS = {"0": ["negative"], "1": ["positive"]}
PARALLEL = "TOKENIZERS_PARALLELISM"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=["csv", "jsonl", "parquet"], default="csv")
    parser.add_argument("--long", action="store_true", help="one long row each, instead of many")
    return parser.parse_args()


def reviews(count: int) -> Iterator[dict[str, str]]:
    from inlay.bases.reviews import reviews_csv

    with open(reviews_csv(), encoding="utf8", newline="") as file:
        short = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    for n in range(count):
        row = short[n % len(short)]
        yield {"text": f"{n}: {row['text'].strip()}", "label": row["label"]}


def write(path: Path, rows: Iterator[dict[str, str]]) -> None:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return
    with open(path, "w", encoding="utf8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)


def megabytes() -> tuple[float, float]:
    """Private and file-mapped memory of this process."""
    with open("/proc/self/status", encoding="utf8") as file:
        values = {line.split(":")[0]: line.split()[1] for line in file if line.startswith("Rss")}
    return int(values["RssAnon"]) / 1024, int(values["RssFile"]) / 1024


class Watched:
    """Times parts, and samples memory beside them."""

    def __init__(self) -> None:
        gc.collect()
        self.before, self.peak, self.parts = megabytes(), megabytes(), []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.wait(0.02):
            now = megabytes()
            self.peak = max(self.peak[0], now[0]), max(self.peak[1], now[1])

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        clocks = time.perf_counter, time.process_time, time.thread_time
        begun = [clock() for clock in clocks]
        made = work()
        private = megabytes()[0] - self.before[0]
        took = [clock() - start for clock, start in zip(clocks, begun, strict=True)]
        self.parts.append((name, took, private))
        return made

    def show(self, title: str) -> None:
        self._over.set()
        self._thread.join()
        shown = Table("part", "seconds", "CPU seconds", "in one thread", "private MB kept", title=title)
        for name, took, private in self.parts:
            shown.add_row(name, *(f"{seconds:.2f}" for seconds in took), f"{private:.0f}")
        totals = [sum(took) for took in zip(*(took for _, took, _ in self.parts), strict=True)]
        shown.add_row("all", *(f"{total:.2f}" for total in totals), f"{self.parts[-1][2]:.0f}")
        Console(width=110).print(shown)
        private, mapped = (peak - before for peak, before in zip(self.peak, self.before, strict=True))
        print(f"at the peak: {private:.0f} MB private, {mapped:.0f} MB mapped added")


def measure(path: Path, tokenizer: Any, title: str, length: int = 512) -> None:
    import inlay.runs.dataset  # noqa: F401  (its imports are no part of the work)
    from inlay.data.choose import Columns, choose_template
    from inlay.data.encode import Encoder
    from inlay.data.prepare import prepare
    from inlay.data.table import read_table
    from inlay.runs.dataset import load_dataset
    from inlay.runs.settings import Settings

    os.environ[PARALLEL] = "false"  # as the commands do; the pass itself switches threads on
    watched = Watched()
    if "label" in path.name:
        settings = Settings(data=[str(path)], out="unused", template=TEMPLATE, verbalizer=WORDS)
        dataset = watched.part("read, check, split and shuffle", lambda: load_dataset(settings))
        rows, template = dataset.rows, dataset.template
    else:
        table = watched.part("read", lambda: read_table(path))
        rows, template = table.rows, choose_template(table, Columns())
    encoder = watched.part("make the encoder", lambda: Encoder(tokenizer, template, length))
    prepared = watched.part("encode and store", lambda: prepare(encoder, rows))
    tokens = int(prepared.examples.lengths.sum())
    watched.show(f"{title}: {len(prepared.examples):,} examples, {tokens:,} tokens")


def main() -> None:
    a = arguments()
    from inlay.bases.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        if a.long:
            for title, text in (
                ("10 MB of English", _english(10 * 2**20)),
                ("3 million Chinese characters", _chinese()),
            ):
                path = Path(folder) / "long.jsonl"
                path.write_text(json.dumps({"text": text}) + "\n", encoding="utf8")
                measure(path, tokenizer, title)
            return
        path = Path(folder) / f"labelled.{a.kind}"
        write(path, reviews(a.rows))
        measure(path, tokenizer, f"{a.rows:,} rows of {a.kind}, {path.stat().st_size / 2**20:.0f} MB")


def _english(size: int) -> str:
    words = " ".join(row["text"] for row in reviews(20_000))
    return (words * (size // len(words) + 1))[:size]


def _chinese() -> str:
    line = "这部电影的故事很感人，演员的表演也非常出色，值得一看。"
    return (line * (3_000_000 // len(line) + 1))[:3_000_000]


if __name__ == "__main__":
    main()
