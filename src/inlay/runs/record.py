"""The run's record, run.json, and what `train --json` prints of it.

In a run of one learner both are flat. In a run of several, what is a learner's own stands under "learners", by name.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

import inlay
from inlay.runtime.memory import MB, peak_memory_mb
from inlay.training.plan import Course

from .context import Context
from .dataset import lengths
from .estimate import step_tokens
from .peaks import why_otherwise
from .progress import Progress
from .session import Session

__all__ = ["Record"]

Own = Mapping[str, Mapping[str, Any]]
"""Of each learner, by name, its own part."""


class Record:
    """Describes a run; `estimate` is what was thought of its memory before the first step, `seconds` of its time (None
    where nothing was)."""

    def __init__(
        self, context: Context, session: Session, estimate: Mapping[str, float], seconds: float | None = None
    ) -> None:
        self.context, self.session, self.estimate = context, session, estimate
        self.predicted = {"seconds": seconds, "memory_mb": estimate["estimate_mb"]}

    def joined(self, shared: Mapping[str, Any], own: Own) -> dict[str, Any]:
        """One object of the run's and the learners' parts."""
        if self.context.several:
            return {**shared, "learners": {name: dict(part) for name, part in own.items()}}
        return {**shared, **next(iter(own.values()))}

    # ---- run.json

    def run_record(self, status: str) -> dict[str, Any]:
        """What run.json holds at any time; `status` is the run's."""
        return self.joined(self.shared(status), {own.name: self.own(own) for own in self.session.progress.values()})

    def shared(self, status: str) -> dict[str, Any]:
        """What run.json holds of the run."""
        context = self.context
        versions = {"inlay": inlay.__version__, "torch": torch.__version__, "python": platform.python_version()}
        return {
            "status": status,
            "metric": context.metric,
            "total_steps": max(learner.total for learner in self.session.learners),
            "config": dataclasses.asdict(context.given),
            **({"plans": context.listed} if context.listed else {}),
            "data": context.dataset.summary() | {"lengths": lengths(context.lengths)},
            "template": context.encoder.template.to_dict(),
            "max_length": context.max_length,
            "memory": self._memory(),
            "predicted": self.predicted,
            "notices": [*context.notices, *self.session.notices],
            "versions": {**versions, "transformers": version("transformers")},
            "base_fingerprint": context.base.fingerprint,
            "dtype": context.dtype,
            "threads": torch.get_num_threads(),
            "processes": context.shares.size,
        }

    def own(self, own: Progress) -> dict[str, Any]:
        """What run.json holds of a learner."""
        adapter = own.learner.adapter
        cost = {
            "trainable_parameters": len(adapter),
            "base_parameters": sum(p.numel() for p in self.context.base.model.parameters()),
            "virtual_tokens": adapter.virtual_length,
            "prefix_tokens": adapter.prefix_length,
        }
        if not self.context.several:
            return {"cost": cost}
        return {"status": own.learner.stopped or "running", "total_steps": own.learner.total, "cost": cost}

    def _memory(self) -> dict[str, Any]:
        """The estimate, and what was cut; at the end, why the peak was another."""
        budget, session = self.context.budget, self.session
        memory = {**self.estimate, "limit_mb": budget.limit_mb, "tokens_at_once": budget.tokens}
        memory["step_tokens"] = step_tokens(session.learners, self.context.lengths, budget, self.context.shares.size)
        memory["backed_off"] = budget.backed_off
        return memory | ({} if session.live else {"why": why_otherwise(session.peaks, memory)})

    def alone(self, own: Progress, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record that a learner would have in a run of its own, for its card."""
        if not self.context.listed:
            return dict(record)
        plan = self.context.listed[own.name]
        part = record["learners"][own.name] if self.context.several else {}
        course = {f.name: plan[f.name] for f in dataclasses.fields(Course)}
        course["virtual_tokens_at"] = self.context.place_of(own.name)
        config = record["config"] | course | {"method": plan["method"], "set": plan["set"]}
        return {**record, **part, "config": config}

    # ---- what `train --json` prints

    def shared_result(self) -> dict[str, Any]:
        """What is printed of the run."""
        context, session = self.context, self.session
        result = {
            "evaluation_seconds": session.evaluating,
            "peak_memory_mb": peak_memory_mb(),
            "predicted": self.predicted,
            "processes": context.shares.size,
            "metric": context.metric,
            "choosing_rows": len(context.choosing),
            "rows": dict(context.prepared.counts),
            "duplicates": context.dataset.duplicates,
            "equal_rows": context.dataset.equal,
        }
        if context.several:
            tokens = sum(learner.tokens for learner in session.learners)
            result |= {"status": self.status(), "steps": session.step, "tokens": tokens, "seconds": session.seconds}
            result["tokens_per_second"] = tokens / session.seconds
        if context.budget.device.type == "cuda":
            result["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated(context.budget.device) / MB
        return result

    def own_result(self, own: Progress) -> dict[str, Any]:
        """What is printed of a learner, but its scores."""
        learner, seconds = own.learner, own.seconds or self.session.seconds
        return {
            "method": type(learner.plan.method).title,
            "steps": learner.step,
            "lr": learner.plan.rate,
            "tokens": learner.tokens,
            "seconds": seconds,
            "tokens_per_second": learner.tokens / seconds,
            "train_loss": learner.loss,
            "best_step": own.kept_step,
            "adapter": str(self.context.folder.best(own.name)),
            "trainable_parameters": len(learner.adapter),
            "status": learner.stopped,
        }

    def status(self) -> str:
        """How the run has ended: as its learner, or "diverged" where all of several have."""
        if not self.context.several:
            return self.session.learners[0].stopped
        return "diverged" if all(learner.diverged for learner in self.session.learners) else "done"
