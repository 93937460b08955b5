"""A page of docs/ whose figures scripts write: each has a part between two marks of its own."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_between"]


def write_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks of a page. Exits with a sentence where the page has not got them."""
    whole = page.read_text(encoding="utf8")
    before, begin, rest = whole.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise SystemExit(f"{page} has no marks {' and '.join(marks)}.")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf8")
