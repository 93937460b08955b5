"""What an adapter of a method costs without a step of training: it is made, counted, and forgotten."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inlay.bank.bank import Bank
from inlay.bases.memory import free_memory
from inlay.data.encode import Example
from inlay.errors import UsageError
from inlay.methods.contract import Method
from inlay.runs.estimate import estimate_mb
from inlay.runs.fitting import fit_of
from inlay.runs.settings import Settings
from inlay.runtime.memory import MB, TokenBudget, current_memory_mb
from inlay.runtime.tasks import Task
from inlay.training.learner import Learner
from inlay.training.loop import add_learners
from inlay.training.plan import Plan

from .candidates import Candidate

__all__ = ["Cost", "Ground", "cost_of", "trial"]

NAME = "planned"
WRITTEN = 20_000_000
"""Parameters up to which the file is written to be measured; beyond, it is four bytes for each."""
COPIES = 12
"""Bytes a parameter's training takes, as multiples of a parameter, where an adapter may be too large to try."""
STATES = 7
"""Copies of its parameters that a step holds: themselves, gradients, the optimizer's moments, those of before."""
LONG = 1000
"""Steps of the course that a trial is the beginning of."""


@dataclass(frozen=True)
class Ground:
    """What all candidates are tried on: the base, its tokenizer, the rows, and the memory in use without any."""

    settings: Settings
    bank: Bank
    tokenizer: Any
    task: Task
    examples: Sequence[Example]
    rest_mb: float

    @property
    def budget(self) -> TokenBudget:
        return TokenBudget(self.settings.tokens_at_once, None, next(self.bank.model.parameters()).device)


@dataclass(frozen=True)
class Cost:
    """`trained` numbers, a file of `file_mb`, `tokens` of every row's context; whether it `merges` into a plain model.

    Training as it will be takes `memory_mb` in all, one row at a time `least_mb`.
    """

    trained: int
    file_mb: float
    tokens: int
    merges: bool
    memory_mb: float
    least_mb: float


@contextmanager
def trial(
    ground: Ground, candidate: Candidate, examples: Sequence[Example], batch: int | None = None
) -> Iterator[Learner]:
    """A learner of the candidate over these examples, `batch` a step, which is gone afterwards with everything that it
    changed.

    Raises: UsageError where it cannot act on this base, or only a user can say its settings.
    """
    settings, state = ground.settings, torch.get_rng_state()
    method = candidate.make().with_tokenizer(ground.tokenizer)
    method.check_fit(method.sites(ground.bank.base))
    fit_of(ground.bank.model, method, settings.max_length)
    _check_size(ground, method)
    course = {"optimizer": settings.optimizer, "batch_size": batch or settings.batch_size, "seed": settings.seed}
    plan = Plan(NAME, method, steps=LONG, lr=1e-6, **course)
    try:
        (learner,) = add_learners(ground.bank, [plan], len(examples), task=ground.task, examples=examples)
        yield learner
    finally:
        if NAME in ground.bank.adapters:
            ground.bank.remove(NAME)
        torch.set_rng_state(state)


def _check_size(ground: Ground, method: Method) -> None:
    """Raises: UsageError where a method that trains the whole base is more than this machine holds."""
    base = ground.bank.model
    own = {id(p) for site in method.sites(ground.bank.base) for p in site.module.parameters(recurse=False)}
    if any(id(p) not in own for p in base.parameters()):
        return
    needed = 4 * COPIES * sum(p.numel() for p in base.parameters())
    if needed > free_memory():
        what = f"training the whole base takes about {needed / MB:,.0f} MB, which is not free here"
        raise UsageError(what, "Plan on a larger machine.")


def cost_of(ground: Ground, candidate: Candidate, like: Cost | None = None) -> Cost:
    """The candidate's cost; `like` is that of the same method in another size, whose memory is known: what a row saves
    for its backward is taken to be the same. Raises: UsageError where the candidate cannot act on this base."""
    with trial(ground, candidate, ground.examples) as learner:
        trained = sum(p.numel() for p in learner.adapter.parameters())
        if like is None:
            memory = _memory(ground, learner, trained)
        else:
            more = STATES * 4 * (trained - like.trained) / MB
            memory = like.memory_mb + more, like.least_mb + more
        tokens = sum(part.prefix_length + part.virtual_length for part in learner.adapter.methods)
        return Cost(trained, _file_mb(ground.bank, trained), tokens, _merges(learner), *memory)


def _memory(ground: Ground, learner: Learner, trained: int) -> tuple[float, float]:
    """MiB of training as it will be, and of a row at a time, beside the base at rest."""
    before = current_memory_mb(ground.budget.device)
    scored = ground.settings.heldout not in ("0", "0.0")
    recompute = ground.settings.gradient_checkpointing
    found = estimate_mb(
        ground.bank, [learner], ground.examples, ground.budget, ground.task, scored=scored, recompute=recompute
    )
    own = ground.rest_mb + 4 * trained / MB - before
    return found["estimate_mb"] + own, found["least_mb"] + own


def _file_mb(bank: Bank, trained: int) -> float:
    if trained > WRITTEN:
        return 4 * trained / MB
    with tempfile.TemporaryDirectory() as folder:
        bank.save(NAME, folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / MB


def _merges(learner: Learner) -> bool:
    """Whether each part says what it makes of the weights of one of its sites; quantized ones take nothing."""
    for part in learner.adapter.parts:
        path, site = next(iter(part.sites.items()))
        if any(one.quantized for one in part.sites.values()):
            return False
        if not (type(part.method).has_form() or type(part.method).has("merge")):
            return False
        try:
            with torch.no_grad():
                part.method.merge(part.at(path, None, {}), site)
        except UsageError:
            return False
    return True
