"""What came of a learner: its scores beside the base's, and whether they differ by more than chance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from inlay.data.encode import Choices, Encoder, Example
from inlay.data.table import Rows
from inlay.data.targets import HeadEncoder, Targeted
from inlay.evaluation.compare import Comparison, compare
from inlay.evaluation.head_rows import NumberScores
from inlay.evaluation.intervals import FEW
from inlay.evaluation.rows import RowScores
from inlay.evaluation.score import Items, Scored
from inlay.files import finite

__all__ = ["Final", "final_lines"]


class Final:
    """The base and the adapter `name` on the final rows; nothing where there are none."""

    def __init__(self, scored: Mapping[str | None, Scored], name: str, metric: str) -> None:
        self.base, self.adapter = scored.get(None), scored.get(name)
        self.comparison: Comparison | None = None
        if self.base is not None and self.adapter is not None:
            self.comparison = compare(self.adapter.rows, self.base.rows, metric)

    def result(self) -> dict[str, Any]:
        """Scores and intervals by the names they have in `train --json`."""
        result: dict[str, Any] = {}
        for name, scored in (("heldout", self.adapter), ("heldout_base", self.base)):
            result[name] = {} if scored is None else scored.scores
            intervals = {} if scored is None else scored.intervals
            result[f"{name}_intervals"] = {m: None if found is None else list(found) for m, found in intervals.items()}
        result["final_rows"] = 0 if self.adapter is None else len(self.adapter.rows)
        return result | {"comparison": None if self.comparison is None else self.comparison.to_dict()}

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
    """final.jsonl: each final row with its answer, and what adapter and base (where it was scored) made of it."""
    if final.adapter is None:
        return ""
    own = final.adapter.rows
    both = {"": own} if final.base is None else {"": own, "base_": final.base.rows}
    first: dict[int, Choices | Example] = {}
    for sample, item in zip(items.samples, items.items, strict=True):
        first.setdefault(sample, item)
    numbered = {row.number: row for row in rows}
    lines = []
    for n, sample in enumerate(own.samples.tolist()):
        line: dict[str, Any] = {"where": numbered[sample].where, **_words(first[sample], encoder)}
        line |= _labels(n, both) if own.right is not None else _losses(n, both)
        lines.append(json.dumps(finite(line), ensure_ascii=False) + "\n")
    return "".join(lines)


def _labels(n: int, both: Mapping[str, RowScores]) -> dict[str, Any]:
    """The label of row n, and those that adapter and base chose, with all probabilities."""
    own = both[""]
    assert own.right is not None
    line: dict[str, Any] = {"label": own.labels[own.right[n]]}
    for name, scored in both.items():
        assert scored.predicted is not None and scored.probabilities is not None
        line[f"{name}said"] = own.labels[scored.predicted[n]]
        line[f"{name}probabilities"] = dict(zip(own.labels, scored.probabilities[n].tolist(), strict=True))
    return line


def _losses(n: int, both: Mapping[str, RowScores]) -> dict[str, Any]:
    """Of row n, the losses (a token) of adapter and base, and their numbers, or their hits among the row's tokens."""
    line: dict[str, Any] = {f"{name}loss": float(own.nats[n] / max(own.tokens[n], 1)) for name, own in both.items()}
    for name, own in both.items():
        if isinstance(own, NumberScores):
            line[f"{name}number"] = float(own.said[n])
        else:
            line["tokens"] = int(own.tokens[n])
            line |= {f"{name}hits": int(own.hits[n]), f"{name}exact": bool(own.exact[n])}
    return line


def _words(item: Choices | Example, encoder: Encoder) -> dict[str, str]:
    """What the model read before the answer, and the answer."""
    if isinstance(item, Targeted) and isinstance(encoder, HeadEncoder):
        return {"prompt": _decoded(encoder, item.ids), "answer": encoder.answer(item)}
    if isinstance(item, Example):
        head = item.loss_mask.index(True)
        prompt, answer = item.ids[:head], [i for i, bears in zip(item.ids, item.loss_mask, strict=True) if bears]
    else:
        prompt, answer = item.prompt, next(ids for label, ids in item.words if label == item.label)
    return {"prompt": _decoded(encoder, prompt), "answer": _decoded(encoder, answer).strip()}


def _decoded(encoder: Encoder, ids: Sequence[int]) -> str:
    return encoder.tokenizer.decode(list(ids), skip_special_tokens=True)
