"""What a run cost and what its rows were, as pairs of name and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .words import label_text, number

__all__ = ["added_costs", "cost_facts", "data_facts"]

LABELS = 20
"""At most, whose rows are listed."""


def cost_facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Steps, time, memory and size; what the record lacks is left out."""
    cost, memory = record.get("cost") or {}, record.get("memory") or {}
    predicted = record.get("predicted") or {}
    made: list[tuple[str, str]] = []

    def add(name: str, value: Any, unit: str = "") -> None:
        if value is not None:
            made.append((name, f"{number(value)}{unit}"))

    add("Steps", record.get("steps"))
    add("Tokens", record.get("tokens"))
    add("Training time", record.get("seconds"), " s")
    add("Predicted before", predicted.get("seconds"), " s")
    add("Time for scoring", record.get("evaluation_seconds"), " s")
    add("Tokens a second", record.get("tokens_per_second"))
    add("Peak memory", record.get("peak_memory_mb"), " MB")
    add("Peak GPU memory", record.get("peak_gpu_memory_mb"), " MB")
    add("Estimated before", memory.get("estimate_mb"), " MB")
    add("Tokens at once", memory.get("tokens_at_once"))
    add("Trained parameters", cost.get("trainable_parameters"))
    if cost.get("base_parameters") and cost.get("trainable_parameters") is not None:
        add("Share of the base", 100 * cost["trainable_parameters"] / cost["base_parameters"], " %")
    add("Size on disk", None if cost.get("file_bytes") is None else cost["file_bytes"] / 2**20, " MB")
    add("Tokens added to each row", cost.get("virtual_tokens") or None)
    add("Prefix keys in each layer", cost.get("prefix_tokens") or None)
    return made


def added_costs(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the tokens cost that the adapter adds to each row, as `words` and `lines` of (name, step, times the base's,
    memory of a row, a token of an answer); None where it adds none."""
    added = (record.get("cost") or {}).get("added") or {}
    costs = added.get("costs") or {}
    if "adapter" not in costs:
        return None
    names = {"adapter": "this adapter", "lora": "LoRA r 8", "base": "base alone"}
    lines = []
    for name, label in names.items():
        if (own := costs.get(name)) is not None:
            shown = [(own.get("step_seconds"), " s"), (own.get("times"), ""), (own.get("held_mb"), " MB"),
                     (own.get("token_ms"), " ms")]  # fmt: skip
            lines.append((label, *("–" if value is None else f"{value:,.3g}{unit}" for value, unit in shown)))
    return {"words": _added_words(added), "lines": lines}


def _added_words(added: Mapping[str, Any]) -> str:
    virtual, prefix = added.get("virtual_tokens") or 0, added.get("prefix_tokens") or 0
    long = float(added.get("row_tokens") or 0)
    parts = [f"{number(virtual)} virtual tokens"] if virtual else []
    parts += [f"{number(prefix)} keys of prefixes in each layer"] if prefix else []
    return f"{' and '.join(parts)} beside rows of {number(long)} tokens in the mean"


def data_facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Counts of rows: how they were split, what was dropped or cut and why, their labels and lengths."""
    data, verbalizer = record.get("data") or {}, (record.get("template") or {}).get("verbalizer")
    names = {
        "rows": "rows to train on", "heldout_rows": "held-out rows", "choosing_rows": "of them to choose the best step",
        "final_rows": "of them for the scores", "duplicates": "rows that stand there more than once",
        "equal_rows": "equal rows, spaces and case apart",
        "heldout_in_training": "held-out rows that are trained on too",
    }  # fmt: skip
    found = {**{key: record.get(key) for key in ("choosing_rows", "final_rows")}, **data}
    made = [(label, number(found[key])) for key, label in names.items() if found.get(key) is not None]
    counts = {k: v for k, v in (record.get("rows") or {}).items() if k != "rows" and v}
    made += [(f"rows {reason}", number(count)) for reason, count in counts.items()]
    labels = list((data.get("labels") or {}).items())
    made += [(f"rows labelled {label_text(label, verbalizer)}", number(count)) for label, count in labels[:LABELS]]
    if len(labels) > LABELS:
        made.append(("labels that are not listed here", number(len(labels) - LABELS)))
    lengths = data.get("lengths") or {}
    ways = (("mean", "tokens in a row, mean"), ("longest", "tokens in the longest row"))
    return made + [(label, number(lengths[key])) for key, label in ways if key in lengths]
