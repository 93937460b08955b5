"""Pages for people: the report of a run and the card in its adapter's folder."""

from __future__ import annotations

from typing import Any

from inlay.reporting.card import write_card
from inlay.reporting.report import write_report

from .folder import RunFolder

__all__ = ["write_pages"]


def write_pages(folder: RunFolder, story: dict[str, Any]) -> None:
    """report.html and adapter/README.md; what the adapter takes on the disk goes into `story`."""
    files = [file for file in folder.adapter.iterdir() if file.suffix != ".md"]
    story["cost"]["file_bytes"] = sum(file.stat().st_size for file in files)
    write_card(folder.adapter, story)
    write_report(folder.path, story)
