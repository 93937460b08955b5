"""inlay merge"""

from __future__ import annotations

from typing import Annotated

import typer

from inlay.errors import UsageError

from .common import BaseName, Dtype, Json, emit, guarded


def command(
    base: BaseName = "smollm2",
    adapter: Annotated[str | None, typer.Option("--adapter", help="The adapter's folder.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="A folder for the merged model.")] = None,
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Write base and adapter as one plain transformers model, and say how far its logits are from theirs.

    inlay merge --base smollm2 --adapter runs/reviews/adapter --out merged
    """
    with guarded():
        if adapter is None or out is None:
            raise UsageError("--adapter and --out are needed", "Give both.")
        from inlay.merging.merge import merge_to_folder

        emit(merge_to_folder(base, adapter, out, dtype), json)
