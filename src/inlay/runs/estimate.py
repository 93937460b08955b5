"""How much memory a run will take, before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from inlay.bank.bank import Bank
from inlay.bank.recompute import checkpointed_blocks
from inlay.data.encode import Example
from inlay.data.prepare import token_counts
from inlay.runtime.forward import Segment
from inlay.runtime.held import Held, held_bytes
from inlay.runtime.memory import MB, TokenBudget, current_memory_mb
from inlay.runtime.tasks import GENERATE, Task
from inlay.training.learner import Learner

__all__ = ["LearnerMemory", "estimate_mb", "learner_memory", "step_tokens"]

KERNELS_MB = 150
"""What compiled kernels of a CPU's matrix products take in float32; in bfloat16 about twice as much was seen."""
LONGEST = 256
"""Tokens of the row that is tried."""


def estimate_mb(
    bank: Bank, learners: Sequence[Learner], examples: Sequence[Example], budget: TokenBudget, task: Task = GENERATE,
    processes: int = 1, scored: bool = False, recompute: bool = False,
) -> dict[str, float]:  # fmt: skip
    """`estimate_mb` for steps as they will be, `least_mb` where each forward takes one row; cuts `budget` to it.

    One row runs forward for each learner, and what it holds for its backward is counted: the largest step saves that
    much a token, spread over `processes`. The adapters' own tensors (`_States`) come on top of the memory in use;
    `scored` is whether the best weights so far are kept, `recompute` whether blocks are computed again in the backward.
    Raises: UsageError where they are to be, and the base cannot.
    """
    sizes = token_counts(examples)
    longest = int(sizes.max())
    tried = _tried(examples, sizes)
    held = [_held(bank, learner, tried, task, budget.device, recompute) for learner in learners]
    a_token = max(own.saved for own in held) / len(tried.ids) / MB
    dtype = next(bank.model.parameters()).dtype
    states = _States.of(learners, scored, dtype)
    kernels = KERNELS_MB * (1 if dtype.itemsize >= 4 else 2)
    fixed = current_memory_mb(budget.device) + (kernels if budget.device.type == "cpu" else 0)
    beside = sum(own.beside for own in held) / MB
    in_step = states.step + beside
    budget.fit(fixed + in_step, a_token, longest)
    most = step_tokens(learners, sizes, budget, processes)
    several = most < _whole_step(learners, sizes, processes)
    in_step += states.own + beside if several else 0  # a second forward's, before they are added to the first one's
    writing = states.written(budget.device.type == "cpu")
    return {
        "estimate_mb": fixed + max(in_step + a_token * most, writing),
        "least_mb": fixed + max(in_step + a_token * longest, writing),
    }


@dataclass(frozen=True)
class LearnerMemory:
    """MiB that one learner's training takes beside the base, as its run alone would: its `parameters`, `gradients`,
    `optimizer` state, `copies` of the parameters (from before a step, and the best so far), and `activations`: what
    its largest forward holds until the backward. The first, third and fourth are counted, the others estimated."""

    parameters: float
    gradients: float
    optimizer: float
    copies: float
    activations: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.copies + self.activations


def learner_memory(
    bank: Bank, learner: Learner, examples: Sequence[Example], budget: TokenBudget, task: Task = GENERATE,
    scored: bool = False, recompute: bool = False,
) -> LearnerMemory:  # fmt: skip
    """What the learner's training takes by the model of `estimate_mb`; its optimizer's state is counted as it is now,
    so that a learner that has taken no step has none."""
    sizes = token_counts(examples)
    tried = _tried(examples, sizes)
    held = _held(bank, learner, tried, task, budget.device, recompute)
    states = _States.of([learner], scored, next(bank.model.parameters()).dtype)
    tokens = step_tokens([learner], sizes, budget)
    kept = [v for own in learner.optimizer.state.values() for v in own.values() if isinstance(v, torch.Tensor)]
    return LearnerMemory(
        states.own, states.gradients, sum(v.numel() * v.element_size() for v in kept) / MB, states.copies,
        (held.saved / len(tried.ids) * tokens + held.beside) / MB,
    )  # fmt: skip


def _tried(examples: Sequence[Example], sizes: np.ndarray) -> Example:
    """The longest example that is no longer than `LONGEST`."""
    return examples[int(np.where(sizes <= LONGEST, sizes, 0).argmax())]


@dataclass(frozen=True)
class _States:
    """MiB of what is trained, in all learners: `own` of their parameters, `parts` of the gradients of an adapter's
    parts before they are laid together as one, `twice` of those that are laid together twice: what sites share is read
    before they are. `scored` is whether there is a copy of the best."""

    own: float
    parts: float
    twice: float
    scored: bool

    @classmethod
    def of(cls, learners: Sequence[Learner], scored: bool, dtype: torch.dtype) -> _States:
        own = sum(p.numel() * p.element_size() for learner in learners for p in learner.parameters)
        flat = sum(f.parameter.numel() for learner in learners for f in learner.flats)
        shared = [one for one in learners if any(part.shared for part in one.adapter.parts)]
        twice = sum(f.parameter.numel() * f.parameter.element_size() for one in shared for f in one.flats)
        return cls(own / MB, flat * dtype.itemsize / MB, twice / MB, scored)

    @property
    def copies(self) -> float:
        """From before the step, and the best."""
        return self.own * (1 + self.scored)

    @property
    def gradients(self) -> float:
        """In a backward: in parts, and as one."""
        return self.own + self.parts + self.twice

    @property
    def rest(self) -> float:
        """Between two steps: two moments of the optimizer, and the copies."""
        return 2 * self.own + self.copies

    @property
    def step(self) -> float:
        """In a backward, the gradients come on top."""
        return self.rest + self.gradients

    def written(self, on_cpu: bool) -> float:
        """While a checkpoint is written: the parameters once more, and on the CPU a copy of all that it holds."""
        return self.rest + self.own * (1 + (4 + self.scored if on_cpu else 0))


def step_tokens(learners: Sequence[Learner], sizes: np.ndarray, budget: TokenBudget, processes: int = 1) -> int:
    """Tokens of the largest forward: a step of the longest rows of all learners, or what the budget allows of it.

    `sizes` (n,) are the examples' lengths. Of several `processes`, each takes an equal share, one row at least.
    """
    longest = int(sizes.max())
    return min(max(_whole_step(learners, sizes, processes), longest), max(budget.tokens, longest))


def _whole_step(learners: Sequence[Learner], sizes: np.ndarray, processes: int) -> int:
    """Tokens of a process's share of a step of the longest rows."""
    ordered = np.sort(sizes)
    return -(-sum(int(ordered[-learner.plan.batch_size :].sum()) for learner in learners) // processes)


def _held(
    bank: Bank, learner: Learner, example: Example, task: Task, device: torch.device, recompute: bool = False
) -> Held:
    """What a step on one example holds for its backward."""
    plan = learner.plan
    segment = Segment(plan.name, example, seed=plan.seed, step=0)
    constants = [value for part in learner.adapter.parts for value in part.constants.values()]
    known = [*bank.model.parameters(), *bank.model.buffers(), *learner.adapter.parameters(), *constants]

    def look(inside: AbstractContextManager[None]) -> Held:
        with inside, torch.enable_grad():
            return held_bytes(known, lambda: task.losses(bank, [segment])[0], device)

    whole = look(nullcontext())
    if not recompute:
        return whole
    inputs = look(bank.recomputing())  # in the backward, one block after the other is there whole, with its gradients
    block = max(0, whole.saved - inputs.saved) // max(1, checkpointed_blocks(bank.model))
    return Held(min(whole.saved, inputs.saved + 2 * block), inputs.beside)
