"""report.html: what a run did, in one page without outside assets."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from inlay.files import write_text

from .charts import Line, bars, lines, thinned

__all__ = ["write_report"]


def write_report(folder: Path, story: Mapping[str, Any]) -> Path:
    """Write `folder`/report.html from `story` (what run.json holds) and the folder's metrics.jsonl."""
    metrics = _metrics(folder / "metrics.jsonl")
    charts = [(title, Markup(svg)) for title, svg in _charts(story, metrics) if svg]
    page = _environment().get_template("report.html.jinja")
    told = {
        "story": story,
        "charts": charts,
        "scores": _scores(story),
        "facts": _facts(story),
        "data": _data(story),
        "lengths": Markup(_lengths(story)),
        "confusions": _confusions(story),
        "config": sorted((k, _shown(v)) for k, v in story.get("config", {}).items() if v not in (None, {}, "")),
    }
    path = folder / "report.html"
    write_text(path, page.render(told))
    return path


def _environment() -> Environment:
    loader = PackageLoader("inlay.reporting", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    return environment


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]


def _charts(story: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    best, metric = story.get("best_step"), story.get("metric", "loss")
    held = [line for line in metrics if "heldout" in line]
    mark = (best, "best") if held and best is not None else None
    loss = _points(metrics, "loss")
    curves = [Line("training loss, a step", loss, "--blue", faint=True), Line("smoothed", _smooth(loss), "--blue")]
    points = [(line["step"], line["heldout"].get("loss")) for line in held]
    curves.append(Line("held-out loss", points, "--orange", dots=True))
    made = [("Learning", lines("loss by step", curves, mark=mark))]
    if metric != "loss":
        points = [(line["step"], line["heldout"].get(metric)) for line in held]
        made.append((f"Held-out {metric}", lines(metric, [Line(metric, points, "--orange", dots=True)], mark=mark)))
    made.append(("Speed", lines("tokens a second by step", [Line("tokens a second", _speeds(metrics), "--green")])))
    made.append(("Memory", lines("memory by step", _memory(story, metrics))))
    made.append(("Learning rate", lines("rate by step", [Line("learning rate", _points(metrics, "lr"), "--blue")])))
    norms = [Line("norm of the gradient, before clipping", _points(metrics, "norm"), "--blue")]
    return [*made, ("Gradient", lines("norm by step", norms))]


def _points(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in metrics if line.get(name) is not None]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The exponential mean over about a twentieth of the points."""
    if len(points) < 8:
        return []
    weight, mean, made = min(0.5, 20 / len(points)), None, []
    for x, y in points:
        mean = y if mean is None else mean + weight * (y - mean)
        made.append((x, mean))
    return made


def _speeds(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    points = []
    for before, now in itertools.pairwise(metrics):
        seconds = now["seconds"] - before["seconds"]
        if seconds > 0:
            points.append((now["step"], (now["tokens"] - before["tokens"]) / seconds))
    return thinned(points, 120)


def _memory(story: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Line]:
    curves = [Line("now (MB)", _points(metrics, "memory_mb"), "--green")]
    curves.append(Line("peak (MB)", _points(metrics, "peak_memory_mb"), "--orange"))
    curves.append(Line("GPU (MB)", _points(metrics, "gpu_memory_mb"), "--blue"))
    steps = [line["step"] for line in metrics]
    estimate, peak = story.get("memory", {}).get("estimate_mb"), max([y for _, y in curves[1].points], default=0)
    limit = story.get("memory", {}).get("limit_mb")
    if steps and estimate:
        curves.append(Line("estimate", [(steps[0], estimate), (steps[-1], estimate)], "--grey", dashed=True))
    if steps and limit and limit < 3 * max(peak, estimate or 0):
        curves.append(Line("limit", [(steps[0], limit), (steps[-1], limit)], "--red", dashed=True))
    return curves


def _scores(story: Mapping[str, Any]) -> list[tuple[str, float | None, float]]:
    """Metric, base's and adapter's value; the one that chose the best adapter first, but accuracy before it."""
    held, base = story.get("heldout", {}), story.get("heldout_base", {})
    order = sorted(held, key=lambda name: (name != "accuracy", name != story.get("metric")))
    return [(name, base.get(name), held[name]) for name in order]


def _facts(story: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost, memory = story.get("cost", {}), story.get("memory", {})
    made: list[tuple[str, str]] = []

    def add(name: str, value: Any, unit: str = "") -> None:
        if value is not None:
            made.append((name, f"{_number(value)}{unit}"))

    add("Steps", story.get("steps"))
    add("Tokens", story.get("tokens"))
    add("Training time", story.get("seconds"), " s")
    add("Tokens a second", story.get("tokens_per_second"))
    add("Peak memory", story.get("peak_memory_mb"), " MB")
    add("Peak GPU memory", story.get("peak_gpu_memory_mb"), " MB")
    add("Estimated before", memory.get("estimate_mb"), " MB")
    add("Trained parameters", cost.get("trainable_parameters"))
    if cost.get("base_parameters"):
        add("Share of the base", 100 * cost["trainable_parameters"] / cost["base_parameters"], " %")
    add("Size on disk", None if cost.get("file_bytes") is None else cost["file_bytes"] / 2**20, " MB")
    add("Tokens added to each row", cost.get("virtual_tokens"))
    add("Prefix keys in each layer", cost.get("prefix_tokens"))
    return made


def _data(story: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = story.get("data", {})
    names = {"rows": "rows", "heldout_rows": "held-out rows", "duplicates": "rows that stand there more than once"}
    names["heldout_in_training"] = "held-out rows that are trained on too"
    made = [(label, _number(data[key])) for key, label in names.items() if data.get(key) is not None]
    counts = {k: v for k, v in story.get("rows", {}).items() if k != "rows" and v}
    made += [(f"rows {reason}", _number(count)) for reason, count in counts.items()]
    made += [(f"rows labelled {label}", _number(count)) for label, count in list(data.get("labels", {}).items())[:20]]
    if "lengths" in data:
        made += [("tokens in a row, mean", _number(data["lengths"]["mean"]))]
        made += [("tokens in the longest row", _number(data["lengths"]["longest"]))]
    return made


def _lengths(story: Mapping[str, Any]) -> str:
    found = story.get("data", {}).get("lengths")
    return bars("rows by length", found["edges"], found["counts"], "tokens in a row") if found else ""


def _confusions(story: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables with the share of each cell in its row, for shading; those of many labels would not be read."""
    told = story.get("confusion", {})
    if not told or len(told["labels"]) > 30:
        return []
    made = []
    for name in ("base", "adapter"):
        if name in told:
            rows = [[(n, n / (sum(row) or 1)) for n in row] for row in told[name]]
            made.append({"name": name, "labels": told["labels"], "rows": list(zip(told["labels"], rows, strict=True))})
    return made


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
