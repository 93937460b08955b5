"""report.html: what a run did, in one page without outside assets."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from inlay.files import write_text

from .curves import charts_of, lengths_chart, read_metrics
from .facts import added_costs, cost_facts, data_facts
from .naming import named
from .rows import SHOWN, WHOLE, missed_rows
from .scores import by_label, final_rows, memory_words, scores_of, verdict
from .words import breakable, cut_front, label_text, number, printable, score_text

__all__ = ["page_environment", "write_report"]

LABELS = 30
"""At most, in a table of labels by labels; more would not be read."""
BY_CHANCE = (
    ("weight down", "surest mistakes first"), ("weight up", "least sure first"), ("label up words", "by label"),
    ("said up words", "by what the adapter said"), ("place up", "as in the data"),
)  # fmt: skip
BY_LOSS = (("weight down", "highest loss first"), ("weight up", "lowest loss first"), ("place up", "as in the data"))


def write_report(folder: Path, record: Mapping[str, Any], command: Sequence[str] = ()) -> Path:
    """Write `folder`/report.html from `record` (what run.json holds) and the folder's metrics.jsonl and final.jsonl.
    `command` are the arguments of the shell command that repeats the run.

    Every field of `record` may be missing: runs of earlier versions and runs that failed have fewer.
    """
    template, scores = record.get("template") or {}, scores_of(record)
    missed = missed_rows(folder / "final.jsonl", template.get("verbalizer"))
    charts = charts_of(record, read_metrics(folder / "metrics.jsonl"))
    count = final_rows(record)
    context = {
        "record": record,
        "title": _title(record),
        "subtitle": _subtitle(record),
        "links": _links(folder, record),
        "verdict": verdict(record),
        "notices": _notices(record),
        "scores": scores,
        "has_intervals": any(score.interval or score.base_interval for score in scores),
        "rows_scored": "held-out rows" if count is None else f"{number(count)} held-out rows",
        "charts": [(title, Markup(svg)) for title, svg in charts],
        "confusions": _confusions(record),
        "by_label": by_label(record),
        "samples": [_sample(each, template) for each in record.get("samples") or []],
        "missed": missed,
        "orders": BY_CHANCE if missed is not None and missed.labelled else BY_LOSS,
        "facts": cost_facts(record),
        "added": added_costs(record),
        "memory_words": memory_words(record),
        "data": data_facts(record),
        "lengths": Markup(lengths_chart(record)),
        "config": _config(record),
        "command": [shlex.quote(part) for part in command],
    }
    path = folder / "report.html"
    write_text(path, printable(page_environment().get_template("report.html.jinja").render(context)))
    return path


def page_environment() -> Environment:
    """Where the templates of pages are found and how they are filled: what they are given is escaped."""
    loader = PackageLoader("inlay.reporting", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "breakable": breakable}
    return environment


def _title(record: Mapping[str, Any]) -> str:
    config = record.get("config") or {}
    method = record.get("method") or config.get("method") or "Training"
    return f"{method} on {named(str(config['base'])).short}" if config.get("base") else str(method)


def _subtitle(record: Mapping[str, Any]) -> list[Markup | str]:
    config, steps, best = record.get("config") or {}, record.get("steps"), record.get("best_step")
    parts: list[Markup | str] = [str(record["status"])] if record.get("status") else []
    if best:
        parts.append(f"best at step {number(best)}" + (f" of {number(steps)}" if steps else ""))
    if config.get("base"):
        parts.append(breakable(named(str(config["base"])).name))
    return parts + [breakable(Path(str(file)).name) for file in config.get("data") or []]


def _links(folder: Path, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What lies beside the page; run.json is written after it."""
    names = {"adapter": "adapter/", "card": "adapter/README.md", "metrics.jsonl": "metrics.jsonl"}
    names["final.jsonl"] = "final.jsonl"
    there = [(name, target) for name, target in names.items() if (folder / target).exists()]
    return [*there, ("run.json", "run.json")]


def _notices(record: Mapping[str, Any]) -> list[str]:
    backed_off = (record.get("memory") or {}).get("backed_off") or []
    return [*map(str, record.get("notices") or [])] + [
        f"{step.get('why', 'memory')} at {step.get('where', '?')}: {number(step.get('to'))} tokens at once in place of "
        f"{number(step.get('from'))}; the gradients stay the same."
        for step in backed_off
    ]


def _sample(sample: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    prompt, verbalizer = str(sample.get("prompt") or ""), template.get("verbalizer")
    lines = []
    for who in ("base", "adapter"):
        label, words = sample.get(f"{who}_label"), str(sample.get(who) or "")
        chance = sample.get(f"{who}_probability")
        shown = "" if label is None else label_text(label, verbalizer)
        lines.append((who, shown, "" if chance is None else score_text(chance), words))
    return {
        "prompt": cut_front(prompt, SHOWN),
        "whole": cut_front(prompt, WHOLE) if len(prompt) > SHOWN else "",
        "answer": str(sample.get("answer") or ""),
        "lines": lines,
    }


def _config(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    config = sorted((record.get("config") or {}).items())
    given = [(name, value) for name, value in config if name != "argv" and value not in (None, {}, [], "")]
    versions = (record.get("versions") or {}).items()
    return [*((name, _setting_text(value)) for name, value in given), *((name, str(each)) for name, each in versions)]


def _confusions(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables with the share of each cell in its row, for shading; those of many labels would not be read."""
    confusion, verbalizer = record.get("confusion") or {}, (record.get("template") or {}).get("verbalizer")
    labels = [label_text(label, verbalizer) for label in confusion.get("labels") or []]
    if not labels or len(labels) > LABELS:
        return []
    made = []
    for name in ("base", "adapter"):
        if confusion.get(name):
            rows = [[(n, n / (sum(row) or 1)) for n in row] for row in confusion[name]]
            made.append({"name": name, "labels": labels, "rows": list(zip(labels, rows, strict=False))})
    return made


def _setting_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
