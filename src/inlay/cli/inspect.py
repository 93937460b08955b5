"""inlay inspect"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table

from inlay.errors import UsageError
from inlay.runs.settings import (
    DATA,
    as_path,
    as_paths,
)
from inlay.values import Count, From, Help

from . import flags
from .common import console, counted, emit, number
from .opening import Reading, as_folders, dropped, open_bank

if TYPE_CHECKING:
    from inlay.data.prompting import Prompting
    from inlay.data.rows import Row

SHOWN = 12
"""Lines of a table at most."""


@dataclass(frozen=True, kw_only=True)
class Inspect(Reading):
    """Which adapter is looked at, or which two are compared, on what."""

    adapter: Annotated[Sequence[str], From(as_paths), Help("an adapter's folder or its run's; two are compared")]
    data: Annotated[Sequence[str], From(as_folders), Help("rows to look at it on, best held-out ones; repeatable")] = ()
    html: Annotated[str | None, From(as_path), Help("write a page of it to this file too")] = None
    limit: Annotated[Count, Help("rows to use, drawn by the seed", DATA)] = 64


@flags.command(Inspect, "inspecting")
def command(given: Inspect, as_json: bool) -> None:
    """See what an adapter has learned: its size, rank and layers, what virtual tokens mean, which rows and words moved.

    It says what it found, what to try, and what is noise. Without --data it looks at the parameters alone.

        inlay inspect --adapter runs/reviews --data test.csv
    """
    from inlay.bases.adapters import adapter_folder

    if given.html is not None:
        _check_page(given.html)
    if len(given.adapter) > 2:
        raise UsageError(f"{len(given.adapter)} adapters are named", "Look at one, or compare two.")
    folders = {name: adapter_folder(name) for name in given.adapter}
    if len({*folders.values()}) < len(given.adapter):
        raise UsageError("one adapter is named twice", "Name it once, or another one beside it.")
    result = _inspected(given, folders)
    if given.html is not None:
        from inlay.files import finite
        from inlay.reporting.inspect_page import write_inspect_page

        write_inspect_page(Path(given.html), finite(result))
    if as_json:
        emit(result, True)
    else:
        show(result)
        if given.html is not None:
            console.print(f"page  {given.html}", markup=False, highlight=False)


def _check_page(path: str) -> None:
    """Raises: UsageError where no page can be written to `path`, before anything is computed."""
    file = Path(path)
    if file.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--html {path} is no name of a page", "Name a file that ends in .html.")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UsageError(f"--html {path} cannot be written", "Name a file in a folder that is there.")


def _inspected(given: Inspect, folders: Mapping[str, Path]) -> dict[str, Any]:
    """What there is to say of one adapter; of two, of each (`adapters`), and of both (`comparison`)."""
    from inlay.data.table import read_table, shuffled
    from inlay.evaluation.score import items_of
    from inlay.inspection.inspect import inspect
    from inlay.inspection.pairs import compared
    from inlay.runtime.memory import TokenBudget

    table = read_table(given.data, given.split) if given.data else None
    rows: Sequence[Row] = () if table is None else shuffled(table.rows, given.seed)[: given.limit]
    prompting = _prompting(given, [*folders.values()], table)
    if given.max_length is not None:
        prompting = replace(prompting, max_length=given.max_length)
    with console.status("loading") as status:
        opened = open_bank(given, folders, prompting)
        items = None if table is None else items_of(opened.encoder, rows)
        for line in dropped({} if items is None else items.counts):
            console.print(line, highlight=False)
        budget = TokenBudget(given.tokens_at_once, device=next(opened.bank.model.parameters()).device)
        found = {
            name: inspect(
                opened.bank, name, folder, opened.encoder.tokenizer, items, budget, opened.fresh,
                lambda part: status.update(f"looking at {part}"),
            )
            for name, folder in folders.items()
        }  # fmt: skip
        told = [
            {"adapter": str(folders[name]), "base": given.base, **own.to_dict()} for name, own in found.items()
        ]  # fmt: skip
        if len(told) == 1:
            return told[0]
        (one, ours), (other, theirs) = found.items()
        pair = compared(opened.bank.adapters[one], opened.bank.adapters[other], ours.rows, theirs.rows)
    return {"adapters": told, "comparison": pair}


def _prompting(given: Inspect, folders: Sequence[Path], table: Any) -> Prompting:
    """How rows become prompts; without rows it is of no use but to open the encoder."""
    from inlay.data.prompting import Prompting, prompting_for, prompting_of
    from inlay.data.template import Template as Words

    if table is not None:
        return prompting_for(table, folders, given.template, given.verbalizer, given.columns)
    return prompting_of(folders) or Prompting(Words("completion", "{prompt}", "completion"))


# ---- for people


def show(result: Mapping[str, Any]) -> None:
    """What was found in words first, then tables; of two adapters, what they are beside one another last."""
    out = Console(highlight=False)
    for own in result.get("adapters", [result]):
        _show_one(out, own)
    if "comparison" in result:
        out.print("beside one another", style="bold")
        _show_findings(out, result["comparison"]["findings"])


def _show_findings(out: Console, findings: Sequence[Mapping[str, Any]]) -> None:
    for one in findings:
        mark = "noise" if one["noise"] else one["about"]
        out.print(f"[dim]{mark:>12}[/dim]  ", end="")
        out.print(one["words"], markup=False, soft_wrap=True)
        if one["try"]:
            out.print(f"{'':>12}  try: {one['try']}", markup=False, soft_wrap=True, style="green")


def _show_one(out: Console, result: Mapping[str, Any]) -> None:
    title = f"{' and '.join(result['methods'])}, {counted(result['parameters'], 'parameter')}"
    out.print(title, markup=False, style="bold", end="")
    out.print(f"  {result['adapter']}", markup=False, style="dim", soft_wrap=True)
    _show_findings(out, result["findings"])
    for table in _tables(result):
        out.print(table)
    if "writes_alone" in result:
        written = repr(result["writes_alone"]) if result["writes_alone"].strip() else "nothing, and ends"
        out.print(f"behind the virtual tokens alone the base writes: {written}", markup=False)
    for note in result["notes"]:
        out.print(note, style="dim", markup=False, soft_wrap=True)


def _tables(result: Mapping[str, Any]) -> list[Table]:
    made = [_token_table(look) for look in result.get("virtual", ())]
    modules = sorted(result.get("modules", ()), key=lambda own: -(own["relative_norm"] or own["scaled"] or 0))
    if modules:
        lines = [
            (own["path"], *map(number, (own["relative_norm"], own["effective_rank"], own["scaled"]))) for own in modules
        ]
        made.append(_table("modules, by norm", ("module", "norm / weight's", "effective rank", "scaled by"), lines))
    for key, title in (("ranks", "rank"), ("layers", "layer")):
        if told := result.get(key):
            about = "cut to lower ranks" if key == "ranks" else "each layer left out alone"
            lines = [(str(own[title]), number(own["loss"]), *_apart(own)) for own in told]
            made.append(_table(about, (title, "loss", "difference", "95 % interval"), lines))
    for key, words in result.get("moved_words", {}).items():
        lines = [(repr(own["word"]), number(own["base"]), number(own["adapter"])) for own in words]
        made.append(_table(f"first words of answers that {key} probability", ("word", "base", "adapter"), lines))
    for key, rows in result.get("changed_rows", {}).items():
        lines = [(own["text"].replace("\n", " "), number(own["base"]), number(own["adapter"])) for own in rows]
        made.append(_table(f"rows that {key} most", ("row", "base's loss", "adapter's"), lines))
    return [table for table in made if table.row_count]


def _token_table(look: Mapping[str, Any]) -> Table:
    lines = []
    for own in look["tokens"]:
        words = " ".join(repr(near["word"]) for near in own.get("nearest", ())[:3])
        cosine = own["nearest"][0]["cosine"] if own.get("nearest") else None
        removed = own.get("removed")
        apart = _apart(removed) if removed else ("–", "–")
        looked = number((own.get("attention") or {}).get("share"))
        numbers = (number(cosine), number(own.get("z")), number(own["moved"]), looked)
        lines.append((str(own["index"]), words, *numbers, *apart))
    titles = ("", "nearest words", "cosine", "z", "moved", "attention", "without it", "95 % interval")
    return _table(f"{look['method']}: its {look['count']} tokens", titles, lines)


def _apart(told: Mapping[str, Any]) -> tuple[str, str]:
    ends = told["interval"]
    return f"{told['difference']:+.3f}", "–" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    more = f" (the first {SHOWN} of {len(lines)})" if len(lines) > SHOWN else ""
    table = Table(title=title + more, title_justify="left", title_style="dim")
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n and column != "nearest words" else "left", overflow="fold")
    for line in lines[:SHOWN]:
        table.add_row(*map(_escaped, line))
    return table


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
