"""A whole training run: base and data in, a folder with an adapter, its measures and its story out."""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import inlay
from inlay.bank.bank import Bank
from inlay.bases.load import Base, load_base
from inlay.data.encode import Encoder, Prepared
from inlay.errors import InlayError, UsageError
from inlay.evaluation.score import Judged, judge, metrics_of
from inlay.files import write_json

from .contender import Contender
from .estimate import estimate_mb
from .folder import RunFolder
from .loop import enter
from .material import Material, gather, lengths
from .memory import Room, parse_size, peak_memory_mb
from .samples import samples
from .session import Session
from .settings import Settings, differences, make_method, plan_of
from .story import write_pages
from .trackers import Tracker
from .watch import Watch

__all__ = ["Settings", "make_method", "peak_memory_mb", "run"]

EVALUATIONS = 4
"""In a run where nobody says how often; they take about a tenth of its time."""

Say = Callable[[str], None]
OnStep = Callable[[Contender, int], None]


def run(settings: Settings, on_step: OnStep | None = None, say: Say | None = None) -> dict[str, Any]:
    """Train one adapter and return what `train --json` prints; the folder `settings.out` holds the rest.

    `say` (stderr where it is None) hears what people should know. Raises: UsageError, DataError or FormatError before
    any training where the settings, the data or the base are wrong; KeyboardInterrupt where the run was asked to stop,
    when everything that `resume` needs is on the disk.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    plan = plan_of(settings, make_method(settings.method, settings.set))
    folder = RunFolder(settings.out)
    folder.check(settings.resume)
    if settings.resume and folder.story.exists() and folder.finished:
        say(f"{folder.path} holds a finished run: there is nothing to go on with")
        return folder.told()["result"]
    limit = parse_size(settings.memory_limit)
    material = gather(settings)
    metric = _metric(settings, material)
    if material.shared:
        say(f"{material.shared} of the {len(material.heldout)} held-out rows are trained on too")
    if settings.resume:
        _check_same(settings, material, folder)
    base = load_base(settings.base, settings.dtype, settings.device, settings.quantize)
    bank = inlay.attach(base.model)
    plan = dataclasses.replace(plan, method=plan.method.prepared(base.tokenizer))
    work = _Work(settings, material, base, bank, folder, metric, say)
    work.room = Room(settings.tokens_at_once, limit, _device(base), told=say)
    plan.method.sites(bank.base)
    contender = enter(bank, [plan], len(work.prepared.examples))[0]
    tracker = Tracker(settings.track, folder.path / "track", dataclasses.asdict(settings))
    with folder.claimed():
        try:
            return work.done(contender, tracker, on_step)
        finally:
            tracker.close()


class _Work:
    """What the parts of a run hand to one another."""

    room: Room

    def __init__(
        self, settings: Settings, material: Material, base: Base, bank: Bank, folder: RunFolder, metric: str, say: Say
    ) -> None:
        self.settings, self.material, self.base, self.bank = settings, material, base, bank
        self.folder, self.metric, self.say = folder, metric, say
        self.start = time.perf_counter()
        self.encoder = Encoder(base.tokenizer, material.template, settings.max_length, settings.virtual_tokens_at)
        self.prepared: Prepared = self.encoder.examples(material.rows)

    def done(self, contender: Contender, tracker: Tracker, on_step: OnStep | None) -> dict[str, Any]:
        settings, folder = self.settings, self.folder
        self.session = self._session(contender, tracker)
        if settings.resume and not self.session.resume(self.base.fingerprint):
            self.say(f"{folder.path} holds no whole checkpoint: starting afresh")
        self.estimate = estimate_mb(self.bank, contender, self.prepared.examples, self.room)
        self._check_room()
        self.say(f"about {self.estimate['estimate_mb']:,.0f} MB of memory will be needed")
        write_json(folder.story, self._story("running"))
        self.session.go(on_step, settings.gradient_checkpointing)
        if self.session.interrupted:
            with contender.averaged():
                self._keep(folder.last)
            write_json(folder.story, self._story("interrupted"))
            raise KeyboardInterrupt(f"stopped after step {contender.step}; --resume goes on from there")
        return self._finished(contender)

    def _session(self, contender: Contender, tracker: Tracker) -> Session:
        settings, held = self.settings, self.material.heldout
        watch = Watch(self.metric, settings.patience)
        every = settings.eval_every or max(1, contender.total // EVALUATIONS)
        if settings.eval_every is None:  # held-out rows cost a forward each time
            seen_rows = contender.total * settings.batch_size // 20
            held = held[: max(32, seen_rows)]
        return Session(
            self.bank, contender, watch, self.encoder, self.prepared.examples, held, self.room, self.folder, self._keep,
            every, settings.checkpoint_every, settings.keep_checkpoints, self.say, tracker,
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
        settings = self.settings
        notes = {"template": self.encoder.template.to_dict(), "max_length": settings.max_length, "base": settings.base}
        self.bank.save("adapter", path, notes={**notes, "virtual_tokens_at": settings.virtual_tokens_at})

    def _finished(self, contender: Contender) -> dict[str, Any]:
        """Put the best state into the adapter, write it and the last one, and say how good it is."""
        folder, watch, seconds = self.folder, self.session.watch, self.session.seconds
        with contender.averaged():
            self._keep(folder.last)
            if watch.best_step is not None:
                contender.put(watch.best)
            self._keep(folder.adapter)
            held = self.material.heldout
            judged = judge(self.bank, self.encoder, held, [None, "adapter"], self.room) if held else {}
            result = self._result(contender, seconds, judged)
            story = self._story(contender.stopped) | result | {"result": result}
            story |= {"samples": samples(self.bank, self.encoder, held[:3], self.say)}
        if contender.diverged:
            self.say(self._why_diverged(contender))
            story["notices"] = [*story["notices"], self._why_diverged(contender)]
        tables = {"base" if key is None else "adapter": found.confusion for key, found in judged.items()}
        if found := {name: table for name, table in tables.items() if table is not None}:
            labels = next(iter(found.values())).labels
            story["confusion"] = {"labels": labels} | {name: table.table for name, table in found.items()}
        write_pages(folder, story)
        write_json(folder.story, story)
        return result

    def _why_diverged(self, contender: Contender) -> str:
        samples = contender.suspects or [e.sample for e in contender.batch(self.prepared.examples)]
        kept = f"step {self.session.watch.best_step}" if self.session.watch.best_step else "the step before"
        return (
            f"{contender.stopped}: loss {contender.loss:.3g}, gradient norm {contender.norm:.3g} in rows "
            f"{self.material.where(samples)}. The adapter of {kept} is kept. Try a lower --lr or --warmup 0.1."
        )

    def _result(self, contender: Contender, seconds: float, judged: Mapping[str | None, Judged]) -> dict[str, Any]:
        watch = self.session.watch
        result = {
            "method": type(contender.plan.method).title,
            "steps": contender.step,
            "tokens": contender.tokens,
            "seconds": seconds,
            "tokens_per_second": contender.tokens / seconds,
            "evaluation_seconds": self.session.evaluating,
            "peak_memory_mb": peak_memory_mb(),
            "train_loss": contender.loss,
            "heldout": judged["adapter"].scores if judged else {},
            "heldout_base": judged[None].scores if judged else {},
            "metric": self.metric,
            "best_step": watch.best_step if watch.best_step is not None else contender.step,
            "adapter": str(self.folder.adapter),
            "trainable_parameters": len(self.bank.adapters["adapter"]),
            "rows": dict(self.prepared.counts),
            "duplicates": self.material.duplicates,
            "status": contender.stopped,
        }
        if self.room.device.type == "cuda":
            result["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated(self.room.device) / 2**20
        return result

    def _story(self, status: str) -> dict[str, Any]:
        """What run.json says of a run whatever has become of it."""
        adapter, method = self.bank.adapters["adapter"], self.bank.adapters["adapter"].method
        size = sum(p.numel() for p in self.base.model.parameters())
        versions = {"inlay": inlay.__version__, "torch": torch.__version__, "python": platform.python_version()}
        data = self.material.summary() | {"lengths": lengths(self.prepared.examples)}
        memory = {**self.estimate, "limit_mb": self.room.limit_mb, "tokens_at_once": self.room.tokens}
        cost = {"trainable_parameters": len(adapter), "base_parameters": size, "virtual_tokens": method.virtual_length}
        return {
            "status": status,
            "config": dataclasses.asdict(self.settings),
            "data": data,
            "template": self.encoder.template.to_dict(),
            "memory": {**memory, "backed_off": self.room.backed_off},
            "cost": {**cost, "prefix_tokens": method.prefix_length},
            "notices": self.session.notices,
            "versions": {**versions, "transformers": _version("transformers")},
            "base_fingerprint": self.base.fingerprint,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }


def _metric(settings: Settings, material: Material) -> str:
    there = metrics_of(material.template.kind)
    if settings.metric is not None and settings.metric not in there:
        raise UsageError(
            f"{material.template.kind} rows have no metric {settings.metric!r}", f"Use {', '.join(there)}."
        )
    if settings.patience is not None and not material.heldout:
        raise UsageError("--patience needs held-out rows", "Give --heldout a share or a file.")
    return settings.metric or there[0]


def _check_same(settings: Settings, material: Material, folder: RunFolder) -> None:
    """Raises: UsageError showing what differs from the run that is to be gone on with."""
    told = folder.told()
    if not told:
        return
    changed = differences(told["config"], dataclasses.asdict(settings))
    before, now = told["data"], material.summary()
    names = ("digest", "heldout_digest", "rows", "heldout_rows")
    changed += [f"data {n} was {before.get(n)}, is {now.get(n)}" for n in names if before.get(n) != now.get(n)]
    if changed:
        raise UsageError(
            f"{folder.path} was begun otherwise: {'; '.join(changed)}", "Give what was given, or another --out."
        )


def _device(base: Base) -> torch.device:
    return next(base.model.parameters()).device


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
