"""inlay pull"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from .common import Json, console, emit, guarded


def command(base: Annotated[str, typer.Argument(help="smollm2, a .gguf file or a hub id")], json: Json = False) -> None:
    """Fetch and convert a base ahead of time."""
    with guarded(f"fetching {base}"):
        from inlay.bases.load import pull

        with console.status(Text(f"fetching {base}")):
            folder = pull(base, lambda line: console.print(Text(line)))
        emit({"base": base, "folder": str(folder)}, json)
