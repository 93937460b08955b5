"""inlay predict"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from inlay.errors import UsageError
from inlay.runs.settings import DATA, Columns, Paths, Split, Template, TokensAtOnce, as_path
from inlay.values import Count, From, Help

from . import flags
from .common import console, counted, emit
from .opening import Opened, open_bank
from .output import Output, check_output
from .writing import Sampling, Writer

if TYPE_CHECKING:
    from inlay.data.rows import Row, Rows
    from inlay.evaluation.predict import Prediction

CHUNK = 256
"""Rows between two writes to the disk."""


@dataclass(frozen=True, kw_only=True)
class Predict(Sampling):
    """What is said of what."""

    adapter: Annotated[str, Help("an adapter's folder or its run's")]
    data: Paths
    out: Annotated[str | None, From(as_path), Help("a .csv or .jsonl file; standard output, as jsonl, where unset")] = (
        None
    )
    limit: Annotated[Count | None, Help("the first rows alone", DATA)] = None
    template: Annotated[Template, Help("without it, the one that travels with the adapter", DATA)] = None
    columns: Columns = field(default_factory=dict)
    split: Split = "paragraph"
    batch: Annotated[Count, Help("rows that are written at once, where the answers are text")] = 8
    tokens_at_once: TokensAtOnce = 4096
    resume: Annotated[bool, Help("go on with --out where it was broken off")] = False


@flags.command(Predict, "predicting")
def command(given: Predict, as_json: bool) -> None:
    """Say what an adapter makes of each row: labels with probabilities where it was trained on labels, else text.

    Every row of the data stands in the output, with its own columns and `prediction`. A row of no use has no
    prediction, and says why under `problem`. With --resume a broken-off file is gone on with.

        inlay predict --adapter runs/reviews --data new.csv --out said.csv
    """
    from inlay.data.table import read_table
    from inlay.formats.folders import adapter_folder
    from inlay.formats.reading import reading_of

    if given.out is not None:
        check_output(given.out, given.resume)
    folder = adapter_folder(given.adapter)
    table = read_table(given.data, given.split)
    reading = reading_of(table, [folder], given.template, None, given.columns, answered=False)
    rows = table.rows if given.limit is None else table.rows[: given.limit]
    if reading.template.kind == "text":
        raise UsageError("rows of text alone have no prompt, and no labels to choose from", "Use `inlay generate`.")
    labels = tuple(reading.template.verbalizer) if reading.template.kind == "label" else ()
    with console.status("loading"):
        opened = open_bank(given, {"adapter": folder}, reading, 0 if labels else given.max_new_tokens)
    added = _added(table.columns, labels)
    read = f"{table.digest} {len(rows)} {reading.template.to_dict()}"
    identity = f"{read} {opened.bank.fingerprint} {_digest(folder)} {given.arguments()}"
    said: list[dict[str, Any]] = []
    with Output(given.out, [*table.columns, *added], identity, given.resume) as out:
        if out.done:
            console.print(f"going on after row {out.done:,}", highlight=False)
        for records in _predicted(given, opened, rows, out.done, bool(labels), added):
            if given.out is None and as_json:
                said += records
            else:
                out.add(records)
        out.finish()
    if as_json:
        result = {"rows": len(rows), "out": given.out, "adapter": str(folder)}
        emit(result | ({"predictions": said} if given.out is None else {}), True)
    elif given.out is not None:
        console.print(f"{counted(len(rows), 'row')} in {given.out}", highlight=False)


def _predicted(
    given: Predict, opened: Opened, rows: Rows, done: int, labelled: bool, added: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """The records of the rows behind the first `done`, some at a time."""
    import torch

    from inlay.evaluation.predict import predicted_labels, predicted_texts
    from inlay.runtime.memory import Room

    bank, encoder = opened.bank, opened.encoder
    room = Room(given.tokens_at_once, device=next(bank.model.parameters()).device)
    writer = Writer(bank, encoder, "adapter", positions=opened.positions)

    def write(prompts: Any) -> list[str]:
        return [writer.words(new).strip() for new in writer.write_many(prompts, given)]

    with Progress(
        TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("predicting", total=len(rows), completed=done)
        chunk = CHUNK if labelled else 4 * given.batch
        for start in range(done, len(rows), chunk):
            part = rows[start : start + chunk]
            torch.manual_seed(given.seed + start)
            if labelled:
                found = predicted_labels(bank, encoder, part, "adapter", room)
            else:
                found = list(predicted_texts(encoder, part, write, given.batch))
            yield [_record(row, one, added) for row, one in zip(part, found, strict=True)]
            bar.advance(task, len(part))


def _added(there: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The columns behind the data's own; names that are taken get an underscore more."""
    names = ["prediction", *(["probability", *(f"probability of {label}" for label in labels)] if labels else [])]
    free = []
    for name in [*names, "problem"]:
        while name in there:
            name += "_"
        free.append(name)
    return free


def _record(row: Row, said: Prediction, added: Sequence[str]) -> dict[str, Any]:
    """A row's own values, and what was said of it."""
    values: list[Any] = [said.said, *[None] * (len(added) - 2), said.problem]
    if said.probabilities is not None:
        values[1:-1] = [said.probabilities[said.said], *said.probabilities.values()]
    return {**row.values, **dict(zip(added, values, strict=True))}


def _digest(folder: Path) -> str:
    """Names an adapter by the content of its files."""
    from inlay.bases.cache import file_digest

    files = sorted(file for file in folder.iterdir() if file.name.startswith("adapter_"))
    return " ".join(file_digest(file) for file in files)
