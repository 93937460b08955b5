"""What each process but the first does in a run: it opens the base, and gives the gradients of its segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from inlay.bank.bank import Bank, attach
from inlay.bases.heads import Head
from inlay.bases.load import load_base
from inlay.errors import InlayError
from inlay.runtime.memory import TokenBudget, bound_kernels
from inlay.runtime.processes import Processes
from inlay.runtime.tasks import GENERATE, HeadTask, Task
from inlay.training.gradients import Step, step_gradients
from inlay.training.learner import Learner
from inlay.training.loop import add_learners

from .processes import memory_limit, own_device
from .sharing import agreed, all_values, do_share, read_plan, read_segments

__all__ = ["Worker"]


class Worker:
    """Does what the first of the `processes` says, until that one ends: on `bank` and for `task` where they are given,
    else on the base that the first one tells it to open."""

    def __init__(self, processes: Processes, bank: Bank | None = None, task: Task = GENERATE) -> None:
        self._processes, self._bank, self._task = processes, bank, task
        self._free = memory_limit("auto")  # before the others here have loaded their bases
        self._budget = TokenBudget(1)
        self._learners: dict[str, Learner] = {}
        self._failed: Exception | None = None

    def work(self) -> dict[str, Any]:
        """The run's result. Raises: InlayError or KeyboardInterrupt where the run ended by one, or a process failed."""
        deeds = {"open": self._open, "learners": self._keep, "step": self._step}
        while True:
            for name, words in self._processes.tell().items():
                if name == "result":
                    return words
                if name == "error":
                    raise InlayError(*words)
                if name == "interrupted":
                    raise KeyboardInterrupt(words)
                deeds[name](words)

    def _open(self, how: Mapping[str, Any]) -> None:
        try:
            self._bank = self._opened(how)
        except Exception as error:  # said when the first process asks, which goes on meanwhile
            self._failed = error

    def _opened(self, how: Mapping[str, Any]) -> Bank:
        bound_kernels(how["methods"])
        head = None if how["head"] is None else Head(how["head"][0], tuple(how["head"][1]))
        base = load_base(how["base"], how["dtype"], own_device(how["device"]), how["quantize"], head)
        bank = attach(base.model)
        if bank.fingerprint != how["fingerprint"]:
            what = f"the base {how['base']} here is another one than in the first process"
            raise InlayError(what, "Give every machine the same files.")
        for name, folder in how["adapters"].items():
            bank.load(name, folder)
        self._task = GENERATE if how["task"] is None else HeadTask(*how["task"])
        limit = self._free if how["memory_limit"] == "auto" else memory_limit(how["memory_limit"])
        self._budget = TokenBudget(1, limit, next(base.model.parameters()).device)
        return bank

    def _keep(self, words: Mapping[str, Any]) -> None:
        """Make the learners that are new, drop those that have stopped."""
        torch.set_num_threads(words["threads"])
        agreed(self._processes, lambda: self._made(words))
        self._processes.share(all_values([self._learners[own["name"]] for own in words["new"]]))

    def _made(self, words: Mapping[str, Any]) -> dict[str, Any]:
        if self._failed is not None:
            raise self._failed
        assert self._bank is not None
        new = [own["name"] for own in words["new"]]
        for name in [name for name in self._learners if name not in words["live"] or name in new]:
            del self._learners[name]
            self._bank.remove(name)
        for own in words["new"]:
            plan, known = read_plan(own), self._bank.adapters
            chosen = {plan.name: plan.method}
            self._learners |= {
                learner.plan.name: learner
                for learner in add_learners(self._bank, [plan], own["rows"], known, self._task, chosen=chosen)
            }
        self._learners = {name: self._learners[name] for name in words["live"]}  # in the first process's order
        return {}

    def _step(self, words: Mapping[str, Any]) -> None:
        assert self._bank is not None
        bank, budget, learners = self._bank, self._budget, list(self._learners.values())
        segments = read_segments(words["shares"][self._processes.rank])
        step = Step(learners, segments, words["counts"], words["where"], words["recompute"])
        budget.tokens = words["tokens"]
        bank.model.eval()
        do_share(self._processes, learners, budget, lambda: step_gradients(bank, step, segments, budget, self._task))
        for learner in learners:
            learner.forget_gradients()
