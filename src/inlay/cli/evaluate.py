"""inlay eval"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from inlay.errors import UsageError

from .common import Adapters, BaseName, Device, Dtype, Json, Quantize, columns_of, console, emit, guarded

Option = typer.Option


def command(
    base: BaseName = "smollm2",
    data: Annotated[list[str] | None, Option("--data", help="A data file with answers.")] = None,
    adapter: Adapters = None,
    limit: Annotated[int | None, Option(help="Rows to use, drawn by the seed.")] = None,
    seed: Annotated[int, Option(help="Which rows --limit draws.")] = 0,
    template: Annotated[str | None, Option(help="Without it, the one that travels with the adapter.")] = None,
    verbalizer: Annotated[str | None, Option(help="Words for labels: 0=negative,1=positive.")] = None,
    columns: Annotated[str | None, Option(help="text=NAME,label=NAME, prompt=, completion=, messages=.")] = None,
    max_length: Annotated[int | None, Option(help="Tokens in a row.")] = None,
    tokens_at_once: Annotated[int, Option(help="Tokens in one forward; lower saves memory.")] = 4096,
    dtype: Dtype = "auto",
    device: Device = None,
    quantize: Quantize = None,
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
        from inlay.data.template import choose_template, parse_verbalizer
        from inlay.evaluation.score import evaluate
        from inlay.formats.carried import Carried, carried

        table = read_table(data)
        found = carried(adapter or ())
        if template is not None or verbalizer is not None or columns is not None or found is None:
            words = parse_verbalizer(verbalizer) if verbalizer else None
            chosen = choose_template(table, columns_of(columns), template, words)
            found = Carried(chosen) if found is None else replace(found, template=chosen)
        rows = shuffled(table.rows, seed)[:limit] if limit else list(table.rows)
        if found.template.kind == "label":
            for row in rows:
                found.template.label_of(row)
        opened = load_base(base, dtype, device, quantize)
        bank = attach(opened.model)
        for path in adapter or ():
            bank.load(path, path)
        encoder = Encoder(opened.tokenizer, found.template, max_length or found.max_length, found.place)
        with console.status("scoring"):
            scores = evaluate(bank, encoder, rows, [None, *(adapter or ())], tokens_at_once)
        named: dict[str, Any] = {str(name): values for name, values in scores.items() if name is not None}
        emit({"rows": len(rows), "base": scores[None], "adapters": named}, json)
