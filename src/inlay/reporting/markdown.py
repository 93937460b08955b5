"""Escapes words for Markdown: whatever they hold, they stay words."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["code", "fenced", "plain"]


def plain(text: Any) -> str:
    """On one line, with everything that Markdown or HTML would take for markup escaped; safe in tables and lists."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", line)
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)
    return re.sub(r"^([-+=:])", r"\\\1", line)


def code(text: Any) -> str:
    """As a code span on one line, safe in tables; line ends are shown as \\n."""
    line = re.sub(r"\r\n|\r|\n|\u2028|\u2029|\x85", r"\\n", str(text)).replace("|", "\\|")
    ticks = _longer_than(line, 1)
    room = " " if line[:1] in ("`", " ", "") or line[-1:] in ("`", " ") else ""
    return f"{ticks}{room}{line}{room}{ticks}"


def fenced(text: Any, language: str = "") -> str:
    """As a code block of its own."""
    words = re.sub(r"\r\n|\r|\u2028|\u2029|\x85", "\n", str(text))
    ticks = _longer_than(words, 3)
    return f"{ticks}{language}\n{words}\n{ticks}"


def _longer_than(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
