"""What virtual tokens and prefixes cost a run, beside LoRA and the base alone on the same rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import torch

from inlay.bank.bank import Bank
from inlay.bases.heads import can_write
from inlay.data.encode import Example
from inlay.data.typical import typical_rows
from inlay.errors import InlayError
from inlay.methods.lora import LoRA
from inlay.runtime.forward import Segment
from inlay.runtime.held import held_bytes
from inlay.runtime.latency import token_times
from inlay.runtime.memory import MB, TokenBudget
from inlay.runtime.tasks import GENERATE, Task
from inlay.sites.positions import positions_of
from inlay.training.learner import Learner
from inlay.training.loop import add_learners
from inlay.training.plan import Plan

from .timing import Clock, base_seconds, gradient_seconds

__all__ = ["added_cost"]

TOKENS = 192
"""Of the step that is timed, virtual ones left out."""
NEW = 8
"""Tokens of an answer."""
ROUNDS, SECONDS = 3, 5.0
"""Rounds in which all take their turn, the first of which does not count; none begins after so many seconds."""
MANY = 2**20
"""Positions of a base that bounds none."""
NAMES = ("adapter", "lora", "base")


def added_cost(
    bank: Bank, learner: Learner, examples: Sequence[Example], budget: TokenBudget, task: Task = GENERATE,
    recompute: bool = False, clock: Clock = time.perf_counter,
) -> dict[str, Any] | None:  # fmt: skip
    """What the learner's adapter costs, LoRA of rank 8, and the base with nothing trained, on some of `examples`.

    Of each: `step_seconds` of forward and backward (median of paired rounds) and `times` that of the base, `held_mb`
    of a row until its backward, `token_ms` of an answer. None where the adapter adds no tokens; `why` alone where they
    cannot be compared. The adapter, and torch's generators, stay as they were.
    """
    own = learner.adapter
    if not own.virtual_length + own.prefix_length:
        return None
    rows = typical_rows(examples, TOKENS)
    state = torch.get_rng_state()
    name = "lora"
    while name in bank.adapters:
        name += "_"
    plan = Plan(name, LoRA(), steps=1, batch_size=len(rows), lr=1e-6, optimizer="adamw")
    try:
        (lora,) = add_learners(bank, [plan], len(rows), task=task, examples=rows)
        learners = {"adapter": learner, "lora": lora, "base": None}
        return _compared(bank, learners, rows, budget, task, recompute, clock)
    except (InlayError, MemoryError, RuntimeError) as error:  # LoRA may not fit this base; the run itself is done
        return {"why": str(error).partition("\n")[0] or type(error).__name__}
    finally:
        if name in bank.adapters:
            bank.remove(name)
        torch.set_rng_state(state)


def _compared(
    bank: Bank, learners: Mapping[str, Learner | None], rows: Sequence[Example], budget: TokenBudget, task: Task,
    recompute: bool, clock: Clock,
) -> dict[str, Any]:  # fmt: skip
    plain = task.name == "generate"  # a head of the base's own may not be there
    names = [name for name in NAMES if learners[name] is not None or plain]
    writes = plain and can_write(bank.model)
    steps: dict[str, list[float]] = {name: [] for name in names}
    answers: dict[str, list[float]] = {name: [] for name in names}
    begun, asked = clock(), _asked(bank, rows, learners)
    for number in range(ROUNDS):
        if number > 1 and clock() - begun > SECONDS:
            break
        for name in names:
            own = learners[name]
            if own is None:
                steps[name].append(base_seconds(bank, rows, budget, task, recompute, clock))
            else:
                steps[name].append(gradient_seconds(bank, own, rows, budget, task, recompute, clock))
            if writes:
                route = None if own is None else own.plan.name
                answers[name].append(mean(token_times(bank, route, asked, NEW + 1, clock=clock)[1:]))
    adapter = learners["adapter"]
    assert adapter is not None
    return {
        "virtual_tokens": adapter.adapter.virtual_length, "prefix_tokens": adapter.adapter.prefix_length,
        "rows": len(rows), "row_tokens": sum(len(row.ids) for row in rows) / len(rows),
        "costs": {name: _cost(bank, learners[name], rows, task, steps, answers, name) for name in names},
    }  # fmt: skip


def _cost(
    bank: Bank, learner: Learner | None, rows: Sequence[Example], task: Task, steps: Mapping[str, list[float]],
    answers: Mapping[str, list[float]], name: str,
) -> dict[str, float | None]:  # fmt: skip
    """Of one of them; the first round is left out."""
    own, base = steps[name][1:], steps.get("base", [])[1:]
    times = median(a / b for a, b in zip(own, base, strict=True)) if base else None
    held = None if learner is None else _held_mb(bank, learner, rows[len(rows) // 2], task)
    token = 1e3 * median(answers[name][1:]) if answers[name] else None
    return {"step_seconds": median(own), "times": times, "held_mb": held, "token_ms": token}


def _held_mb(bank: Bank, learner: Learner, row: Example, task: Task) -> float:
    """MiB that a row's forward saves for its backward."""
    adapter = learner.adapter
    constants = [value for part in adapter.parts for value in part.constants.values()]
    known = [*bank.model.parameters(), *bank.model.buffers(), *adapter.parameters(), *constants]
    segment = Segment(learner.plan.name, row, seed=learner.plan.seed, step=0)
    with torch.enable_grad():
        return held_bytes(known, lambda: task.losses(bank, [segment])[0]).saved / MB


def _asked(bank: Bank, rows: Sequence[Example], learners: Mapping[str, Learner | None]) -> Example:
    """What the answers follow: a row of middle length, cut to the base's positions."""
    adapters = [own.adapter for own in learners.values() if own is not None]
    added = max(one.virtual_length + one.prefix_length for one in adapters)
    room = (positions_of(bank.model) or MANY) - added - NEW - 1
    ids = rows[len(rows) // 2].ids[: max(1, room)]
    return Example(ids, (False,) * len(ids), 0)
