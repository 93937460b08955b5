"""A run under way: contenders with their held-out scores, what is written while they train, and going on with it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from inlay.bank.bank import Bank
from inlay.data.encode import Example
from inlay.errors import FormatError
from inlay.evaluation.score import Items, score
from inlay.runtime.memory import Room, current_memory_mb, peak_memory_mb
from inlay.training.contender import Contender
from inlay.training.loop import go_on

from .checkpoint import Checkpoints
from .folder import RunFolder
from .journal import Journal
from .peaks import Peaks
from .signals import Asked, asked_to_stop
from .trackers import Tracker
from .watch import Watch

__all__ = ["Session"]

SECONDS = 300.0
"""Between two checkpoints, where nobody says how many steps."""

OnStep = Callable[[Contender, int], None]


class Session:
    """One contender, what is known of it, and its folder.

    `seen` are the rows that it is scored on while it trains, every `eval_every` steps; they choose the best. `kept`
    writes an adapter to a folder.
    """

    def __init__(
        self, bank: Bank, contender: Contender, watch: Watch, examples: Sequence[Example], seen: Items,
        room: Room, folder: RunFolder, kept: Callable[[Path], None], eval_every: int,
        checkpoint_every: int | None, keep: int, say: Callable[[str], None], tracker: Tracker, start: float,
    ) -> None:  # fmt: skip
        self.bank, self.contender, self.watch = bank, contender, watch
        self.examples, self.seen, self.room, self.folder = examples, seen, room, folder
        self._kept, self.eval_every, self.checkpoint_every = kept, eval_every, checkpoint_every
        self.checkpoints = Checkpoints(folder.checkpoints, keep)
        self.say, self.tracker = say, tracker
        self.notices: list[str] = []
        self.interrupted = False
        self.begun = False
        self.peaks = Peaks(room.device)
        self._journal: Journal | None = None
        self._before, self._losses, self._tokens = 0.0, [0.0, 0.0], 0
        self._since = time.perf_counter()
        self._start, self.evaluating = start, 0.0

    @property
    def seconds(self) -> float:
        """From the rows to the last step, scoring left out; of earlier processes, what their checkpoints tell."""
        return self._before + time.perf_counter() - self._start - self.evaluating

    # ---- going on

    def resume(self, fingerprint: str, extend: bool = False) -> bool:
        """Take up the newest whole checkpoint, to `extend` a run that has ended; False where there is none.

        Raises: FormatError.
        """
        state = self.checkpoints.newest(self.say)
        if state is None:
            return False
        if state["base"] != fingerprint:
            raise FormatError("the base is another one than before", "Name the same base, or start afresh.")
        if state["threads"] != torch.get_num_threads():
            self.say(f"going on with {state['threads']} threads, as before")
            torch.set_num_threads(state["threads"])
        self.contender.restore(state["contender"])
        if extend:
            self.contender.extend()
        self.watch.restore(state["watch"])
        self.room.tokens, self.room.backed_off = state["tokens_at_once"], state["backed_off"]
        self.notices, self._before, self._losses = state["notices"], state["seconds"], state["losses"]
        torch.set_rng_state(state["random"])
        self._journal = Journal(self.folder.metrics, state["journal"])
        self.say(f"going on after step {self.contender.step}")
        return True

    def state(self, journal: int, fingerprint: str) -> dict[str, Any]:
        return {
            "base": fingerprint,
            "threads": torch.get_num_threads(),
            "contender": self.contender.state(),
            "watch": self.watch.state(),
            "tokens_at_once": self.room.tokens,
            "backed_off": self.room.backed_off,
            "notices": self.notices,
            "seconds": self.seconds,
            "losses": self._losses,
            "random": torch.get_rng_state(),
            "journal": journal,
        }

    # ---- training

    def go(self, on_step: OnStep | None = None, recompute: bool = False) -> None:
        """Train until the contender stops or somebody asks to; `interrupted` says which."""
        if self._journal is None:
            self._journal = Journal(self.folder.metrics)
        self._tokens = self.contender.tokens
        self.peaks.note("loading")
        try:
            with asked_to_stop() as asked:
                if self.contender.live:
                    go_on(
                        self.bank, [self.contender], self.examples, self.room, self._stepped(asked, on_step), recompute
                    )
        except _Enough:
            self.interrupted = True
        finally:
            self._journal.close()

    def _stepped(self, asked: Asked, on_step: OnStep | None) -> Callable[[list[Contender]], None]:
        def after(contenders: list[Contender]) -> None:
            contender = self.contender
            self.begun = True
            self._measure()
            if on_step is not None:
                on_step(contender, contender.total)
            if contender.live and self._due(asked):
                self.keep()
            if asked.yes and contender.live:
                raise _Enough
            if not contender.live:
                self.keep()

        return after

    def _measure(self) -> None:
        contender, device = self.contender, self.room.device
        if contender.diverged:
            return
        self.peaks.note("steps", contender.tokens - self._tokens)
        self._tokens = contender.tokens
        self._losses = [self._losses[0] + contender.loss, self._losses[1] + 1]
        line: dict[str, Any] = {"step": contender.step, "loss": contender.loss, "tokens": contender.tokens}
        line |= {"norm": contender.norm, "lr": contender.rate, "seconds": self.seconds}
        line |= {"memory_mb": current_memory_mb(), "peak_memory_mb": peak_memory_mb()}
        if device.type == "cuda":
            line |= {"gpu_memory_mb": current_memory_mb(device)}
            line |= {"peak_gpu_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20}
        if self.seen and (contender.step % self.eval_every == 0 or not contender.live):
            line["heldout"] = self._evaluate()
        assert self._journal is not None
        self._journal.add(line)
        self.tracker.add(line)

    def _evaluate(self) -> dict[str, float]:
        contender, watch, begun = self.contender, self.watch, time.perf_counter()
        with contender.averaged():
            name = contender.plan.name
            judged = score(self.bank, self.seen, [name], self.room)[name]
            mean = self._losses[0] / max(self._losses[1], 1)
            if watch.note(contender.step, mean, judged, contender.values()):
                self._keep_best()
        if not contender.live and not math.isfinite(judged.scores["loss"]):
            contender.diverge("the held-out loss is no number", contender.step)
        self._losses = [0.0, 0.0]
        self.evaluating += time.perf_counter() - begun
        self.peaks.note("scoring")
        if advice := watch.overfitting():
            self.notices.append(advice)
            self.say(advice)
        if watch.stale and contender.live:
            contender.stopped = "stopped early"
            self.say(f"stopped early: {watch.metric} has not been better since step {watch.best_step}")
        return judged.scores

    # ---- checkpoints

    def _keep_best(self) -> None:
        """Write the adapter that is the best so far; where the disk has no room, the checkpoints still hold it."""
        try:
            self._kept(self.folder.adapter)
        except OSError as error:
            self.say(f"the best adapter is not written yet ({error.strerror or error}); training goes on")

    def _due(self, asked: Asked) -> bool:
        if asked.yes:
            return True
        if self.checkpoint_every is not None:
            return self.contender.step % self.checkpoint_every == 0
        return time.perf_counter() - self._since > SECONDS

    def keep(self) -> None:
        """Write a checkpoint; where the disk has no room for it, the one before stays and training goes on."""
        assert self._journal is not None
        self._since = time.perf_counter()
        try:
            size = self._journal.kept()
            self.checkpoints.write(self.contender.step, self.state(size, self.bank.fingerprint))
        except OSError as error:
            stays = "the one before stays" if self.checkpoints.files() else "there is none yet"
            self.say(f"no checkpoint at step {self.contender.step} ({error.strerror or error}); {stays}")
            return
        if not len(self.seen):
            self._keep_best()


class _Enough(Exception):
    """Somebody asked to stop."""
