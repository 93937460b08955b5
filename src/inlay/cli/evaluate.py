"""inlay eval"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from inlay.errors import UsageError

from .common import Adapters, BaseName, Device, Dtype, Json, emit, guarded

Option = typer.Option


def command(
    base: BaseName = "smollm2",
    data: Annotated[list[str] | None, Option("--data", help="A data file with answers.")] = None,
    adapter: Adapters = None,
    limit: Annotated[int | None, Option(help="Rows to use, drawn by the seed.")] = None,
    seed: Annotated[int, Option(help="Which rows --limit draws.")] = 0,
    template: Annotated[str | None, Option(help="Without it, the one that travels with the adapter.")] = None,
    verbalizer: Annotated[str | None, Option(help="Words for labels: 0=negative,1=positive.")] = None,
    max_length: Annotated[int | None, Option(help="Tokens in a row.")] = None,
    tokens_at_once: Annotated[int, Option(help="Tokens in one forward; lower saves memory.")] = 4096,
    dtype: Dtype = "auto",
    device: Device = None,
    json: Json = False,
) -> None:
    """Score adapters and the plain base on the same rows, in the same pass.

    inlay eval --base smollm2 --data test.csv --adapter runs/reviews/adapter
    """
    with guarded():
        if not data:
            raise UsageError("--data is missing", "Give --data.")
        from inlay.bank.bank import attach
        from inlay.bases.load import load_base
        from inlay.data.encode import Encoder
        from inlay.data.table import read_table, shuffled
        from inlay.data.template import Columns, choose_template, parse_verbalizer
        from inlay.evaluation.score import evaluate
        from inlay.formats.notes import read_notes

        table = read_table(data)
        stored = _stored([read_notes(path) for path in adapter or ()])
        if template is None and verbalizer is None and stored:
            chosen, length = stored
        else:
            words = parse_verbalizer(verbalizer) if verbalizer else None
            chosen, length = choose_template(table, Columns(), template, words), 512
        rows = shuffled(table.rows, seed)[:limit] if limit else list(table.rows)
        if chosen.kind == "label":
            for row in rows:
                chosen.label_of(row)
        opened = load_base(base, dtype, device)
        bank = attach(opened.model)
        for path in adapter or ():
            bank.load(path, path)
        encoder = Encoder(opened.tokenizer, chosen, max_length or length)
        scores = evaluate(bank, encoder, rows, [None, *(adapter or ())], tokens_at_once)
        named: dict[str, Any] = {str(name): values for name, values in scores.items() if name is not None}
        emit({"rows": len(rows), "base": scores[None], "adapters": named}, json)


def _stored(notes: list[dict[str, Any]]) -> Any:
    """The template and length of the adapters, which must agree."""
    from inlay.data.template import Template

    found = [(note["template"], note.get("max_length", 512)) for note in notes if note.get("template")]
    if any(template != found[0][0] for template, _ in found):
        raise UsageError("the adapters were trained with different templates", "Give --template, or score them apart.")
    return (Template.from_dict(found[0][0]), found[0][1]) if found else None
