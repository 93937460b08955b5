"""A run's learners in training: steps, scores, checkpoints, and resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from inlay.errors import FormatError, UsageError
from inlay.evaluation.score import score
from inlay.methods.contract import Method
from inlay.methods.table import made_again
from inlay.runtime.memory import current_memory_mb, peak_memory_mb
from inlay.training.learner import Learner
from inlay.training.loop import add_learners, train_steps
from inlay.training.plan import Plan

from .best import BestCheckpoint
from .checkpoint import Checkpoints
from .context import Context
from .metrics_log import MetricsLog
from .obeying import add_clone, obey
from .peaks import Peaks
from .progress import Due, Progress, every
from .signals import Asked, asked_to_stop
from .trackers import Tracker
from .turns import Select, Turns

__all__ = ["MOST", "OnStep", "Session"]

EVALUATIONS = 4
"""Scorings of a learner where nobody says how often; they take about a tenth of its time."""
FEWEST = 32
"""Choosing rows that a scoring takes at least, where nobody says how often there is one."""
MOST = 500
"""Choosing rows that a scoring takes at most, where a rule says when there is one: that many tell 3 points apart."""
SECONDS = 300.0
"""Between two checkpoints, where nobody says how many steps."""
VERSION = 3
"""Of a checkpoint's content."""

OnStep = Callable[[Learner, int], None]


class Session:
    """The learners of a run, from its first step or its last checkpoint to the end.

    `step` counts the steps of the run. All plans start at once, unless `select` says otherwise, and each is scored
    when that is `due`: as the settings have it where it is None.
    """

    def __init__(
        self, context: Context, tracker: Tracker, select: Select | None = None, due: Due | None = None
    ) -> None:
        self.context, self.tracker, self._due_score = context, tracker, due
        self.turns = Turns(context, select)
        self.learners: list[Learner] = []
        self.progress: dict[str, Progress] = {}
        self.step = 0
        self.notices: list[str] = []
        self.interrupted = self.begun = False
        self.checkpoints = Checkpoints(context.folder.checkpoints, context.settings.keep_checkpoints)
        self.peaks = Peaks(context.budget.device)
        self.evaluating = 0.0
        self._log: MetricsLog | None = None
        self._before, self._since = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """From the rows to the last step, scoring left out; of earlier processes, what their checkpoints hold."""
        return self._before + time.perf_counter() - self.context.begun - self.evaluating

    @property
    def live(self) -> bool:
        return any(learner.live for learner in self.learners)

    # ---- learners

    def start(self) -> None:
        """Add the first learners. Raises: UsageError where a method cannot be trained."""
        self.turns.begin(self.context.settings.resume)
        names = self.turns.choose([], self._waiting()).start if self.turns.selects else list(self.context.plans)
        if not names:
            raise UsageError("no learner starts", "Select one plan at least.")
        self._add(names)

    def _add(self, names: Sequence[str], chosen: Mapping[str, Sequence[Method]] | None = None) -> None:
        context = self.context
        plans = [context.plans[name] for name in names]
        known = context.bank.adapters
        added = add_learners(
            context.bank, plans, len(context.prepared.examples), known, context.task, context.examples_at, chosen
        )
        self.learners += added
        self.progress |= {learner.plan.name: self._progress(learner) for learner in added}

    def _progress(self, learner: Learner) -> Progress:
        settings, rows = self.context.settings, self.context.rows_of(learner.plan.name).choosing
        due = self._due_score or every(settings.eval_every or max(1, learner.total // EVALUATIONS))
        if self._due_score is not None:
            rows = rows.first(MOST)
        elif settings.eval_every is None:  # scoring the rows costs a forward each time
            rows = rows.first(max(FEWEST, learner.total * learner.plan.batch_size // 20))
        best = BestCheckpoint(self.context.metric, settings.patience, keeps_rows=self.turns.selects)
        return Progress(learner, best, rows, due)

    def _waiting(self) -> list[Plan]:
        return [plan for name, plan in self.context.plans.items() if name not in self.progress]

    def _choose(self) -> None:
        """Stop and start learners as `select` says."""
        self.turns.turn += 1
        chosen = self.turns.choose([*self.progress.values()], self._waiting())
        for name, why in chosen.stop.items():
            if self.progress[name].learner.live:
                self.progress[name].learner.stop(why)
                self.context.on_message(self.context.named(why, name))
        if chosen.start:
            self._add(chosen.start)
        self._listen()

    def _listen(self) -> None:
        """Do what people ask."""
        for ask in self.turns.asks():
            obey(ask, self.context, self.progress, self._add)

    # ---- resuming

    def resume(self, extend: bool = False) -> bool:
        """Restore the newest whole checkpoint, to `extend` a run that has ended; False where there is none.

        Raises: FormatError where it is of another base, of other learners, or of an earlier version.
        """
        on_message = self.context.on_message
        state = self.checkpoints.newest(on_message)
        if state is None:
            return False
        if state.get("version") != VERSION:
            raise FormatError("the checkpoint was written by another version", "Train into another folder.")
        if state["base"] != self.context.bank.fingerprint:
            raise FormatError("the base is another one than before", "Name the same base, or start afresh.")
        for ask in self.turns.go_on(state["turn"], state["asks"]):
            add_clone(ask, self.context, state["learners"])
        if unknown := [name for name in state["learners"] if name not in self.context.plans]:
            raise FormatError(f"the checkpoint holds the learner {unknown[0]!r}", "Give its plan, or start afresh.")
        if state["threads"] != torch.get_num_threads():
            on_message(f"going on with {state['threads']} threads, as before")
            torch.set_num_threads(state["threads"])
        saved = {name: own["learner"].get("methods") for name, own in state["learners"].items()}
        self._add([*saved], {name: made_again(methods) for name, methods in saved.items() if methods})
        for name, own in state["learners"].items():
            self.progress[name].restore(own)
            learner = self.progress[name].learner
            if extend and not learner.diverged and learner.step < learner.total:
                learner.extend()
        self.context.budget.tokens, self.context.budget.backed_off = state["tokens_at_once"], state["backed_off"]
        self.step, self.notices, self._before = state["step"], state["notices"], state["seconds"]
        torch.set_rng_state(state["random"])
        self._log = MetricsLog(self.context.folder.metrics, state["metrics_log"])
        on_message(f"going on after step {self.step}")
        return True

    def _state(self, metrics_log: int) -> dict[str, Any]:
        budget = self.context.budget
        return {
            "version": VERSION,
            "base": self.context.bank.fingerprint,
            "threads": torch.get_num_threads(),
            "learners": {name: own.state() for name, own in self.progress.items()},
            "step": self.step,
            "turn": self.turns.turn,
            "asks": self.turns.done,
            "tokens_at_once": budget.tokens,
            "backed_off": budget.backed_off,
            "notices": self.notices,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
            "metrics_log": metrics_log,
        }

    # ---- training

    def train(self, on_step: OnStep | None = None) -> None:
        """Train until no learner is live or somebody asks the run to stop; `interrupted` says which.

        `on_step` sees each learner after each of its steps, with its total of steps.
        """
        context = self.context
        self._log = self._log or MetricsLog(context.folder.metrics)
        self.peaks.note("loading")
        self._listen()
        examples, recompute = context.examples_at, context.settings.gradient_checkpointing
        bank, budget = context.bank, context.budget
        steps = train_steps(bank, self.learners, examples, budget, recompute, context.task, context.shares)
        try:
            with asked_to_stop() as asked, closing(steps):
                while (stepped := self._next(steps)) is not None:
                    self._after(stepped, on_step)
                    if not self.live or self._due(asked):
                        self._keep()
                    if asked.yes and self.live:
                        self.interrupted = True
                        break
        finally:
            self._log.close()

    def _next(self, steps: Iterator[list[Learner]]) -> list[Learner] | None:
        with self.turns.work("step"):
            return next(steps, None)

    def _after(self, stepped: Sequence[Learner], on_step: OnStep | None) -> None:
        self.begun = True
        self._log_steps([self.progress[learner.plan.name] for learner in stepped])
        if on_step is not None:
            for learner in stepped:
                on_step(learner, learner.total)
        self._choose()

    def _log_steps(self, stepped: Sequence[Progress]) -> None:
        """Log the step of each learner that took it, and score those whose turn it is."""
        seconds = self.seconds
        tokens = {own.name: own.advance(seconds) for own in stepped}
        if not any(tokens.values()):
            return
        self.step += 1
        self.peaks.note("steps", -(-sum(tokens.values()) // self.context.shares.size))
        for own in stepped:
            if not own.learner.diverged:
                line = self._line(own)
                assert self._log is not None
                self._log.add(line)
                self.tracker.add(self.step, line, f"{own.name}/" if self.context.several else "")

    def _line(self, own: Progress) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        learner, device = own.learner, self.context.budget.device
        line: dict[str, Any] = {"learner": own.name, "step": learner.step, "loss": learner.loss}
        line |= {"tokens": learner.tokens, "norm": learner.norm, "lr": learner.rate, "seconds": own.seconds}
        line |= {"memory_mb": current_memory_mb(), "peak_memory_mb": peak_memory_mb()}
        if device.type == "cuda":
            line |= {"gpu_memory_mb": current_memory_mb(device)}
            line |= {"peak_gpu_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20}
        return line | ({"heldout": self._evaluate(own)} if own.score_due else {})

    def _evaluate(self, own: Progress) -> dict[str, float]:
        """Score a learner on its held-out rows, keep it if it is the best so far, and stop it early if it is not."""
        learner, best, begun = own.learner, own.best, time.perf_counter()
        with learner.averaged_weights(), self.turns.work("score", own.name):
            scored = score(self.context.bank, own.rows, [own.name], self.context.budget)[own.name]
            if best.note(learner.step, own.mean_loss(), scored, learner.weights()):
                self._keep_best(own)
        if not learner.live and not math.isfinite(scored.scores["loss"]):
            learner.diverge("the held-out loss is no number", learner.step)
        self.evaluating += time.perf_counter() - begun
        self.peaks.note("scoring")
        if advice := best.overfitting():
            advice = self.context.named(advice, own.name)
            self.notices.append(advice)
            self.context.on_message(advice)
        if best.out_of_patience and learner.live:
            learner.stop("stopped early")
            why = f"stopped early: {best.metric} has not been better since step {best.best_step}"
            self.context.on_message(self.context.named(why, own.name))
        return scored.scores

    # ---- checkpoints

    def _keep_best(self, own: Progress) -> None:
        """Write the adapter as its best so far; where the disk is full, the checkpoints still hold it."""
        try:
            self.context.save(own.name, self.context.folder.best(own.name))
        except OSError as error:
            why = f"the best adapter is not written yet ({error.strerror or error}); training goes on"
            self.context.on_message(self.context.named(why, own.name))

    def _due(self, asked: Asked) -> bool:
        if asked.yes:
            return True
        if (every := self.context.settings.checkpoint_every) is not None:
            return self.step % every == 0
        return time.perf_counter() - self._since > SECONDS

    def _keep(self) -> None:
        """Write a checkpoint; where the disk is full, the one before stays and training goes on."""
        assert self._log is not None
        self._since = time.perf_counter()
        try:
            self.checkpoints.write(self.step, self._state(self._log.flush()))
        except OSError as error:
            stays = "the one before stays" if self.checkpoints.files() else "there is none yet"
            self.context.on_message(f"no checkpoint at step {self.step} ({error.strerror or error}); {stays}")
            return
        for own in self.progress.values():
            if not len(own.rows):
                self._keep_best(own)
