"""What a run's scores say: each beside the base's, with counts and intervals, in all and by label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .words import interval_text, is_number, label_text, number, score_text

__all__ = ["ByLabel", "Score", "Verdict", "by_label", "final_rows", "memory_words", "scores_of", "verdict"]

MEANINGS = {
    "label": {
        "loss": "nats of the right label; less is better",
        "accuracy": "share of rows with the right label",
        "f1": "harmonic mean of precision and recall, mean over the labels",
    },
    "number": {
        "loss": "mean squared error; less is better",
        "mae": "mean absolute error; less is better",
        "pearson": "correlation of the numbers",
        "spearman": "correlation of their ranks",
    },
    "tags": {
        "loss": "nats a tag; less is better",
        "accuracy": "share of words with the right tag",
        "span_f1": "harmonic mean of precision and recall of whole spans",
    },
    "": {
        "loss": "nats a token of the answer; less is better",
        "perplexity": "e to the loss; less is better",
        "accuracy": "share of the answer's tokens that come first, each behind the true ones",
        "exact_match": "share of rows whose whole answer is right",
    },
}
LOWER = ("loss", "perplexity", "mae")
FAR = 0.15
"""Share of the estimate by which a peak may miss it before the report says so."""


@dataclass(frozen=True)
class Score:
    """One metric of base and adapter as text, with 95 % intervals ("" where there is none) and what it means."""

    name: str
    base: str
    base_interval: str
    adapter: str
    interval: str
    meaning: str


@dataclass(frozen=True)
class Verdict:
    """The comparison with the base: `tone` is good, even or bad; `words` a sentence."""

    tone: str
    words: str


@dataclass(frozen=True)
class ByLabel:
    """Scores of one label as text; `pairs` are (base, adapter) of precision, recall and F1, "" for a base unknown."""

    label: str
    rows: str
    pairs: tuple[tuple[str, str], ...]


def final_rows(record: Mapping[str, Any]) -> int | None:
    """How many rows the reported scores are of; None where the record does not say."""
    data = record.get("data") or {}
    found = (record.get("final_rows"), data.get("final_rows"), data.get("heldout_rows"))
    return next((count for count in found if isinstance(count, int)), None)


def scores_of(record: Mapping[str, Any]) -> list[Score]:
    """Accuracy first, then the metric that chose the best adapter, then the others."""
    held, base = record.get("heldout") or {}, record.get("heldout_base") or {}
    own, bases = record.get("heldout_intervals") or {}, record.get("heldout_base_intervals") or {}
    kind = (record.get("template") or {}).get("kind")
    meanings = MEANINGS.get(str(kind), MEANINGS[""])
    order = sorted(held, key=lambda name: (name != "accuracy", name != record.get("metric")))
    return [
        Score(
            name, score_text(base.get(name)), interval_text(bases.get(name)), score_text(held[name]),
            interval_text(own.get(name)), meanings.get(name, ""),
        )
        for name in order
    ]  # fmt: skip


def verdict(record: Mapping[str, Any]) -> Verdict | None:
    """Whether the adapter is better than the base beyond chance; None where nobody compared them."""
    comparison = record.get("comparison") or {}
    difference, interval = comparison.get("difference"), comparison.get("interval")
    if not is_number(difference) or "better" not in comparison:
        return None
    metric = comparison.get("metric", "loss")
    away = interval is not None and interval_text(interval) != "" and not interval[0] <= 0 <= interval[1]
    against = difference > 0 if metric in LOWER else difference < 0
    if comparison["better"]:
        tone, begun = "good", "Better than the base beyond chance"
    elif comparison["better"] is False and away and against:
        tone, begun = "bad", "Worse than the base beyond chance"
    elif away:
        tone, begun = "even", "Too few rows to tell whether it is better than the base"
    else:
        tone, begun = "even", "No better than the base beyond chance"
    sign = "+" if difference > 0 else "−" if difference < 0 else "±"
    within = f" (95 % interval {interval_text(interval)})" if interval_text(interval) else ""
    rows = f", over the same {number(comparison['rows'])} rows" if comparison.get("rows") else ""
    return Verdict(tone, f"{begun}: {metric} {sign}{score_text(abs(difference))}{within}{rows}.")


def by_label(record: Mapping[str, Any]) -> list[ByLabel]:
    """Precision, recall and F1 of each label, from the tables of which was taken for which."""
    confusion = record.get("confusion") or {}
    own = confusion.get("adapter")
    if not own:
        return []
    verbalizer = (record.get("template") or {}).get("verbalizer")
    base = _by_label(confusion["base"]) if confusion.get("base") else [("", "", "")] * len(own)
    pairs = [tuple(zip(before, after, strict=True)) for before, after in zip(base, _by_label(own), strict=False)]
    rows = [number(sum(line)) for line in own]
    names = [label_text(label, verbalizer) for label in confusion.get("labels", [])]
    return [ByLabel(*each) for each in zip(names, rows, pairs, strict=False)]


def _by_label(table: Sequence[Sequence[int]]) -> list[tuple[str, str, str]]:
    found = []
    for n, line in enumerate(table):
        right, true, predicted = line[n], sum(line), sum(row[n] for row in table)
        shares = (right / predicted if predicted else None, right / true if true else None)
        f1 = 2 * right / (true + predicted) if true + predicted else None
        found.append((*map(score_text, shares), score_text(f1)))
    return found


def memory_words(record: Mapping[str, Any]) -> str:
    """A sentence where the peak of memory was far from the estimate, with the reason if one is known; else ""."""
    memory = record.get("memory") or {}
    gpu = record.get("peak_gpu_memory_mb")
    peak, estimate = gpu if is_number(gpu) else record.get("peak_memory_mb"), memory.get("estimate_mb")
    if not is_number(peak) or not is_number(estimate) or estimate <= 0 or abs(peak / estimate - 1) <= FAR:
        return ""
    side = "above" if peak > estimate else "below"
    why = f": {memory['why']}" if memory.get("why") else "."
    share = f"{abs(peak / estimate - 1):.0%}".replace("%", " %")
    return f"The peak of memory, {peak:,.0f} MB, was {share} {side} the estimate of {estimate:,.0f} MB{why}"
