"""What becomes of the learners of a run when people ask something of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from inlay.errors import DataError, UsageError
from inlay.training.plan import Course, Plan
from inlay.values import fields_of

from .asking import Ask
from .context import Context
from .progress import Progress
from .settings import check_place

__all__ = ["add_clone", "clone_name", "obey"]


def obey(ask: Ask, context: Context, progress: Mapping[str, Progress], add: Callable[[Sequence[str]], None]) -> None:
    """Do what is asked between two steps; what cannot be done is said, and the run goes on."""
    try:
        _obey(ask, context, progress, add)
    except (UsageError, DataError) as error:
        context.on_message(f"{ask.what} {ask.name}: {error}")


def add_clone(ask: Ask, context: Context, known: Collection[str]) -> None:
    """The plan of a clone, where a checkpoint has a learner of its name."""
    if ask.what == "clone" and (name := clone_name(ask)) in known and name not in context.plans:
        context.add(_clone(ask, context.plans[ask.name]))


def _obey(ask: Ask, context: Context, progress: Mapping[str, Progress], add: Callable[[Sequence[str]], None]) -> None:
    if ask.name not in context.plans:
        raise UsageError(f"no contender is called {ask.name!r}", f"There are {', '.join(context.plans)}.")
    if ask.what == "clone":
        plan = _clone(ask, context.plans[ask.name])
        if plan.name not in context.plans:
            plan.method.check_fit(plan.method.sites(context.bank.base))
            context.add(plan)
            add([plan.name])
            context.on_message(f"{plan.name} enters: {ask.name} with {_words(ask)}")
        return
    own = progress.get(ask.name)
    if own is None:
        raise UsageError("it has not begun", "Wait until it enters the stream.")
    if ask.what == "stop":
        if not own.learner.live:
            raise UsageError(f"it has stopped already ({own.learner.stopped})", "There is nothing to stop.")
        own.learner.stop("stopped by hand")
        context.on_message(f"{ask.name}: stopped by hand")
        return
    if own.learner.live or own.learner.diverged or own.learner.step >= own.learner.total:
        raise UsageError(f"it cannot go on ({own.learner.stopped or 'it is training'})", "Clone it instead.")
    own.learner.extend()
    own.kept = True
    context.on_message(f"{ask.name}: goes on after step {own.learner.step}")


def _clone(ask: Ask, plan: Plan) -> Plan:
    """The plan with other settings, of its method or its course. Raises: UsageError naming what there is."""
    course = {f.name for f in dataclasses.fields(Course)} - {"steps", "epochs"}
    method = {f.name for f in fields_of(type(plan.method))}
    for name in ask.settings:
        if name not in course | method:
            raise UsageError(f"{ask.name} has no setting {name!r}", f"Settings: {', '.join(sorted(course | method))}.")
    if not ask.settings:
        raise UsageError("a clone without other settings would be the same again", "Add --set lr=… or another.")
    inner = dataclasses.replace(plan.method, **{n: v for n, v in ask.settings.items() if n in method})
    outer = {n: v for n, v in ask.settings.items() if n in course and n not in method}
    check_place(inner, outer.get("virtual_tokens_at"))
    return dataclasses.replace(plan, name=clone_name(ask), method=inner, **outer)


def clone_name(ask: Ask) -> str:
    """What the clone is called: the same for the same ask, so that a resumed run finds it again."""
    words = "-".join(f"{name}{value}" for name, value in ask.settings.items())
    return f"{ask.name}+{''.join(c if c.isalnum() or c in '._+-' else '_' for c in words)}"


def _words(ask: Ask) -> str:
    return ", ".join(f"{name} {value}" for name, value in ask.settings.items())
