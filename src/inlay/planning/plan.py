"""A plan: reads the data as a run does, opens the base, tries the methods, and proposes one."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from inlay.bank.bank import Bank, attach
from inlay.bases.load import Base, load_base
from inlay.bases.memory import free_memory
from inlay.data.collisions import LOOKED_AT, collisions
from inlay.data.encode import Example
from inlay.data.typical import typical_rows
from inlay.errors import InlayError, UsageError
from inlay.evaluation.intervals import FEW
from inlay.runs.command import command_parts
from inlay.runs.dataset import Dataset, lengths, load_dataset
from inlay.runs.processes import own_device
from inlay.runs.settings import Settings
from inlay.runs.tasking import head_of, with_task
from inlay.runtime.memory import MB, bound_kernels, current_memory_mb
from inlay.values import fields_of

from .answers import Course, answers, heldout_rows
from .candidates import Candidate, candidates
from .choosing import Choice, choose
from .counting import Cost, Ground, cost_of, trial
from .measuring import LARGE, SMALL, Clock, Line, Pace, step_seconds, token_seconds
from .rows import Material, read_material
from .settings import PlanSettings, limits_of

__all__ = ["plan"]

HEAVY = 0.2
"""Share of the base's parameters beyond which an adapter's own take time whatever the tokens are."""

OnMessage = Callable[[str], None]
OnProgress = Callable[[str, int, int], None]
"""Hears what is done, and how many of how many of it."""


def plan(
    settings: PlanSettings, on_message: OnMessage, on_progress: OnProgress = lambda what, done, total: None,
    clock: Clock = time.perf_counter, only: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """What `plan --json` prints. `only` some methods are compared where it names any.

    Raises: UsageError, DataError or FormatError where settings, data or base are wrong.
    """
    given, why = with_task(settings, None)
    dataset = load_dataset(given)
    bound_kernels()
    base = load_base(given.base, given.dtype, own_device(given.device), given.quantize, head_of(dataset.template))
    bank = attach(base.model)
    for line in (*why, *dataset.notices):
        on_message(line)
    try:
        material = read_material(given, dataset, base, bank)
        ground = _ground(given, base, bank, material)
        return _planned(settings, given, dataset, base, material, ground, on_progress, clock, only)
    finally:
        bank.detach()


def _ground(settings: Settings, base: Base, bank: Bank, material: Material) -> Ground:
    rest = current_memory_mb(base.model.device)
    return Ground(settings, bank, base.tokenizer, material.task, material.examples, rest)


def _planned(
    settings: PlanSettings, given: Settings, dataset: Dataset, base: Base, material: Material, ground: Ground,
    on_progress: OnProgress, clock: Clock, only: tuple[str, ...],
) -> dict[str, Any]:  # fmt: skip
    there = _free_mb(base)
    limits = limits_of(settings)
    limits = limits if limits.memory_mb is not None else dataclasses.replace(limits, memory_mb=there)
    costs, left_out = _counted(ground, candidates(only), on_progress)
    answer = token_seconds(ground, None, limits.rows, clock)
    if answer is None and limits.token_ms is not None:
        raise UsageError("the base writes no text here, so that no token takes time", "Leave the ms out of --serve.")
    tried = {one: cost for one, cost in costs.items() if cost.memory_mb < there} or costs  # the others stay untried
    measured = _measured(ground, tried, answer, limits.rows, settings.seconds, on_progress, clock)
    course = Course(material.steps(given), material.step_tokens(given))
    found = answers(costs, measured.paces, measured.line, measured.base_token, course, limits)
    choice = choose(found, limits)
    return {
        "base": _base_record(base, measured, ground),
        "data": _data_record(dataset, material, given, base.tokenizer),
        "course": {"steps": course.steps, "tokens_a_step": course.tokens, "batch_size": given.batch_size},
        "limits": dataclasses.asdict(limits),
        "heldout": _heldout_record(dataset, settings.disagree / 100),
        "methods": [answer.record() for answer in found],
        "left_out": [{"label": name, "why": why} for name, why in left_out.items()],
        "choice": None if choice.answer is None else choice.answer.record(),
        "why": list(choice.why),
        "warnings": _warnings(dataset, material, costs),
        "command": _command(settings, choice),
    }


def _free_mb(base: Base) -> float:
    """What this process holds and can still take, in MiB, on the base's device."""
    device = base.model.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MB + current_memory_mb(device)
    return free_memory() / MB + current_memory_mb()


# ---- trying


def _counted(
    ground: Ground, tried: list[Candidate], on_progress: OnProgress
) -> tuple[dict[Candidate, Cost], dict[str, str]]:
    """The costs of the candidates that can act on the base, and why the others cannot, each method once.

    Raises: UsageError where none can.
    """
    costs: dict[Candidate, Cost] = {}
    left_out: dict[str, str] = {}
    usual: dict[str, Cost] = {}
    for number, candidate in enumerate(tried):
        on_progress("counting", number, len(tried))
        if candidate.method in left_out:
            continue
        try:
            known = usual.get(candidate.method)
            costs[candidate] = cost_of(ground, candidate, known)
            usual.setdefault(candidate.method, costs[candidate])
        except (InlayError, MemoryError, torch.OutOfMemoryError) as error:
            if not candidate.set:  # another size of a method that can
                left_out[candidate.method] = str(error) or "it does not fit in memory here"
    if not costs:
        name, why = next(iter(left_out.items()))
        raise UsageError(f"no method can act on this base ({name}: {why})", "Choose another base.")
    return costs, left_out


@dataclass(frozen=True)
class _Measured:
    """`paces` by candidate, the first being that of `line`. `first` and `base_token` are seconds of the base's answer,
    None where it writes none."""

    line: Line
    paces: dict[Candidate, Pace]
    first: float | None
    base_token: float | None


def _measured(
    ground: Ground, costs: Mapping[Candidate, Cost], answer: tuple[float, float] | None, rows: int, seconds: float,
    on_progress: OnProgress, clock: Clock,
) -> _Measured:  # fmt: skip
    """Steps, and tokens of answers to so many `rows` at once, of as many of `costs` as `seconds` allow, the first one
    always; `answer` is the base's own."""
    begun, tried = clock(), [*costs]
    one, few, many = (typical_rows(ground.examples, tokens) for tokens in (1, SMALL, LARGE))
    weights = sum(p.numel() for p in ground.bank.model.parameters())
    paces: dict[Candidate, Pace] = {}
    failed: InlayError | None = None
    for number, candidate in enumerate(tried):
        if paces and clock() - begun > seconds:
            break
        on_progress("measuring", number, len(tried))
        whole = not paces or costs[candidate].trained > HEAVY * weights
        served = None if costs[candidate].merges else rows  # merged, a token takes what it takes the base
        try:
            paces[candidate] = _paced(ground, candidate, (one, few, many), whole, served, clock)
        except InlayError as error:  # no memory for a single row
            failed = failed or error
    if not paces:
        assert failed is not None
        raise failed
    small, large = (float(sum(len(row.ids) for row in rows)) for rows in (few, many))
    reference = next(iter(paces.values()))
    line = Line.through((small, reference.step), (large, reference.large or reference.step))
    first, token = (None, None) if answer is None else answer
    return _Measured(line, paces, first, token)


def _paced(
    ground: Ground, candidate: Candidate, rows: Sequence[Sequence[Example]], whole: bool, served: int | None,
    clock: Clock,
) -> Pace:  # fmt: skip
    """The candidate's steps on `rows`: one row, few and many; of the first and the last only where it is `whole`. And a
    token of its answers to as many rows as are `served`."""
    taken: dict[int, float] = {}
    token = None
    for place, own in enumerate(rows):
        if place != 1 and not whole:
            continue
        with trial(ground, candidate, own, len(own)) as learner:
            taken[place] = step_seconds(ground, learner, own, clock)
            if place == 1 and served is not None:
                token = token_seconds(ground, learner.plan.name, served, clock)
    return Pace(taken[1], None if token is None else token[1], taken.get(0), taken.get(2))


# ---- records


def _base_record(base: Base, measured: _Measured, ground: Ground) -> dict[str, Any]:
    return {
        "name": base.name, "parameters": sum(p.numel() for p in base.model.parameters()),
        "dtype": str(base.dtype).removeprefix("torch."), "device": str(base.model.device),
        "quantized": getattr(base.model, "hf_quantizer", None) is not None, "memory_mb": ground.rest_mb,
        "step_seconds": {"fixed": measured.line.fixed, "a_token": measured.line.a_token},
        "first_token_ms": None if measured.first is None else 1e3 * measured.first,
        "token_ms": None if measured.base_token is None else 1e3 * measured.base_token,
    }  # fmt: skip


def _data_record(dataset: Dataset, material: Material, settings: Settings, tokenizer: Any) -> dict[str, Any]:
    scripts, characters = material.writing(tokenizer)
    dropped = {name: count for name, count in material.counts.items() if name.startswith("dropped") and count}
    return {
        "rows": len(dataset.rows), "labels": dataset.labels, "encoded": material.counts["rows"],
        "cut": material.counts.get("cut", 0), "dropped": dropped, "lengths": lengths(material.lengths),
        "max_length": settings.max_length, "scripts": scripts, "characters_a_token": characters,
    }  # fmt: skip


def _warnings(dataset: Dataset, material: Material, costs: Mapping[Candidate, Cost]) -> list[dict[str, Any]]:
    """What is wrong with where virtual tokens would stand, with the `methods` that have some."""
    methods = list(dict.fromkeys(one.method for one in costs if one.make().virtual_length))
    found = collisions(material.encoder, dataset.rows[:LOOKED_AT], bool(methods))
    return [{"text": str(one), "methods": methods, **one.to_dict()} for one in found]


def _heldout_record(dataset: Dataset, disagree: float) -> dict[str, Any]:
    seen, likely = heldout_rows(1.0, disagree)
    there = len(dataset.final)
    points = None if there < FEW else 100 * 1.959964 * (disagree / there) ** 0.5
    return {
        "choosing_rows": len(dataset.choosing), "final_rows": there, "disagree": disagree,
        "rows_for_1_point": seen, "rows_for_1_point_4_of_5": likely, "points_told_apart": points,
    }  # fmt: skip


def _command(settings: PlanSettings, choice: Choice) -> str | None:
    """The `inlay train` command of the choice, quoted for a shell; None where there is none."""
    if choice.answer is None:
        return None
    names = {field.name for field in fields_of(Settings)}
    config: dict[str, Any] = {n: v for n, v in dataclasses.asdict(settings).items() if n in names}
    candidate = choice.answer.candidate
    config = {**config, "method": candidate.method, "set": dict(candidate.set)}
    if not candidate.make().virtual_length:  # a place that a run of this method would refuse
        config["virtual_tokens_at"] = "start"
    if settings.memory is not None:
        config = {**config, "memory_limit": settings.memory}
    return shlex.join(command_parts({"config": config}))
