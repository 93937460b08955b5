"""Numbers, scores, long texts and long names as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from markupsafe import Markup, escape

__all__ = ["breakable", "cut_front", "interval_text", "is_number", "label_text", "number", "printable", "score_text"]

MARK = "…"
CONTROLS = {code: "\ufffd" for code in (*range(9), 11, 12, *range(14, 32), 127, *range(0xD800, 0xE000))}
"""Control characters and lone surrogates, which no page or file of UTF-8 may hold."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """A count or a measure, four digits of it; a dash for what is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if not is_number(value):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def score_text(value: Any) -> str:
    """A score with three decimals, with fewer where it is large: 0.857, 23.41, 1,204."""
    if not is_number(value):
        return "–"
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def interval_text(interval: Any) -> str:
    """`[low, high]` with as many decimals as its width is worth: 0.83–0.88, −0.02 to 0.04; "" where there is none."""
    if not isinstance(interval, Sequence) or len(interval) != 2 or not all(is_number(end) for end in interval):
        return ""
    low, high = interval
    fewest = 2 if high < 10 else 1 if high < 100 else 0
    digits = min(6, max(fewest, math.ceil(-math.log10(high - low)))) if high > low else 3
    ends = [f"{end:,.{digits}f}".replace("-", "−") for end in (low, high)]
    return (" to " if low < 0 else "–").join(ends)


def cut_front(text: str, most: int) -> str:
    """At most about `most` characters of `text`: its end, begun at a word behind a mark, since the question ends it."""
    if len(text) <= most:
        return text
    tail = text[len(text) - most :]
    space = re.search(r"\s", tail[:24])  # in scripts without spaces a cut is as good anywhere
    return f"{MARK} {tail[space.end() if space else 0 :].lstrip()}"


def breakable(text: Any) -> Markup:
    """Escaped, and free to go on in the next line behind the marks that part paths and names."""
    return Markup(re.sub(r"([/\\_.=,])(?=[^\W\d])", r"\1<wbr>", str(escape(str(text)))))


def printable(text: str) -> str:
    """`text` without what UTF-8 or a browser cannot take."""
    return text.translate(CONTROLS)


def label_text(label: Any, verbalizer: Mapping[str, Any] | None) -> str:
    """A label with the word that stands for it, where that is another one: 1 (positive)."""
    words = (verbalizer or {}).get(str(label))
    first = words[0] if isinstance(words, (list, tuple)) and words else words
    return f"{label} ({first})" if first and str(first) != str(label) else str(label)
