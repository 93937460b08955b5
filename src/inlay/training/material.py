"""The rows of a run: which are trained on, which are held out, and what can be said of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inlay.data.encode import Example
from inlay.data.table import Row, Table, duplicates, read_table, shuffled, split
from inlay.data.template import Columns, Template, choose_template, parse_verbalizer
from inlay.errors import UsageError

from .settings import Settings

__all__ = ["Material", "gather", "lengths"]

HELDOUT_ROWS = 500
"""Rows at most that a share of the data is scored on; a held-out file is scored whole."""


@dataclass(frozen=True)
class Material:
    """Rows to train on and rows held out, with the template for both; `digests` name the files' content."""

    rows: list[Row]
    heldout: list[Row]
    template: Template
    digests: dict[str, str]
    duplicates: int
    shared: int
    """Rows of a held-out file that stand among the training rows too."""

    def summary(self) -> dict[str, Any]:
        told: dict[str, Any] = {**self.digests, "rows": len(self.rows), "heldout_rows": len(self.heldout)}
        told |= {"duplicates": self.duplicates, "heldout_in_training": self.shared}
        if self.template.kind == "label":
            told["labels"] = dict(sorted(Counter(self.template.label_of(row) for row in self.rows).items()))
        return told

    def where(self, samples: Sequence[int]) -> str:
        """The files and lines of some rows, for people."""
        places = {row.number: row.where for row in self.rows}
        named = [places[sample] for sample in dict.fromkeys(samples) if sample in places]
        return "; ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")


def gather(settings: Settings) -> Material:
    """Read what `settings` name. Raises: UsageError and DataError as reading and templates do."""
    table = read_table(settings.data)
    unknown = sorted(set(settings.columns) - {f.name for f in dataclasses.fields(Columns)})
    if unknown:
        raise UsageError(f"columns names {unknown[0]!r}", "Known: text, label, prompt, completion, messages.")
    words = parse_verbalizer(settings.verbalizer) if settings.verbalizer else None
    template = choose_template(table, Columns(**settings.columns), settings.template, words)
    _check_labels(table, template)
    rows = shuffled(table.rows, settings.seed)[: settings.limit]
    double = duplicates(rows)
    try:
        share = float(settings.heldout)
    except ValueError:
        other = read_table(settings.heldout)
        _check_labels(other, template)
        known = {row.digest for row in rows}
        shared = sum(row.digest in known for row in other.rows)
        digests = {"digest": table.digest, "heldout_digest": other.digest}
        return Material(rows, list(other.rows), template, digests, double, shared)
    train_rows, held = split(rows, share, template.content_of)
    if not train_rows:
        raise UsageError(f"no row is left of {len(rows)} to train on", "Hold out fewer.")
    return Material(train_rows, held[:HELDOUT_ROWS], template, {"digest": table.digest}, double, 0)


def lengths(examples: Sequence[Example]) -> dict[str, Any]:
    """How long examples are, in tokens: counts between edges, the mean and the longest."""
    sizes = [len(example.ids) for example in examples]
    width = max(1, -(-max(sizes) // 16))
    counts = Counter(size // width for size in sizes)
    edges = [n * width for n in range(max(counts) + 2)]
    found = {"edges": edges, "counts": [counts.get(n, 0) for n in range(max(counts) + 1)]}
    return {**found, "mean": sum(sizes) / len(sizes), "longest": max(sizes)}


def _check_labels(table: Table, template: Template) -> None:
    if template.kind == "label":
        for row in table.rows:
            template.label_of(row)
