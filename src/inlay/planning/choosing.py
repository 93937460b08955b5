"""Which method a plan proposes, and why: the first in a list of preferences that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from inlay.data.yaml import read_yaml

from .answers import Answer
from .settings import Limits

__all__ = ["Choice", "choose"]

LIST = Path(__file__).parent / "order.yaml"


@dataclass(frozen=True)
class Choice:
    """The `answer` that is proposed, None where nothing fits; `why` are sentences."""

    answer: Answer | None
    why: tuple[str, ...]


@cache
def preferences() -> tuple[Mapping[str, Any], ...]:
    """The methods that a plan proposes, in their order, with the reasons."""
    return tuple(read_yaml(LIST.read_text(encoding="utf8")))


def choose(found: Sequence[Answer], limits: Limits) -> Choice:
    """The first preference that fits, in the largest size up to its usual one; else the fitting answer that trains the
    most; else none, with what stands in the way."""
    passed: list[str] = []
    for preference in preferences():
        own = [answer for answer in found if answer.candidate.method == preference["method"]]
        if preference.get("free_latency") and limits.token_ms is not None:
            continue
        usual = next((answer.cost.trained for answer in own if not answer.candidate.set), 0)
        fitting = [answer for answer in own if answer.fits and answer.cost.trained <= usual]
        if fitting:
            best = max(fitting, key=lambda answer: answer.cost.trained)
            return Choice(best, (_because(best, preference["why"]), *passed, *_notes(best, limits)))
        if own:
            least = min(own, key=lambda answer: len(answer.misses))
            passed.append(f"{least.candidate.label} does not fit ({'; '.join(least.misses)}).")
    fitting = [answer for answer in found if answer.fits]
    if fitting:
        best = max(fitting, key=lambda answer: (answer.cost.merges, answer.cost.trained))
        why = "of those that fit, it trains the most"
        return Choice(best, (_because(best, why), *passed, *_notes(best, limits)))
    return Choice(None, ("No method fits.", *passed, *_remedies(found)))


def _because(answer: Answer, why: str) -> str:
    return f"{answer.candidate.label}: {why}."


def _notes(answer: Answer, limits: Limits) -> list[str]:
    """What should be known of the choice."""
    found, cost = [], answer.cost
    if not cost.merges:
        found.append("It stays beside the base: it does not merge.")
    if cost.tokens:
        found.append(f"It takes {cost.tokens} tokens of every row's context.")
    if limits.memory_mb is not None and cost.memory_mb > limits.memory_mb:
        found.append(
            f"A whole step takes {cost.memory_mb:,.0f} MB: with --memory-limit its forwards get smaller, with the same "
            "gradients."
        )
    return found


def _remedies(found: Sequence[Answer]) -> list[str]:
    """What would make one fit, by the limit that fewest answers miss alone."""
    kinds = {miss.partition(":")[0] for answer in found for miss in answer.misses}
    words = {
        "memory": "a smaller --max-length, --dtype bfloat16, --quantize 4bit or --gradient-checkpointing take less "
        "memory",
        "time": "a smaller --limit or fewer --epochs take less time",
        "file": "a larger --file",
        "latency": "a smaller base, or more milliseconds in --serve",
    }
    return [f"What helps: {'; '.join(words[kind] for kind in words if kind in kinds)}."] if kinds else []
