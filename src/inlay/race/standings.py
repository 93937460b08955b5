"""What came of a race, or has come of it so far, read from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from inlay.evaluation.compare import HIGHER
from inlay.files import finite
from inlay.runs.folder import RunFolder
from inlay.runs.planning import recorded_plans

from .halving import shares_of
from .rungs import rungs_of

__all__ = ["standings"]


def standings(folder: RunFolder) -> dict[str, Any]:
    """race.json of a run's folder: the contenders, the best first, the `winner`, and the base's score.

    A contender is before another where it came further, or came as far with a better score on the choosing rows;
    `score` and `interval` are of the final rows, which chose nothing.
    """
    record = folder.read()
    plans = {plan.name: plan for plan in recorded_plans(record)}
    chosen = _chosen(folder)
    metric = (record.get("result") or {}).get("metric") or record.get("metric")
    shares = shares_of([*plans.values()])
    learners: Mapping[str, Any] = record.get("learners") or {}
    found = []
    for name, plan in plans.items():
        own, scores = learners.get(name) or {}, chosen.get(name, [])
        total = own.get("total_steps") or plan.steps or 1
        passed = sum(step <= (scores[-1]["step"] if scores else 0) for step in rungs_of(total, shares))
        best = _best([line["heldout"] for line in scores], metric)
        heldout, intervals = own.get("heldout") or {}, own.get("heldout_intervals") or {}
        found.append({
            "name": name, "method": record["plans"][name]["method"], "config": record["plans"][name]["set"],
            "lr": plan.rate, "seed": plan.seed, "status": own.get("status", "waiting"),
            "score": heldout.get(metric), "interval": intervals.get(metric), "scores": heldout,
            "choosing": best, "rungs": passed, "steps": own.get("steps"), "total_steps": total,
            "tokens": own.get("tokens"), "seconds": own.get("seconds"),
            "trainable_parameters": (own.get("cost") or {}).get("trainable_parameters"),
            "file_bytes": (own.get("cost") or {}).get("file_bytes"),
            "virtual_tokens": (own.get("cost") or {}).get("virtual_tokens"),
            "prefix_tokens": (own.get("cost") or {}).get("prefix_tokens"),
            "comparison": own.get("comparison"), "adapter": str(folder.path / "adapters" / name),
        })  # fmt: skip
    found.sort(key=lambda one: (-one["rungs"], _order(one["choosing"], metric)))
    sound = [one for one in found if not str(one["status"]).startswith("diverged") and one["choosing"] is not None]
    base = next((own["heldout_base"] for own in learners.values() if own.get("heldout_base")), {})
    return finite({
        "status": record.get("status"), "metric": metric, "winner": sound[0]["name"] if sound else None,
        "base": base.get(metric), "base_scores": base, "contenders": found, "rungs": list(shares),
        "final_rows": next((own.get("final_rows") for own in learners.values()), 0),
        "tokens": sum(one["tokens"] or 0 for one in found), "seconds": record.get("seconds"),
        "whole_tokens": _whole(found), "notices": record.get("notices") or [],
    })  # fmt: skip


def _chosen(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Each contender's lines of metrics.jsonl that hold scores on the choosing rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    if not folder.metrics.exists():
        return found
    for text in folder.metrics.read_text(encoding="utf8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the last one, that a run is writing
        if "heldout" in line:
            found.setdefault(line["learner"], []).append(line)
    return found


def _best(scores: list[dict[str, Any]], metric: str | None) -> float | None:
    values = [line[metric] for line in scores if metric in line and line[metric] is not None]
    return (max(values) if metric in HIGHER else min(values)) if values else None


def _order(value: float | None, metric: str | None) -> float:
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if metric in HIGHER else value


def _whole(found: list[dict[str, Any]]) -> float:
    """Tokens that all contenders would have taken to the end."""
    return sum((one["tokens"] or 0) / max(one["steps"] or 0, 1) * one["total_steps"] for one in found)
