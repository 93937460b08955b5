"""What came of a race, or has come of it so far, read from its folder.

What race.json says of a contender's cost, null where it is not known:

- `trainable_parameters`; `tokens` trained on; `file_bytes`; `virtual_tokens` a row, `prefix_tokens` in each layer;
  `seconds`, the race's time up to the contender's last step.
- `token_ms`: milliseconds a decoded token more than with the base alone, with `token_ms_quartiles` of the pairs.
- `training_seconds`: its share of `stream_seconds`, those of the race from its rows to its last step, scoring left out
  (`shared_seconds`). `training_token_ms`: milliseconds a token of a step of its own.
- `training_memory_mb`: an estimate in MiB beside the base; `training_memory_parts_mb` are its `parameters`,
  `gradients`, `optimizer`, `copies` and `activations` (`LearnerMemory`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from inlay.evaluation.compare import HIGHER
from inlay.files import finite, json_lines
from inlay.runs.asking import Ask
from inlay.runs.events import read_events
from inlay.runs.folder import RunFolder
from inlay.runs.obeying import clone_name
from inlay.runs.planning import recorded_plans
from inlay.training.plan import Plan

from .halving import shares_of
from .rungs import rungs_of

__all__ = ["PLANNED", "first_plans", "order", "standings"]

PLANNED = "planned.json"
"""Of a race's folder: what was said when it was planned, so of contenders that were left out, and of the budget."""


def first_plans(folder: RunFolder, record: Mapping[str, Any]) -> list[Plan]:
    """The plans that a race began with, which its rungs are of: clones come later."""
    asks = [event for event in read_events(folder.events) if event["event"] == "ask" and event["what"] == "clone"]
    clones = {clone_name(Ask(event["what"], event["name"], event["settings"])) for event in asks}
    return [plan for plan in recorded_plans(record) if plan.name not in clones]


def standings(folder: RunFolder) -> dict[str, Any]:
    """race.json of a run's folder: the contenders, the best first, the `winner`, and the base's score.

    A contender is before another where it came further, or came as far with a better score on the choosing rows;
    `score` and `interval` are of the final rows, which chose nothing; the costs are said at the top of this file.
    """
    record, chosen = folder.read(), _chosen(folder)
    metric, shares = record.get("metric"), shares_of(first_plans(folder, record))
    learners: Mapping[str, Any] = record.get("learners") or {}
    latency: Mapping[str, Any] = record.get("latency") or {}
    training: Mapping[str, Any] = record.get("training") or {}
    found = []
    for plan in recorded_plans(record):
        own, scores = learners.get(plan.name) or {}, chosen.get(plan.name, [])
        total = own.get("total_steps") or plan.steps or 1
        passed = sum(step <= (scores[-1]["step"] if scores else 0) for step in rungs_of(total, shares))
        described = {"name": plan.name, "method": record["plans"][plan.name]["method"]}
        described |= {"config": record["plans"][plan.name]["set"], "lr": plan.rate, "seed": plan.seed}
        described["virtual_tokens_at"] = plan.virtual_tokens_at
        best = _best([line["heldout"] for line in scores], metric)
        described |= {"choosing": best, "rungs": passed, "total_steps": total}
        described |= _token_ms(latency, plan.name) | _training(training, plan.name)
        found.append({**described, **_own(own, metric), "adapter": str(folder.path / "adapters" / plan.name)})
    found.sort(key=lambda one: (-one["rungs"], order(one["choosing"], metric)))
    sound = [one for one in found if not str(one["status"]).startswith("diverged") and one["choosing"] is not None]
    base = next((own["heldout_base"] for own in learners.values() if own.get("heldout_base")), {})
    return finite({
        "status": record.get("status"), "metric": metric, "winner": sound[0]["name"] if sound else None,
        "base": base.get(metric), "base_scores": base, "contenders": found, "rungs": list(shares),
        "final_rows": next((own.get("final_rows") for own in learners.values()), 0),
        "tokens": sum(one["tokens"] or 0 for one in found), "seconds": record.get("seconds"),
        "whole_tokens": _whole(found), "notices": record.get("notices") or [],
        "planned": _planned(folder),
        "base_token_ms": latency.get("base_token_ms"), "latency_unmeasured": latency.get("unmeasured"),
        "stream_seconds": training.get("seconds"),
    })  # fmt: skip


def _own(own: Mapping[str, Any], metric: str | None) -> dict[str, Any]:
    """What run.json says of a contender."""
    heldout, intervals, cost = (own.get(name) or {} for name in ("heldout", "heldout_intervals", "cost"))
    costs = ("trainable_parameters", "file_bytes", "virtual_tokens", "prefix_tokens")
    found = {"status": own.get("status", "waiting"), "score": heldout.get(metric), "interval": intervals.get(metric)}
    found |= {"scores": heldout, **{name: own.get(name) for name in ("steps", "tokens", "seconds", "comparison")}}
    return found | {name: cost.get(name) for name in costs}


def _planned(folder: RunFolder) -> list[str]:
    try:
        found = json.loads((folder.path / PLANNED).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return []
    return [str(line) for line in found] if isinstance(found, list) else []


def _token_ms(latency: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Milliseconds that a decoded token takes more with a contender, the middle half of the pairs beside them."""
    own = (latency.get("added_token_ms") or {}).get(name) or {}
    return {"token_ms": own.get("ms"), "token_ms_quartiles": own.get("quartiles")}


def _training(training: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What training took a contender."""
    own = (training.get("contenders") or {}).get(name) or {}
    memory = dict(own.get("memory_mb") or {})
    total = memory.pop("total", None)
    found = {"training_seconds": own.get("seconds"), "training_token_ms": own.get("token_ms")}
    return found | {"training_memory_mb": total, "training_memory_parts_mb": memory or None}


def _chosen(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Each contender's lines of metrics.jsonl that hold scores on the choosing rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    if not folder.metrics.exists():
        return found
    for text in json_lines(folder.metrics):
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


def order(value: float | None, metric: str | None) -> float:
    """A score as something of which less is better; what is no number comes last."""
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if metric in HIGHER else value


def _whole(found: list[dict[str, Any]]) -> float:
    """Tokens that all contenders would have taken to the end."""
    return sum((one["tokens"] or 0) / max(one["steps"] or 0, 1) * one["total_steps"] for one in found)
