"""What came of a run: its scores beside the base's, whether they differ by more than chance, and its story."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from inlay.data.encode import Choices, Encoder, Example
from inlay.data.table import Rows
from inlay.evaluation.compare import Comparison, compare
from inlay.evaluation.intervals import FEW
from inlay.evaluation.score import Items, Judged

__all__ = ["Final", "final_lines", "finite"]


class Final:
    """Base and adapter on the final rows; nothing where there are none."""

    def __init__(self, judged: dict[str | None, Judged], metric: str) -> None:
        self.base, self.adapter = judged.get(None), judged.get("adapter")
        self.comparison: Comparison | None = None
        if self.base is not None and self.adapter is not None:
            self.comparison = compare(self.adapter.rows, self.base.rows, metric)

    def result(self) -> dict[str, Any]:
        """Scores and intervals by the names they have in `train --json`."""
        told: dict[str, Any] = {}
        for name, judged in (("heldout", self.adapter), ("heldout_base", self.base)):
            told[name] = {} if judged is None else judged.scores
            intervals = {} if judged is None else judged.intervals
            told[f"{name}_intervals"] = {m: None if found is None else list(found) for m, found in intervals.items()}
        told["final_rows"] = 0 if self.adapter is None else len(self.adapter.rows)
        return told | {"comparison": None if self.comparison is None else self.comparison.to_dict()}

    def confusion(self) -> dict[str, Any]:
        tables = {"base": self.base and self.base.confusion, "adapter": self.adapter and self.adapter.confusion}
        there = {name: table for name, table in tables.items() if table is not None}
        if not there:
            return {}
        labels = next(iter(there.values())).labels
        return {"labels": labels} | {name: table.table for name, table in there.items()}

    def notice(self) -> str:
        """What must be said of the comparison; "" where the adapter is better."""
        found = self.comparison
        if found is None or found.better:
            return ""
        within = ""
        if found.interval is not None:
            within = f", 95 % interval {found.interval[0]:+.3g} to {found.interval[1]:+.3g}"
        difference = f"({found.metric} {found.difference:+.3g}{within})"
        if found.better is False:
            return f"the adapter is worse than the base on the {found.rows} final rows {difference}"
        if found.rows < FEW:
            return f"{found.rows} final rows are too few to tell adapter and base apart {difference}"
        return f"the adapter is no better than the base on the {found.rows} final rows {difference}"


def final_lines(final: Final, items: Items, rows: Rows, encoder: Encoder) -> str:
    """final.jsonl: each final row with its answer, and what adapter and base made of it."""
    if final.adapter is None or final.base is None:
        return ""
    own, base = final.adapter.rows, final.base.rows
    first: dict[int, Choices | Example] = {}
    for sample, item in zip(items.samples, items.items, strict=True):
        first.setdefault(sample, item)
    places = {row.number: row for row in rows}
    lines = []
    for n, sample in enumerate(own.samples.tolist()):
        row = places[sample]
        told: dict[str, Any] = {"where": row.where, **_words(first[sample], encoder)}
        if own.right is not None and own.said is not None and base.said is not None:
            told["label"] = own.labels[own.right[n]]
            for name, judged in (("", own), ("base_", base)):
                assert judged.said is not None and judged.probabilities is not None
                told[f"{name}said"] = own.labels[judged.said[n]]
                told[f"{name}probabilities"] = dict(zip(own.labels, judged.probabilities[n].tolist(), strict=True))
        else:
            told |= {f"{name}loss": float(j.nats[n] / max(j.tokens[n], 1)) for name, j in (("", own), ("base_", base))}
            told |= {f"{name}exact": bool(j.exact[n]) for name, j in (("", own), ("base_", base))}
        lines.append(json.dumps(finite(told), ensure_ascii=False) + "\n")
    return "".join(lines)


def _words(item: Choices | Example, encoder: Encoder) -> dict[str, str]:
    """What the model read before the answer, and the answer."""
    if isinstance(item, Example):
        head = item.learned.index(True)
        prompt, answer = item.ids[:head], [i for i, learned in zip(item.ids, item.learned, strict=True) if learned]
    else:
        prompt, answer = item.prompt, next(ids for label, ids in item.words if label == item.label)
    return {"prompt": _decoded(encoder, prompt), "answer": _decoded(encoder, answer).strip()}


def _decoded(encoder: Encoder, ids: Sequence[int]) -> str:
    return encoder.tokenizer.decode(list(ids), skip_special_tokens=True)


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
