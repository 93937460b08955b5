"""Which task a run has, and the head that its base needs for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from inlay.bases.folders import checked_config
from inlay.bases.heads import Head, writes_text
from inlay.bases.load import Base, resolve
from inlay.data.encode import Example
from inlay.data.prompting import Prompting
from inlay.data.targets import TargetedExamples
from inlay.data.template import Template
from inlay.errors import UsageError

from .dataset import Dataset
from .settings import Settings

__all__ = ["fitting_task", "head_of", "number_notice", "task_notices", "with_task"]

FAR = 20
"""How far numbers may lie from 0, and how many times wider or narrower than 1 they may spread."""


def head_of(template: Template) -> Head | None:
    """The head that rows of a template need; None where the base writes the answers itself."""
    return None if template.task == "generate" else Head(template.task, tuple(template.verbalizer))


def with_task(settings: Settings, prompting: Prompting | None) -> tuple[Settings, list[str]]:
    """The settings with a task, and what to say where nobody chose it: that of the adapter to go on from, else to write
    text where the base does, else to classify.

    Raises: UsageError where an adapter was trained for another task, or an encoder is to answer in words.
    """
    if prompting is not None:
        task = prompting.template.task
        if settings.task not in (None, task):
            what = f"the adapter of --from was trained to {task}, not to {settings.task}"
            raise UsageError(what, "Leave --task out.")
        return replace(settings, task=task), []
    if fitting_task(settings.task, settings.base) == (settings.task or "generate"):
        return settings, []
    if settings.verbalizer is not None:
        what = f"base {settings.base} does not write text, and a verbalizer is for answers in words"
        raise UsageError(what, "Leave it out, so that a head is trained, or choose a causal base.")
    why = "the base does not write text: a head is trained for it (--task classify)"
    return replace(settings, task="classify"), [why]


def fitting_task(task: str | None, base: str) -> str:
    """The task that people named, else what the base is for; bases in GGUF files write text."""
    if task is not None or base == "smollm2" or Path(base).suffix.lower() == ".gguf":
        return task or "generate"
    return "generate" if writes_text(checked_config(resolve(base))) else "classify"


def number_notice(examples: Sequence[Example]) -> str:
    """What to say of numbers that a head, which starts near 0, takes long to reach; "" of others."""
    if not isinstance(examples, TargetedExamples) or not len(examples.targets):
        return ""
    mean, spread = float(examples.targets.mean()), float(examples.targets.std())
    if abs(mean) <= FAR and 1 / FAR <= spread <= FAR:
        return ""
    return (
        f"the numbers have a mean of {mean:.3g} and a spread of {spread:.3g}: a head starts near 0, and takes long to "
        "learn such numbers. Scale them to a spread near 1"
    )


def task_notices(base: Base, dataset: Dataset) -> list[str]:
    """What should be known of a head that was drawn at random."""
    if not base.fresh:
        return []
    return [
        f"the base has no head to {dataset.template.task} with: adapters train one from a random start. The base is "
        "not scored, since its own would be chance"
    ]
