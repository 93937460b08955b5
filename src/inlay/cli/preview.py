"""inlay preview"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from inlay.errors import UsageError

from .common import BaseName, Json, Set, columns_of, emit, guarded, pairs

Option = typer.Option
COLOURS = {
    "system": "magenta", "user": "cyan", "prompt": "cyan", "assistant": "green", "answer": "green", "text": "green",
    "virtual": "yellow", "tool": "blue",
}  # fmt: skip


def command(
    base: BaseName = "smollm2",
    data: Annotated[list[str] | None, Option("--data", help="The data file.")] = None,
    row: Annotated[int, Option(help="The first row to show, from 0.")] = 0,
    rows: Annotated[int, Option(help="How many.")] = 1,
    method: Annotated[str, Option(help="Whose virtual tokens to show.")] = "lora",
    set_: Set = None,
    virtual_tokens_at: Annotated[str, Option(help="start, after-system or before-answer.")] = "start",
    template: Annotated[str | None, Option(help="As for train.")] = None,
    verbalizer: Annotated[str | None, Option(help="As for train.")] = None,
    columns: Annotated[str | None, Option(help="As for train.")] = None,
    max_length: Annotated[int, Option(help="Tokens in a row.")] = 512,
    adapter: Annotated[str | None, Option("--adapter", help="An adapter whose template to use.")] = None,
    json: Json = False,
) -> None:
    """Show rows as the model gets them: tokens, roles, which bear loss, what is cut, where virtual ones are.

    inlay preview --base smollm2 --data reviews.csv --method prompt --virtual-tokens-at before-answer
    """
    with guarded():
        if not data:
            raise UsageError("--data is missing", "Give --data.")
        from inlay.bases.load import load_tokenizer
        from inlay.data.encode import Encoder
        from inlay.data.shown import shown
        from inlay.data.table import duplicates, read_table
        from inlay.data.template import choose_template, parse_verbalizer
        from inlay.formats.carried import Carried, carried

        table = read_table(data)
        found = carried([adapter]) if adapter is not None else None
        if found is None or template is not None or verbalizer is not None:
            words = parse_verbalizer(verbalizer) if verbalizer else None
            found = Carried(choose_template(table, columns_of(columns), template, words), max_length, virtual_tokens_at)
        if not 0 <= row < len(table.rows):
            raise UsageError(f"--row {row} is not there", f"Give 0 to {len(table.rows) - 1}.")
        made = _method(method, pairs(set_, "--set"))
        found = replace(found, place=virtual_tokens_at if adapter is None else found.place)
        if found.place != "start" and not made.virtual_length and adapter is None:
            raise UsageError(f"{method} has no virtual tokens to put {found.place}", "Choose --method prompt.")
        encoder = Encoder(load_tokenizer(base), found.template, found.max_length, found.place)
        shows = [(one, shown(encoder, one, made.virtual_length)) for one in table.rows[row : row + rows]]
        counts: dict[str, Any] = {"rows": len(table.rows), **encoder.examples(table.rows).counts}
        counts["duplicates"] = duplicates(table.rows)
        if json:
            told = [{"where": one.where, **view.to_dict()} for one, view in shows]
            emit({"shown": told, "counts": counts, "prefix_keys": made.prefix_length}, True)
            return
        console = Console(highlight=False)
        for one, view in shows:
            _print(console, one.where, view)
        if made.prefix_length:
            console.print(f"{made.prefix_length} keys of the prefix stand before every token in each layer")
        _legend(console, shows)
        console.print(", ".join(f"{count} {reason}" for reason, count in counts.items() if count or reason == "rows"))


def _method(name: str, values: dict[str, Any]) -> Any:
    from inlay.training.settings import make_method

    return make_method(name, values)


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
    if view.dropped:
        console.print(f"this row is dropped: {view.dropped}", style="bold red")


def _styled(token: Any, coloured: bool) -> Text:
    """A token in its role's colour, underlined where it bears loss; without colours, in brackets where it does."""
    shown = token.text.replace("\n", "↵\n") if not token.special else token.text
    style = (
        COLOURS.get(token.role, "white")
        + (" bold underline" if token.learned else "")
        + (" dim" if token.special else "")
    )
    if coloured:
        return Text(shown, style=style).append("·", style="dim")
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
