"""The final rows that an adapter judged wrongly, for people to look through."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .words import cut_front, is_number, label_text, score_text

__all__ = ["Missed", "missed_rows"]

MOST = 500
SHOWN, WHOLE = 320, 6000
"""Characters of a prompt that are shown at once, and that the page holds."""


@dataclass
class Missed:
    """`rows` are for the page, the surest mistakes or the highest losses first; `total` final rows were read, `wrong`
    of them judged wrongly, `mended` were wrong with the base alone, `spoilt` right with it.
    """

    labelled: bool
    total: int = 0
    wrong: int = 0
    mended: int = 0
    spoilt: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


def missed_rows(path: Path, verbalizer: Mapping[str, Any] | None = None, most: int = MOST) -> Missed | None:
    """Read final.jsonl at `path`; lines that cannot be read are passed over. None where there is no line to read."""
    found, worst = Missed(False), []
    for row in _read(path):
        found.labelled = found.labelled or "said" in row
        found.total += 1
        right, base = _right(row, ""), _right(row, "base_")
        found.mended += right is True and base is False
        found.spoilt += right is False and base is True
        if right is True:
            continue
        found.wrong += 1
        entry = (_weight(row), -found.total, row)
        if len(worst) < most:
            heapq.heappush(worst, entry)
        else:
            heapq.heappushpop(worst, entry)
    ordered = sorted(worst, key=lambda entry: entry[:2], reverse=True)
    found.rows = [_page_row(row, -place, verbalizer) for _, place, row in ordered]
    return found if found.total else None


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    yield row
    except OSError:
        return


def _right(row: Mapping[str, Any], who: str) -> bool | None:
    """Whether the adapter ("") or the base ("base_") had the row right; None where nobody wrote it down."""
    if f"{who}said" in row:
        return str(row[f"{who}said"]) == str(row.get("label"))
    return row.get(f"{who}exact")


def _chance(row: Mapping[str, Any], who: str, label: Any) -> float | None:
    found = (row.get(f"{who}probabilities") or {}).get(str(label))
    return found if is_number(found) else None


def _weight(row: Mapping[str, Any]) -> float:
    """The row's rank on the page, highest first: the probability of a wrong label, or the loss."""
    value = _chance(row, "", row["said"]) if "said" in row else row.get("loss")
    return float(value) if is_number(value) else math.inf if value != value else 0.0  # what is no number is worst


def _page_row(row: Mapping[str, Any], place: int, verbalizer: Mapping[str, Any] | None) -> dict[str, Any]:
    prompt, where = str(row.get("prompt") or ""), str(row.get("where") or "")
    entry = {
        "place": place,
        "prompt": cut_front(prompt, SHOWN),
        "whole": cut_front(prompt, WHOLE) if len(prompt) > SHOWN else "",
        "where": where.replace("\\", "/").rpartition("/")[2],
        "answer": str(row.get("answer") or ""),
        "weight": str(_weight(row)).replace("inf", "Infinity"),  # as JavaScript spells it
        "base_right": _right(row, "base_"),
        "lines": [],
    }
    if "said" not in row:
        entry["loss"], entry["base_loss"] = score_text(row.get("loss")), score_text(row.get("base_loss"))
        return entry
    label = row.get("label")
    entry["label"] = label_text(label, verbalizer)
    for who, name in (("", "adapter"), ("base_", "base")):
        said = row.get(f"{who}said")
        if said is not None:
            entry[f"{name}_said"] = label_text(said, verbalizer)
            entry["lines"].append((name, label_text(said, verbalizer), _chances(row, who, said, label)))
    return entry


def _chances(row: Mapping[str, Any], who: str, said: Any, label: Any) -> str:
    own, right = _chance(row, who, said), _chance(row, who, label)
    if own is None:
        return ""
    return score_text(own) + (f", the right one {score_text(right)}" if said != label and right is not None else "")
