"""A step of a run in several processes: the first gives each some segments, and adds up what they make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.data.encode import Example
from inlay.data.targets import Targeted
from inlay.errors import InlayError, UsageError
from inlay.methods.table import described, made_again
from inlay.runtime.forward import Segment
from inlay.runtime.memory import TokenBudget
from inlay.runtime.processes import Processes
from inlay.training.gradients import Step, StepLosses, Work
from inlay.training.learner import Learner
from inlay.training.plan import Course, Plan

from .state import pack, unpack

__all__ = ["Shared", "agreed", "all_values", "do_share", "read_plan", "read_segments"]

KINDS = {"Example": Example, "Targeted": Targeted}
"""What a segment's example may be."""


class Shared:
    """What the first process does: it alone draws rows, updates, scores, writes and decides.

    The others hold the same base and learners. In each step they get their segments and the learners' values, and give
    the gradients of these segments, so that nothing of theirs can drift.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes, self.size = processes, processes.size
        self._known: list[Learner] = []

    def open(self, how: Mapping[str, Any]) -> None:
        self._processes.tell({"open": dict(how)})

    def gradients(self, step: Step, budget: TokenBudget, work: Work) -> StepLosses:
        """Raises: InlayError naming the process that could not do its share, or has ended; whatever `work` raises."""
        fresh = self._fresh(step.learners)
        try:
            return self._gradients(step, budget, work, fresh)
        except BaseException:  # the others are at another place than this process
            self._processes.leave()
            raise

    @property
    def ready(self) -> bool:
        """Whether the others have opened the base and wait for the next step."""
        return bool(self._known) and not self._processes.over

    def _gradients(
        self, step: Step, budget: TokenBudget, work: Work, fresh: Sequence[tuple[Learner, dict[str, Any]]]
    ) -> StepLosses:
        self._add(step.learners, fresh)
        dealt = deal([len(segment.example.ids) for segment in step.segments], self.size)
        shares = [[step.segments[n] for n in own] for own in dealt]
        self._processes.tell({"step": _words(step, shares, budget)})
        replies = do_share(self._processes, step.learners, budget, lambda: work(shares[0]))
        for number, reply in enumerate(replies[1:], 1):
            for cut in reply["cuts"]:
                budget.backed_off.append({**cut, "process": number})
                budget.on_message(
                    f"process {number}: {cut['why']}: {cut['to']} tokens at once in place of {cut['from']}"
                )
        budget.tokens = min(reply["tokens"] for reply in replies)
        return _joined(step, replies)

    def _fresh(self, live: Sequence[Learner]) -> list[tuple[Learner, dict[str, Any]]]:
        """The learners that the others do not have, in words. Raises: UsageError where they cannot make one."""
        known = {id(learner) for learner in self._known}
        return [(learner, _learner_words(learner)) for learner in live if id(learner) not in known]

    def _add(self, live: Sequence[Learner], fresh: Sequence[tuple[Learner, dict[str, Any]]]) -> None:
        """Let the others make the learners that are new, and forget those that have stopped."""
        if not fresh and len(live) == len(self._known):
            return
        names = [learner.plan.name for learner in live]
        threads = torch.get_num_threads()
        self._processes.tell({"learners": {"live": names, "new": [words for _, words in fresh], "threads": threads}})
        agreed(self._processes, dict)
        self._processes.share(all_values([learner for learner, _ in fresh]))
        self._known = list(live)


def deal(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """The numbers of segments of these `sizes` (tokens) for each process: the longest first, each to the process that
    has the fewest tokens yet. A process may get none."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        least = tokens.index(min(tokens))
        shares[least].append(number)
        tokens[least] += sizes[number]
    return [sorted(share) for share in shares]


# ---- what every process does at the same time


def agreed(processes: Processes, work: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What `work` gives in each process, in words. Where it fails in one, all of them raise, and are done.

    Raises: InlayError naming the process; in that one, whatever `work` raises.
    """
    failure: BaseException | None = None
    try:
        own = work()
    except BaseException as error:
        failure, own = error, {"failed": _why(error)}
    replies = processes.gather(own)
    failed = [(number, reply["failed"]) for number, reply in enumerate(replies) if "failed" in reply]
    if not failed:
        return replies
    processes.leave()
    if failure is not None:
        raise failure
    number, (what, remedy) = failed[0]
    raise InlayError(f"process {number} failed: {what}", remedy)


def do_share(
    processes: Processes, learners: Sequence[Learner], budget: TokenBudget, work: Callable[[], StepLosses]
) -> list[dict[str, Any]]:
    """Take the first process's values, do this process's part of a step, and give the first one the sums of gradients;
    returns what each process says of its part. Raises: as `agreed`."""
    processes.share(_moving(learners))
    before = len(budget.backed_off)
    replies = agreed(processes, lambda: _reply(work(), learners, budget, before))
    there = [any(marks) for marks in zip(*(reply["gradients"] for reply in replies), strict=True)]
    trained = [p for own in learners for p in own.parameters]
    processes.add_up([_gradient(p) for p, has in zip(trained, there, strict=True) if has])
    return replies


def _reply(losses: StepLosses, learners: Sequence[Learner], budget: TokenBudget, before: int) -> dict[str, Any]:
    has = [p.grad is not None for own in learners for p in own.parameters]
    said = {"gradients": has, "tokens": budget.tokens, "cuts": budget.backed_off[before:]}
    return {"means": losses.means, "suspects": losses.suspects, **said}


def _gradient(parameter: nn.Parameter) -> Tensor:
    """That of this process's segments: zero where they had none, which is no gradient only if nobody's had."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _joined(step: Step, replies: Sequence[Mapping[str, Any]]) -> StepLosses:
    means = {name: sum((reply["means"][name] for reply in replies), 0.0) for name in step.counts}
    suspects: dict[str, list[int]] = {}
    for name in step.counts:
        found = {sample for reply in replies for sample in reply["suspects"][name]}
        own = [s.example.sample for s in step.segments if s.route == name]
        suspects[name] = [sample for sample in own if sample in found]
    return StepLosses(means, suspects)


def all_values(learners: Sequence[Learner]) -> list[Tensor]:
    """Everything that adapters hold beside their constants, trained or not."""
    return [p for learner in learners for own in learner.adapter.params.values() for p in own.values()]


def _moving(learners: Sequence[Learner]) -> list[Tensor]:
    """What a step may have changed: what is trained, and all that methods change themselves."""
    rest = [
        p
        for learner in learners
        for part in learner.adapter.parts
        if part.method.changes_values
        for own in part.params.values()
        for p in own.values()
        if not p.requires_grad
    ]
    return [*(p for learner in learners for p in learner.parameters), *rest]


def _why(error: BaseException) -> tuple[str, str]:
    """What failed, and the remedy."""
    if isinstance(error, InlayError):
        return error.what, error.remedy
    if isinstance(error, MemoryError):
        return "out of memory", "Lower --tokens-at-once or --max-length."
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", ""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:200]}", ""


# ---- words for it


def _words(step: Step, shares: Sequence[Sequence[Segment]], budget: TokenBudget) -> dict[str, Any]:
    return {
        "shares": [[_segment_words(segment) for segment in share] for share in shares],
        "counts": dict(step.counts), "where": step.where, "recompute": step.recompute, "tokens": budget.tokens,
    }  # fmt: skip


def _segment_words(segment: Segment) -> dict[str, Any]:
    example = segment.example
    fields = {field.name: getattr(segment, field.name) for field in dataclasses.fields(segment)}
    return fields | {"example": vars(example), "kind": type(example).__name__}


def read_segments(words: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """The segments of one share."""
    found = []
    for own in words:
        listed = {n: tuple(value) if isinstance(value, list) else value for n, value in own["example"].items()}
        example = KINDS[own["kind"]](**listed)
        found.append(Segment(**{**{n: value for n, value in own.items() if n != "kind"}, "example": example}))
    return found


def _learner_words(learner: Learner) -> dict[str, Any]:
    """What another process makes the same learner of; its values follow. Raises: UsageError for methods of others."""
    plan = learner.plan
    course = {field.name: getattr(plan, field.name) for field in dataclasses.fields(Course)} | {"lr": plan.rate}
    try:
        methods = pack(described(learner.adapter.methods), {})
    except KeyError:
        titles = ", ".join(method.title for method in learner.adapter.methods)
        what = f"{plan.name!r} has a method that is not Inlay's own ({titles}), and other processes cannot make it"
        raise UsageError(what, "Train it in one process.") from None
    return {"name": plan.name, "course": course, "methods": methods, "rows": learner.rows}


def read_plan(words: Mapping[str, Any]) -> Plan:
    """The plan of a learner; its `method` is the list of its adapter's parts."""
    return Plan(words["name"], made_again(unpack(words["methods"], {})), **words["course"])
