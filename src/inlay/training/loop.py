"""The one training loop: every step is one stream of tokens in which each live contender has its own segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inlay.bank.bank import Bank
from inlay.data.encode import Example

from .contender import Contender, Plan
from .forward import Segment, batches, check_trainable, token_losses

__all__ = ["train"]

OnStep = Callable[[list[Contender]], None]


def train(
    bank: Bank,
    plans: Sequence[Plan],
    examples: Sequence[Example],
    tokens_at_once: int = 4096,
    on_step: OnStep | None = None,
) -> list[Contender]:
    """Add an adapter for each plan and train all of them together on `examples`.

    Each contender equals what it would be alone: its own sampler, dropout, optimizer, schedule, clipping and stop; its
    loss is the sum over its own learned tokens of the step by their number. A step of more than `tokens_at_once`
    tokens is taken in several forwards with the same gradients. `on_step` sees the contenders after every step.
    """
    check_trainable(bank)
    for plan in plans:
        bank.add(plan.name, plan.method, seed=plan.seed)
    contenders = [Contender(plan, list(bank.parameters(plan.name)), len(examples)) for plan in plans]
    bank.model.eval()  # the base is frozen, and its own dropout would tie contenders to one another
    while live := [contender for contender in contenders if contender.live]:
        _step(bank, live, examples, tokens_at_once)
        if on_step is not None:
            on_step(contenders)
    return contenders


def _step(bank: Bank, live: list[Contender], examples: Sequence[Example], tokens_at_once: int) -> None:
    drawn = {contender.plan.name: contender.batch(examples) for contender in live}
    learned = {name: sum(sum(e.learned[1:]) for e in batch) for name, batch in drawn.items()}
    losses = dict.fromkeys(drawn, 0.0)
    # Contenders of different ages draw different dropout masks; a stream of one age is the usual case.
    for step in sorted({contender.step for contender in live}):
        segments = [Segment(c.plan.name, e) for c in live if c.step == step for e in drawn[c.plan.name]]
        for group in batches(segments, tokens_at_once):
            for name, value in _backward(bank, group, learned, step).items():
                losses[name] += value
    for contender in live:
        name = contender.plan.name
        contender.update(losses[name], sum(len(e.ids) for e in drawn[name]))


def _backward(bank: Bank, group: list[Segment], learned: dict[str, int], step: int) -> dict[str, float]:
    """Gradients of a group's share in each contender's mean loss; returns those shares."""
    sums: dict[str, Tensor] = {}
    for segment, losses in zip(group, token_losses(bank, group, step), strict=True):
        name = str(segment.route)
        own = losses.sum() / learned[name]
        sums[name] = sums[name] + own if name in sums else own
    torch.stack(list(sums.values())).sum().backward()
    return {name: float(value.detach()) for name, value in sums.items()}
