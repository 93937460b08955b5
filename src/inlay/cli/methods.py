"""inlay methods"""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from .common import Json, emit, guarded


def command(json: Json = False) -> None:
    """List the methods there are, with their papers and settings."""
    with guarded():
        from inlay.methods.table import METHODS

        rows = {
            name: {
                "title": kind.title,
                "paper": kind.paper,
                "settings": {f.name: _shown(f) for f in dataclasses.fields(kind) if f.init},
            }
            for name, kind in METHODS.items()
        }
        if json:
            emit({"methods": rows}, True)
            return
        table = Table("method", "title", "paper", "settings")
        for name, row in rows.items():
            table.add_row(name, row["title"], row["paper"], ", ".join(f"{k}={v}" for k, v in row["settings"].items()))
        Console().print(table)


def _shown(field: dataclasses.Field) -> object:
    return {} if field.default is dataclasses.MISSING else field.default
