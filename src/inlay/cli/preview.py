"""inlay preview"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge
from rich.console import Console
from rich.text import Text

from inlay.errors import UsageError
from inlay.runs.settings import (
    DATA,
    Base,
    Columns,
    MaxLength,
    MethodName,
    Paths,
    Set,
    Split,
    TaskName,
    Template,
    Verbalizer,
    VirtualTokensAt,
)
from inlay.values import Checked, Count, Help

from . import flags
from .common import emit

if TYPE_CHECKING:
    from inlay.data.prompting import Prompting
    from inlay.data.table import Table

COLOURS = {
    "system": "magenta", "user": "cyan", "prompt": "cyan", "assistant": "green", "answer": "green", "text": "green",
    "virtual": "yellow", "tool": "blue",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preview(Checked):
    """Which rows are shown, as which adapter would get them."""

    data: Paths
    base: Base = "smollm2"
    row: Annotated[int, Ge(0), Help("the first row to show, from 0", DATA)] = 0
    rows: Annotated[Count, Help("how many", DATA)] = 1
    method: MethodName = "lora"
    set: Set = field(default_factory=dict)
    virtual_tokens_at: VirtualTokensAt = "start"
    task: TaskName = None
    template: Template = None
    verbalizer: Verbalizer = None
    columns: Columns = field(default_factory=dict)
    split: Split = "paragraph"
    max_length: MaxLength = 512
    adapter: Annotated[str | None, Help("an adapter whose template, length and method to use")] = None


@flags.command(Preview, "looking at rows")
def command(given: Preview, as_json: bool) -> None:
    """Show rows as the model gets them: tokens, roles, which bear loss, what is cut, where virtual ones are.

    inlay preview --data reviews.csv --method prompt --virtual-tokens-at before-answer
    """
    from inlay.bases.adapters import adapter_folder
    from inlay.bases.load import load_tokenizer
    from inlay.data.collisions import collisions
    from inlay.data.prepare import prepare
    from inlay.data.preview import preview_row
    from inlay.data.table import duplicates, read_table
    from inlay.data.targets import encoder_of
    from inlay.runs.settings import make_method

    made = make_method(given.method, given.set)
    folders = [] if given.adapter is None else [adapter_folder(given.adapter)]
    virtual, prefix = _added(folders) if folders else (made.virtual_length, made.prefix_length)
    if given.virtual_tokens_at != "start" and not virtual and not folders:
        raise UsageError(
            f"{given.method} has no virtual tokens to put {given.virtual_tokens_at}", "Choose --method prompt."
        )
    table = read_table(given.data, given.split)
    found = _prompting(given, table, folders)
    if given.row >= len(table.rows):
        raise UsageError(f"--row {given.row} is not there", f"Give 0 to {len(table.rows) - 1}.")
    encoder = encoder_of(found.template)(load_tokenizer(given.base), found.template, found.max_length, found.virtual_at)
    rows = table.rows[given.row : given.row + given.rows]
    shows = [(one, preview_row(encoder, one, virtual)) for one in rows]
    warnings = collisions(encoder, table.rows[given.row :], bool(virtual))
    counts: dict[str, Any] = {"rows": len(table.rows), **prepare(encoder, table.rows).counts}
    counts["duplicates"] = duplicates(table.rows)
    if as_json:
        rows_shown = [{"where": one.where, **view.to_dict()} for one, view in shows]
        told = [one.to_dict() for one in warnings]
        emit({"shown": rows_shown, "counts": counts, "prefix_keys": prefix, "warnings": told}, True)
    else:
        _print_rows(shows, counts, prefix)
        for one in warnings:
            Console(highlight=False).print(f"warning: {one}", style="yellow", soft_wrap=True, markup=False)


def _added(folders: Sequence[Path]) -> tuple[int, int]:
    """Virtual tokens and keys of prefixes that the adapters in `folders` have."""
    from inlay.formats.added_tokens import added_tokens

    found = [added_tokens(folder) for folder in folders]
    return sum(virtual for virtual, _ in found), sum(prefix for _, prefix in found)


def _prompting(given: Preview, table: Table, folders: Sequence[Path]) -> Prompting:
    """As an adapter in `folders` was trained, or as one would be."""
    from inlay.data.choose import Columns as Named
    from inlay.data.choose_head import head_template
    from inlay.data.prompting import Prompting, prompting_for
    from inlay.runs.tasking import fitting_task

    task = "generate" if folders else fitting_task(given.task, given.base)
    if task != "generate":
        found = Prompting(head_template(table, task, Named(**given.columns), given.template))
    else:
        found = prompting_for(table, folders, given.template, given.verbalizer, given.columns)
    if folders:
        return found
    return replace(found, max_length=given.max_length, virtual_at=given.virtual_tokens_at)


def _print_rows(shows: Sequence[tuple[Any, Any]], counts: dict[str, Any], prefix_length: int) -> None:
    console = Console(highlight=False)
    for one, view in shows:
        _print(console, one.where, view)
    if prefix_length:
        console.print(f"{prefix_length} keys of the prefix stand before every token in each layer")
    _legend(console, shows)
    console.print(", ".join(f"{count} {reason}" for reason, count in counts.items() if count or reason == "rows"))


def _print(console: Console, where: str, view: Any) -> None:
    console.print(f"── {where}", style="dim", soft_wrap=True)
    text = Text()
    for number, token in enumerate(view.tokens):
        if view.cut and number == view.cut_at:
            text.append(f" …(−{view.cut} tokens)… ", style="bold red")
        text.append_text(_styled(token, console.is_terminal))
    if view.cut and view.cut_at == len(view.tokens):
        text.append(f" …(−{view.cut} tokens)", style="bold red")
    console.print(text, soft_wrap=True)
    learned, virtual = sum(t.learned for t in view.tokens), sum(t.role == "virtual" for t in view.tokens)
    console.print(
        f"{len(view.tokens) - virtual} tokens, {learned} bear loss, {virtual} virtual, {view.cut} cut", style="dim"
    )
    if view.answer:
        console.print(f"the head should say: {view.answer}", style="dim", markup=False)
    if view.pieces > 1:
        console.print(f"this text goes on in {view.pieces - 1} more pieces, none of it is lost", style="dim")
    if view.dropped:
        console.print(f"this row is dropped: {view.dropped}", style="bold red")


def _styled(token: Any, coloured: bool) -> Text:
    """A token in its role's colour, underlined where it bears loss; without colours, in brackets where it does. A dot
    alone is one more token of the character before it.
    """
    shown = token.text.replace("\n", "↵\n") if not token.special else token.text
    style = (
        COLOURS.get(token.role, "white")
        + (" bold underline" if token.learned else "")
        + (" dim" if token.special else "")
    )
    if coloured:
        return Text("" if token.part else shown, style=style).append("·", style="dim")
    return Text(f"[{shown}]" if token.learned else f"{shown}|")


def _legend(console: Console, shows: Sequence[tuple[Any, Any]]) -> None:
    roles = list(dict.fromkeys(token.role for _, view in shows for token in view.tokens))
    text = Text("roles: ")
    for role in roles:
        text.append(f"{role} ", style=COLOURS.get(role, "white"))
    text.append(
        "underlined tokens bear loss" if console.is_terminal else "tokens in [brackets] bear loss, | ends a token"
    )
    console.print(text)
