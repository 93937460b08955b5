"""The end of a run: adapters in their folders, final scores beside the base's, the record and the pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from inlay.evaluation.score import Scored, score
from inlay.files import finite, write_json, write_text
from inlay.reporting.card import write_card
from inlay.reporting.report import write_report
from inlay.training.learner import Learner

from .added_cost import added_cost
from .command import command_of, command_parts
from .context import Context
from .outcome import Final, final_lines
from .progress import Progress
from .record import Record
from .samples import samples
from .session import Session

__all__ = ["Measure", "finish"]

SHOWN = 3
"""Final rows whose answers are written out in full."""

Measure = Callable[[Context, Sequence[Progress]], Mapping[str, Any]]
"""Measures the learners once all else is done; what it returns is kept in run.json."""


def finish(context: Context, session: Session, record: Record, measure: Measure | None = None) -> dict[str, Any]:
    """Load the best weights into each adapter, save and score it, and write run.json; returns what is printed.

    Raises: OSError where the disk is full.
    """
    outcomes, written = _scored(context, session)
    for name, own in session.progress.items():
        for line in (_why_diverged(context, own) if own.learner.diverged else "", outcomes[name].notice()):
            if line:
                context.notice(line, name)
    parts = {name: finite(record.own(own)) for name, own in session.progress.items()}
    results = {name: finite(record.own_result(own) | outcomes[name].result()) for name, own in session.progress.items()}
    for name, final in outcomes.items():
        if lines := final_lines(final, context.final, context.dataset.final, context.encoder):
            write_text(context.folder.final(name), lines)
        confusion = final.confusion()
        parts[name] |= (
            results[name] | {"samples": written.get(name, [])} | ({"confusion": confusion} if confusion else {})
        )
    shared = finite(record.shared_result())
    result = record.joined(shared, results)
    whole = record.joined(finite(record.shared(record.status())) | shared | {"result": result}, parts)
    if not context.several and not session.learners[0].diverged:
        whole["cost"] |= finite(_added(context, session.learners[0]))
    _write_pages(context, session, record, whole)
    if measure is not None:
        whole |= finite(dict(measure(context, [*session.progress.values()])))
    write_json(context.folder.record, whole)
    return result


def _scored(context: Context, session: Session) -> tuple[dict[str, Final], dict[str, list[dict[str, str]]]]:
    """Save the last and the best adapters, and score the best; returns scores and some answers, by learner."""
    bank, folder = context.bank, context.folder
    with ExitStack() as averaged:
        for name, own in session.progress.items():
            averaged.enter_context(own.learner.averaged_weights())
            context.save(name, folder.last(name))
            if own.best.best_step is not None:
                own.learner.load_weights(own.best.weights)
            context.save(name, folder.best(name))
        names = [*session.progress]
        scored = _final_scores(context, names)
        session.peaks.note("scoring")
        rows = context.dataset.final.numbered(context.final.first(SHOWN).samples)
        on_message, limit = context.on_message, context.limit
        shown = [] if context.several else names  # only the report of a run of one shows them
        written = {name: samples(bank, name, context.rows_of(name).encoder, rows, on_message, limit) for name in shown}
    return {name: Final(scored, name, context.metric) for name in names}, written


def _final_scores(context: Context, names: Sequence[str]) -> dict[str | None, Scored]:
    """The base and each learner on the final rows: those with virtual tokens at one place in the same forwards."""
    if not len(context.final):
        return {}
    groups: dict[str, list[str | None]] = {context.settings.virtual_tokens_at: [*context.compared]}
    for name in names:
        place = context.plans[name].virtual_tokens_at or context.settings.virtual_tokens_at
        groups.setdefault(place, []).append(name)
    found: dict[str | None, Scored] = {}
    for place, group in groups.items():
        if group:
            found |= score(context.bank, context.rows_at(place).final, group, context.budget)
    return found


def _write_pages(context: Context, session: Session, record: Record, whole: dict[str, Any]) -> None:
    """A card beside each adapter, whose size goes into `whole`; of a run of one learner, the report."""
    for name, own in session.progress.items():
        folder = context.folder.best(name)
        size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".md")
        part: Mapping[str, Any] = whole["learners"][name] if context.several else whole
        part["cost"]["file_bytes"] = size
        alone = record.alone(own, whole)
        write_card(folder, alone, command_of(alone, portable=True))
    if not context.several:
        write_report(context.folder.path, whole, command_parts(whole))


def _added(context: Context, learner: Learner) -> dict[str, Any]:
    """What the tokens cost that an adapter adds to each row; nothing where it adds none."""
    examples, recompute = context.rows_of(learner.plan.name).prepared.examples, context.settings.gradient_checkpointing
    with learner.averaged_weights():
        found = added_cost(context.bank, learner, examples, context.budget, context.task, recompute)
    return {} if found is None else {"added": found}


def _why_diverged(context: Context, own: Progress) -> str:
    learner = own.learner
    batch = learner.suspects or [e.sample for e in learner.batch(context.examples_at)]
    return (
        f"{learner.stopped} ({learner.cause}): loss {learner.loss:.3g}, gradient norm {learner.norm:.3g} "
        f"in rows {context.dataset.where(batch)}. The adapter of step {own.kept_step} is kept. Try a lower "
        "--lr or --warmup 0.1."
    )
