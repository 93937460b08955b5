"""inlay pull"""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Json, console, emit, guarded


def command(
    base: Annotated[str, typer.Argument(help="smollm2, a .gguf file or a hub id.")], json: Json = False
) -> None:
    """Fetch and convert a base ahead of time."""
    with guarded():
        from inlay.bases.load import resolve

        with console.status(f"fetching {base}"):
            folder = resolve(base)
        emit({"base": base, "folder": str(folder)}, json)
