"""The one training loop: every step is one stream of tokens in which each live contender has its own segments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor

from inlay.bank.adapter import Adapter
from inlay.bank.bank import Bank
from inlay.data.encode import Example
from inlay.runtime.forward import Segment, batches, check_trainable, token_losses
from inlay.runtime.memory import Room, bound_kernels, within

from .contender import Contender
from .plan import Plan

__all__ = ["enter", "go_on", "train"]

OnStep = Callable[[list[Contender]], None]

TRIED = 4
"""Rows of the last step, its shortest, that the finished adapter is tried on."""


def train(
    bank: Bank,
    plans: Sequence[Plan],
    examples: Sequence[Example],
    tokens_at_once: int = 4096,
    on_step: OnStep | None = None,
    recompute: bool = False,
) -> list[Contender]:
    """Add an adapter for each plan and train all of them together on `examples`.

    Each contender equals what it would be alone: its own sampler, dropout, optimizer, schedule, clipping and stop; its
    loss is the sum over its own learned tokens of the step by their number. A step of more than `tokens_at_once`
    tokens is taken in several forwards with the same gradients; `recompute` saves memory by computing each block again
    in the backward (gradient checkpointing). `on_step` sees the contenders after every step.
    """
    contenders = enter(bank, plans, len(examples))
    go_on(bank, contenders, examples, Room(tokens_at_once, device=bank.model.device), on_step, recompute)  # pyright: ignore
    return contenders


def enter(bank: Bank, plans: Sequence[Plan], rows: int, begun: Mapping[str, Adapter] | None = None) -> list[Contender]:
    """Add an adapter for each plan, but those that have `begun`: they go on with the values they have.

    Raises: UsageError where the base or a method cannot be trained so.
    """
    bound_kernels(len({repr(plan.method) for plan in plans}))
    check_trainable(bank)
    known = begun or {}
    adapters = [known.get(plan.name) or bank.add(plan.name, plan.method, seed=plan.seed) for plan in plans]
    for plan, adapter in zip(plans, adapters, strict=True):
        adapter.seed = plan.seed
    return [Contender(plan, adapter, rows) for plan, adapter in zip(plans, adapters, strict=True)]


def go_on(
    bank: Bank,
    contenders: list[Contender],
    examples: Sequence[Example],
    room: Room,
    on_step: OnStep | None = None,
    recompute: bool = False,
) -> None:
    """Train `contenders` from where they are until each has stopped."""
    bank.model.eval()  # the base is frozen, and its own dropout would tie contenders to one another
    while live := [contender for contender in contenders if contender.live]:
        with bank.recomputing() if recompute else nullcontext():
            _step(bank, live, examples, room)
        if on_step is not None:
            on_step(contenders)


def _step(bank: Bank, live: list[Contender], examples: Sequence[Example], room: Room) -> None:
    drawn = {contender.plan.name: contender.batch(examples) for contender in live}
    learned = {name: sum(sum(e.learned[1:]) for e in batch) for name, batch in drawn.items()}

    def forget() -> None:
        for contender in live:
            contender.forget_gradients()

    where = f"step {min(contender.step for contender in live) + 1}"
    with ExitStack() as flat:
        for contender in live:
            flat.enter_context(contender.laid_flat())
        sums, suspects = within(room, where, lambda: _gradients(bank, live, drawn, learned, room), forget)
    for contender in live:
        name = contender.plan.name
        contender.update(sums[name], sum(len(e.ids) for e in drawn[name]), suspects[name])
        if not contender.live and not contender.diverged:
            _check_end(bank, contender, drawn[name], room)


@torch.no_grad()
def _check_end(bank: Bank, contender: Contender, batch: list[Example], room: Room) -> None:
    """A last update that no further step would notice: whether the adapter still gives losses that are numbers."""
    tried = sorted(batch, key=lambda example: len(example.ids))[:TRIED]
    with contender.averaged():
        for group in batches([Segment(contender.plan.name, example) for example in tried], room):
            losses = within(room, "the last step", lambda group=group: token_losses(bank, group))
            if not all(bool(own.isfinite().all()) for own in losses):
                break
        else:
            return
    contender.diverge("the last update makes losses that are no numbers", contender.step, [e.sample for e in tried])


def _gradients(
    bank: Bank, live: list[Contender], drawn: dict[str, list[Example]], learned: dict[str, int], room: Room
) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Fill the gradients of one step; returns each contender's mean loss, and its samples whose loss is no number."""
    means, suspects = dict.fromkeys(drawn, 0.0), {name: [] for name in drawn}
    # Contenders of different ages draw different dropout masks; a stream of one age is the usual case.
    for step in sorted({contender.step for contender in live}):
        segments = [
            Segment(c.plan.name, e, c.plan.label_smoothing, c.plan.neftune_alpha, c.plan.seed)
            for c in live if c.step == step for e in drawn[c.plan.name]
        ]  # fmt: skip
        for group in batches(segments, room):
            losses = token_losses(bank, group, step)
            room.check()
            for name, value in _backward(group, losses, learned).items():
                means[name] += value
            for segment, own in zip(group, losses, strict=True):
                if not math.isfinite(means[str(segment.route)]) and not bool(own.detach().isfinite().all()):
                    suspects[str(segment.route)].append(segment.example.sample)
    return means, suspects


def _backward(group: list[Segment], losses: list[Tensor], learned: dict[str, int]) -> dict[str, float]:
    """Gradients of a group's share in each contender's mean loss; returns those shares."""
    sums: dict[str, Tensor] = {}
    for segment, own in zip(group, losses, strict=True):
        name = str(segment.route)
        share = own.sum() / learned[name]
        sums[name] = sums[name] + share if name in sums else share
    torch.stack(list(sums.values())).sum().backward()
    return {name: float(value.detach()) for name, value in sums.items()}
