"""The parts of a run that need the base: rows as tokens, the session, scores at the end, and the files they make."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import inlay
from inlay.bank.bank import Bank
from inlay.bases.load import Base
from inlay.data.encode import Encoder
from inlay.data.prepare import prepare
from inlay.data.table import Rows
from inlay.errors import InlayError, UsageError
from inlay.evaluation.score import Items, NoneLeft, items_of, score
from inlay.files import write_json, write_text
from inlay.runtime.forward import check_reads
from inlay.runtime.memory import Room, peak_memory_mb
from inlay.sites.positions import table_size
from inlay.training.contender import Contender
from inlay.training.plan import Plan

from .estimate import estimate_mb
from .fitting import fit_of
from .folder import RunFolder
from .material import Material, lengths
from .outcome import Final, final_lines, finite
from .peaks import why_otherwise
from .resuming import Start
from .samples import samples
from .session import Session
from .settings import Settings
from .story import write_pages
from .trackers import Tracker
from .watch import Watch

__all__ = ["OnStep", "Say", "Work"]

EVALUATIONS = 4
"""In a run where nobody says how often; they take about a tenth of its time."""
SHOWN = 3
"""Final rows whose answers are written out in full."""

Say = Callable[[str], None]
OnStep = Callable[[Contender, int], None]


class Work:
    """What the parts of a run hand to one another; `given` are the settings as people gave them."""

    def __init__(
        self, given: Settings, settings: Settings, material: Material, base: Base, bank: Bank, folder: RunFolder,
        metric: str, say: Say, room: Room, on_progress: Callable[[int, int], None], plan: Plan,
    ) -> None:  # fmt: skip
        self.given, self.settings, self.material, self.base, self.bank = given, settings, material, base, bank
        self.folder, self.metric, self.say, self.room = folder, metric, say, room
        self.start = time.perf_counter()
        self.session: Session | None = None
        check_reads(bank, material.template.kind)
        fit = fit_of(base.model, plan.method, settings.max_length)
        self.max_length, self.limit = fit.max_length, fit.limit
        self.encoder = Encoder(
            base.tokenizer, material.template, settings.max_length, settings.virtual_tokens_at, fit.limit,
            table_size(base.model),
        )  # fmt: skip
        self.notices = list(material.notices)
        self.prepared = prepare(self.encoder, material.rows, on_progress)
        self.choosing, self.final = self._items(material.choosing), self._items(material.final)
        self.lengths = self.prepared.examples.lengths
        if line := fit.notice(self.prepared.counts, settings.base):
            self._tell(line)

    @property
    def begun(self) -> bool:
        """Whether a step has been taken."""
        return self.session is not None and self.session.begun

    def _items(self, rows: Rows) -> Items:
        """Held-out rows, encoded once. Where none is of use, the run goes on without."""
        try:
            return items_of(self.encoder, rows)
        except NoneLeft as error:
            self._tell(f"held-out rows: {error.what}")
            return Items((), (), Counter(rows=len(rows)))

    def _tell(self, line: str) -> None:
        self.say(line)
        self.notices.append(line)

    def done(self, contender: Contender, tracker: Tracker, on_step: OnStep | None, start: Start) -> dict[str, Any]:
        """Train to the end and say what came of it. Raises: as `run`."""
        settings, folder = self.settings, self.folder
        self.session = session = self._session(contender, tracker)
        if settings.resume and not session.resume(self.base.fingerprint, start.extends):
            if start.extends:
                raise UsageError(f"{folder.path} holds no checkpoint to go on from", "Train into another folder.")
            self.say(f"{folder.path} holds no whole checkpoint: starting afresh")
        self.estimate = estimate_mb(self.bank, contender, self.prepared.examples, self.room)
        self._check_room()
        self.say(f"about {self.estimate['estimate_mb']:,.0f} MB of memory will be needed")
        with folder.room("nothing is trained yet"):
            write_json(folder.story, finite(self._story("running", contender)))
        session.go(on_step, settings.gradient_checkpointing)
        with folder.room(self._kept()):
            if session.interrupted:
                with contender.averaged():
                    self._keep(folder.last)
                write_json(folder.story, finite(self._story("interrupted", contender)))
                raise KeyboardInterrupt(f"stopped after step {contender.step}; --resume goes on from there")
            return self._finished(session, contender)

    def _kept(self) -> str:
        assert self.session is not None
        files = self.session.checkpoints.files()
        return f"the checkpoint {files[-1].name} is kept" if files else "no checkpoint could be kept"

    def _session(self, contender: Contender, tracker: Tracker) -> Session:
        settings, seen = self.settings, self.choosing
        every = settings.eval_every or max(1, contender.total // EVALUATIONS)
        if settings.eval_every is None:  # rows that choose cost a forward each time
            seen = seen.first(max(32, contender.total * settings.batch_size // 20))
        return Session(
            self.bank, contender, Watch(self.metric, settings.patience), self.prepared.examples, seen, self.room,
            self.folder, self._keep, every, settings.checkpoint_every, settings.keep_checkpoints, self.say, tracker,
            self.start,
        )  # fmt: skip

    def _check_room(self) -> None:
        limit = self.room.limit_mb
        if limit is not None and self.estimate["least_mb"] > limit:
            raise InlayError(
                f"the base and one row take about {self.estimate['least_mb']:.0f} MB, the limit is {limit:.0f} MB",
                "Use --dtype bfloat16, a lower --max-length, or a higher --memory-limit.",
            )

    def _keep(self, path: Path) -> None:
        """Write the adapter as it is to a folder, with what it was trained to read."""
        notes = {"template": self.encoder.template.to_dict(), "max_length": self.max_length, "base": self.settings.base}
        notes |= {"virtual_tokens_at": self.settings.virtual_tokens_at, "dtype": self._dtype}
        self.bank.save("adapter", path, notes=notes)

    @property
    def _dtype(self) -> str:
        return str(self.base.dtype).removeprefix("torch.")

    # ---- the end

    def _finished(self, session: Session, contender: Contender) -> dict[str, Any]:
        """Put the best state into the adapter, write it and the last one, and say how good it is."""
        folder, watch, seconds = self.folder, session.watch, session.seconds
        with contender.averaged():
            self._keep(folder.last)
            if watch.best_step is not None:
                contender.put(watch.best)
            self._keep(folder.adapter)
            judged = score(self.bank, self.final, [None, "adapter"], self.room) if len(self.final) else {}
            final = Final(judged, self.metric)
            session.peaks.note("scoring")
            shown = self.material.final.numbered(self.final.first(SHOWN).samples)
            written = samples(self.bank, self.encoder, shown, self.say, self.limit)
        for line in (self._why_diverged(contender) if contender.diverged else "", final.notice()):
            if line:
                self._tell(line)
        if lines := final_lines(final, self.final, self.material.final, self.encoder):
            write_text(folder.final, lines)
        story = self._story(contender.stopped, contender)
        result = finite(self._result(contender, seconds) | final.result())
        story = finite(story | result | {"result": result, "samples": written})
        if confusion := final.confusion():
            story["confusion"] = confusion
        write_pages(folder, story)
        write_json(folder.story, story)
        return result

    def _why_diverged(self, contender: Contender) -> str:
        assert self.session is not None
        batch = contender.suspects or [e.sample for e in contender.batch(self.prepared.examples)]
        best = self.session.watch.best_step
        kept = contender.sound if best is None else best
        return (
            f"{contender.stopped} ({contender.cause}): loss {contender.loss:.3g}, gradient norm {contender.norm:.3g} "
            f"in rows {self.material.where(batch)}. The adapter of step {kept} is kept. Try a lower "
            "--lr or --warmup 0.1."
        )

    def _result(self, contender: Contender, seconds: float) -> dict[str, Any]:
        assert self.session is not None
        best = self.session.watch.best_step
        result = {
            "method": type(contender.plan.method).title,
            "steps": contender.step,
            "lr": contender.plan.rate,
            "tokens": contender.tokens,
            "seconds": seconds,
            "tokens_per_second": contender.tokens / seconds,
            "evaluation_seconds": self.session.evaluating,
            "peak_memory_mb": peak_memory_mb(),
            "train_loss": contender.loss,
            "metric": self.metric,
            "choosing_rows": len(self.choosing),
            "best_step": contender.sound if best is None else best,
            "adapter": str(self.folder.adapter),
            "trainable_parameters": len(self.bank.adapters["adapter"]),
            "rows": dict(self.prepared.counts),
            "duplicates": self.material.duplicates,
            "equal_rows": self.material.equal,
            "status": contender.stopped,
        }
        if self.room.device.type == "cuda":
            result["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated(self.room.device) / 2**20
        return result

    def _story(self, status: str, contender: Contender) -> dict[str, Any]:
        """What run.json says of a run whatever has become of it."""
        assert self.session is not None
        adapter, method = self.bank.adapters["adapter"], contender.plan.method
        size = sum(p.numel() for p in self.base.model.parameters())
        versions = {"inlay": inlay.__version__, "torch": torch.__version__, "python": platform.python_version()}
        cost = {"trainable_parameters": len(adapter), "base_parameters": size, "virtual_tokens": method.virtual_length}
        return {
            "status": status,
            "total_steps": contender.total,
            "config": dataclasses.asdict(self.given),
            "data": self.material.summary() | {"lengths": lengths(self.lengths)},
            "template": self.encoder.template.to_dict(),
            "max_length": self.max_length,
            "memory": self._memory(contender),
            "cost": {**cost, "prefix_tokens": method.prefix_length},
            "notices": [*self.notices, *self.session.notices],
            "versions": {**versions, "transformers": version("transformers")},
            "base_fingerprint": self.base.fingerprint,
            "dtype": self._dtype,
            "threads": torch.get_num_threads(),
        }

    def _memory(self, contender: Contender) -> dict[str, Any]:
        """What was estimated and what was cut; at the end, why the peak was another."""
        assert self.session is not None
        told = {**self.estimate, "limit_mb": self.room.limit_mb, "tokens_at_once": self.room.tokens}
        longest = np.sort(self.lengths)[-contender.plan.batch_size :]
        told["step_tokens"] = min(int(longest.sum()), max(self.room.tokens, int(longest[-1])))
        told["backed_off"] = self.room.backed_off
        return told | ({} if contender.live else {"why": why_otherwise(self.session.peaks, told)})
