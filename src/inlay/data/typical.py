"""Some rows of many, of lengths like those of all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .encode import Example
from .prepare import token_counts

__all__ = ["typical_rows"]


def typical_rows(examples: Sequence[Example], tokens: float) -> list[Example]:
    """Rows of about so many tokens together, of lengths like those of all: one at least."""
    sizes = token_counts(examples)
    count = max(1, min(len(sizes), round(tokens / float(sizes.mean()))))
    order = np.argsort(sizes, kind="stable")
    places = (np.arange(count) + 0.5) * len(sizes) / count
    return [examples[int(order[int(place)])] for place in places]
