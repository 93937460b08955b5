"""Pages for people: the report of a run and the card in its adapter's folder."""

from __future__ import annotations

from typing import Any

from .folder import RunFolder

__all__ = ["write_pages"]


def write_pages(folder: RunFolder, story: dict[str, Any]) -> None:
    """report.html and adapter/README.md."""
    story["cost"]["file_bytes"] = sum(f.stat().st_size for f in folder.adapter.iterdir() if f.suffix != ".md")
