"""inlay predict"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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
    from inlay.data.prompting import Prompting
    from inlay.data.rows import Row, Rows
    from inlay.evaluation.predict import Prediction

CHUNK = 256
"""Rows between two writes to the disk."""


@dataclass(frozen=True, kw_only=True)
class Predict(Sampling):
    """Which rows are predicted, with which adapter."""

    adapter: Annotated[str, Help("an adapter's folder or its run's")]
    data: Paths
    out: Annotated[str | None, From(as_path), Help("a .csv or .jsonl file; standard output, as jsonl, where unset")] = (
        None
    )
    limit: Annotated[Count | None, Help("the first rows alone", DATA)] = None
    template: Annotated[Template, Help("without it, the one that travels with the adapter", DATA)] = None
    columns: Columns = field(default_factory=dict)
    split: Split = "paragraph"
    batch: Annotated[Count, Help("rows that are written at once, where the answers are text")] = 32
    tokens_at_once: TokensAtOnce = 4096
    resume: Annotated[bool, Help("go on with --out where it was broken off")] = False


@flags.command(Predict, "predicting")
def command(given: Predict, as_json: bool) -> None:
    """Say what an adapter makes of each row: a label with probabilities, a number, tags, or text, as it was trained.

    Every row of the data stands in the output, with its own columns and `prediction`. A row of no use has no
    prediction, and says why under `problem`. With --resume a broken-off file is gone on with.

        inlay predict --adapter runs/reviews --data new.csv --out said.csv
    """
    from inlay.bases.adapters import adapter_folder
    from inlay.data.prompting import prompting_for
    from inlay.data.table import read_table

    if given.out is not None:
        check_output(given.out, given.resume)
    folder = adapter_folder(given.adapter)
    table = read_table(given.data, given.split)
    prompting = prompting_for(table, [folder], given.template, None, given.columns, answered=False)
    rows = table.rows if given.limit is None else table.rows[: given.limit]
    if prompting.template.kind == "text":
        raise UsageError("rows of text alone have no prompt, and no labels to choose from", "Use `inlay generate`.")
    labels = tuple(prompting.template.verbalizer) if prompting.template.kind == "label" else ()
    with console.status("loading"):
        opened = open_bank(given, {"adapter": folder}, prompting, _new_tokens(given, prompting, labels))
    added = _added(table.columns, labels)
    data = f"{table.digest} {len(rows)} {prompting.template.to_dict()}"
    identity = f"{data} {opened.bank.fingerprint} {_digest(folder)} {given.arguments()}"
    predictions: list[dict[str, Any]] = []
    with Output(given.out, [*table.columns, *added], identity, given.resume) as out:
        for records in _predicted(given, opened, rows, out.done, bool(labels), added):
            if given.out is None and as_json:
                predictions += records
            else:
                out.add(records)
        out.finish()
    if as_json:
        result = {"rows": len(rows), "out": given.out, "adapter": str(folder)}
        emit(result | ({"predictions": predictions} if given.out is None else {}), True)
    elif given.out is not None:
        console.print(f"{counted(len(rows), 'row')} in {given.out}", highlight=False)


def _new_tokens(given: Predict, prompting: Prompting, labels: Sequence[str]) -> int:
    """Tokens that the base must have positions for behind a row's own."""
    return 0 if labels or prompting.template.task != "generate" else given.max_new_tokens


def _predicted(
    given: Predict, opened: Opened, rows: Rows, done: int, labelled: bool, added: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """The records of the rows behind the first `done`, some at a time."""
    from inlay.data.targets import HeadEncoder
    from inlay.evaluation.head_predict import predicted_by_head
    from inlay.evaluation.predict import predicted_labels, predicted_texts
    from inlay.runtime.memory import TokenBudget

    if done:
        console.print(f"going on after row {done:,}", highlight=False)
    bank, encoder = opened.bank, opened.encoder
    budget = TokenBudget(given.tokens_at_once, device=next(bank.model.parameters()).device)
    writer = Writer(bank, encoder, "adapter", positions=opened.positions)

    def write(prompts: Any) -> list[str]:
        settings = replace(given, seed=given.seed + start)  # of the chunk that is at hand
        return [writer.words(new).strip() for new in writer.write_many(prompts, settings, most=given.batch)]

    with Progress(
        TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("predicting", total=len(rows), completed=done)
        chunk = CHUNK if labelled or isinstance(encoder, HeadEncoder) else 4 * given.batch
        for start in range(done, len(rows), chunk):
            part = rows[start : start + chunk]
            if isinstance(encoder, HeadEncoder):
                found = predicted_by_head(bank, encoder, part, "adapter", budget)
            elif labelled:
                found = predicted_labels(bank, encoder, part, "adapter", budget)
            else:
                found = list(predicted_texts(encoder, part, write))
            yield [_record(row, one, added, encoder.template.task) for row, one in zip(part, found, strict=True)]
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


def _record(row: Row, found: Prediction, added: Sequence[str], task: str) -> dict[str, Any]:
    """A row's own values, and its prediction: words, a number, or a list of tags."""
    answer: Any = found.answer
    if task == "regress":
        answer = float(answer) if answer else None
    elif task == "tag":
        answer = list(found.tags)
    values: list[Any] = [answer, *[None] * (len(added) - 2), found.problem]
    if found.probabilities is not None:
        values[1:-1] = [found.probabilities[found.answer], *found.probabilities.values()]
    return {**row.values, **dict(zip(added, values, strict=True))}


def _digest(folder: Path) -> str:
    """Names an adapter by the content of its files."""
    from inlay.bases.cache import file_digest

    files = sorted(file for file in folder.iterdir() if file.name.startswith("adapter_"))
    return " ".join(file_digest(file) for file in files)
