"""Which charts a run's metrics.jsonl makes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inlay.files import json_lines

from .charts import Line, bars, lines, thinned
from .words import is_number

__all__ = ["charts_of", "lengths_chart", "read_metrics"]

Metrics = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that name a step; those that a full disk or a crash cut short are passed over."""
    try:
        lines = json_lines(path)
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict) and is_number(parsed.get("step")):
            found.append(parsed)
    return found


def charts_of(record: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    """Titles and SVGs, those with nothing to show left out. All have one axis, from the first step to the last."""
    ends, mark = [line["step"] for line in (*metrics[:1], *metrics[-1:])], _mark(record, metrics)
    marked = [*_losses(record, metrics), *_held_charts(record, metrics)]
    plain = {
        "Speed": [Line("tokens a second", _speeds(metrics), "--green")],
        "Memory": _memory(record, metrics),
        "Learning rate": [Line("learning rate", _points(metrics, "lr"), "--blue")],
        "Gradient": [Line("norm of the gradient, before clipping", _points(metrics, "norm"), "--blue")],
    }
    made = [(title, lines(f"{title} by step", curves, mark=mark, ends=ends)) for title, curves in marked]
    made += [(title, lines(f"{title} by step", curves, ends=ends)) for title, curves in plain.items()]
    return [(title, svg) for title, svg in made if svg]


def lengths_chart(record: Mapping[str, Any]) -> str:
    """The histogram of the rows' lengths; "" where the record holds none."""
    found = (record.get("data") or {}).get("lengths") or {}
    if "edges" not in found or "counts" not in found:
        return ""
    return bars("rows by length", found["edges"], found["counts"], "tokens in a row")


def _losses(record: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, list[Line]]]:
    """One plot where both losses are nats a token, else two, whose heights cannot be compared."""
    kind, smoothing = (record.get("template") or {}).get("kind"), (record.get("config") or {}).get("label_smoothing")
    loss = _points(metrics, "loss")
    training = [Line("training, a step", loss, "--blue", faint=True)]
    training.append(Line("training, smoothed", _smooth(loss), "--blue"))
    held = [Line(_held_name(record), _held(metrics, "loss"), "--orange", dots=True)]
    if kind in ("completion", "messages", "text") and not smoothing:
        return [("Loss (nats a token)", [*training, *held])]
    smoothed = ", with label smoothing" if smoothing else ""
    units = {"label": "nats, right label", "number": "squared error", "tags": "nats a tag"}
    unit = units.get(str(kind), "nats a token" if kind else "nats")
    return [(f"Training loss (nats a learned token{smoothed})", training), (f"Held-out loss ({unit})", held)]


def _held_charts(record: Mapping[str, Any], metrics: Metrics) -> list[tuple[str, list[Line]]]:
    there = ["accuracy"] if (record.get("template") or {}).get("kind") == "label" else []
    names = dict.fromkeys([*there, record.get("metric") or "loss"])
    title = _held_name(record)
    return [
        (f"Held-out {name.replace('_', ' ')}", [Line(title, _held(metrics, name), "--orange", dots=True)])
        for name in names
        if name != "loss"
    ]


def _held_name(record: Mapping[str, Any]) -> str:
    count = record.get("choosing_rows") or (record.get("data") or {}).get("choosing_rows")
    return f"held out, {count:,} choosing rows" if isinstance(count, int) else "held out"


def _mark(record: Mapping[str, Any], metrics: Metrics) -> tuple[float, str] | None:
    best = record.get("best_step")
    return (best, "best") if is_number(best) and any(line.get("heldout") for line in metrics) else None


def _held(metrics: Metrics, name: str) -> Points:
    found = [(line["step"], (line.get("heldout") or {}).get(name)) for line in metrics]
    return [(step, value) for step, value in found if is_number(value)]


def _points(metrics: Metrics, name: str) -> Points:
    return [(line["step"], line[name]) for line in metrics if is_number(line.get(name))]


def _smooth(points: Iterable[tuple[float, float]]) -> Points:
    """The exponential mean over about a twentieth of the points."""
    points = list(points)
    if len(points) < 8:
        return []
    weight, mean, made = min(0.5, 20 / len(points)), points[0][1], []
    for x, y in points:
        mean += weight * (y - mean)
        made.append((x, mean))
    return made


def _speeds(metrics: Metrics) -> Points:
    points = []
    timed = [line for line in metrics if is_number(line.get("seconds")) and is_number(line.get("tokens"))]
    for before, now in itertools.pairwise(timed):
        seconds = now["seconds"] - before["seconds"]
        if seconds > 0:
            points.append((now["step"], (now["tokens"] - before["tokens"]) / seconds))
    return thinned(points, 120)


def _memory(record: Mapping[str, Any], metrics: Metrics) -> list[Line]:
    curves = [Line("now (MB)", _points(metrics, "memory_mb"), "--green")]
    curves.append(Line("peak (MB)", _points(metrics, "peak_memory_mb"), "--orange"))
    curves.append(Line("GPU (MB)", _points(metrics, "gpu_memory_mb"), "--blue"))
    steps = [line["step"] for line in metrics]
    memory, peak = record.get("memory") or {}, max([y for _, y in curves[1].points], default=0)
    estimate, limit = memory.get("estimate_mb"), memory.get("limit_mb")
    if steps and is_number(estimate):
        curves.append(Line("estimate", [(steps[0], estimate), (steps[-1], estimate)], "--grey", dashed=True))
    if steps and is_number(limit) and limit < 3 * max(peak, estimate or 0):
        curves.append(Line("limit", [(steps[0], limit), (steps[-1], limit)], "--red", dashed=True))
    return curves
