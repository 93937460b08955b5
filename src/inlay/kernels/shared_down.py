"""What D gives for one x at several layers that read it, of many adapters: one product for all of them.

    low_i[span] = x[span] D_i^T        for the layers i and each adapter's spans

x is read once, forward and backward, where products at each layer would read it as often as there are layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batching import Block, batched, pads, stacked
from .recomputed import save_for_backward, saved

__all__ = ["Joint", "shared_down"]


@dataclass(frozen=True, eq=False)
class Joint:
    """One adapter's `spans` (start, stop) of tokens, and its D (r, in) at each layer; None where it has none."""

    spans: tuple[tuple[int, int], ...]
    downs: tuple[Tensor | None, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(0 if down is None else len(down) for down in self.downs)


def shared_down(x: Tensor, joints: Sequence[Joint]) -> tuple[Tensor, ...]:
    """For each layer x D^T (T, the largest rank there) of x (..., in), T vectors of it, with zeros where no adapter or
    no such rank is."""
    return _SharedDown.apply(x, joints, *(down for joint in joints for down in joint.downs))  # pyright: ignore


class _SharedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, joints: Sequence[Joint], *_: Tensor | None) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        shapes = tuple((joint.spans, sum(joint.ranks)) for joint in joints)
        alone, blocks = batched(shapes, pads(x, shapes), x.device)
        ctx.groups = [_Group.alone(joints, number) for number in alone]
        ctx.groups += [_Group.of(joints, block) for block in blocks]
        ctx.joints = joints
        lows = [flat.new_zeros(len(flat), max(ranks)) for ranks in zip(*(j.ranks for j in joints), strict=True)]
        for group in ctx.groups:
            group.forward(flat, lows)
        save_for_backward(ctx, x)
        return tuple(lows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        whole = saved(ctx)[0]
        x = whole.reshape(-1, whole.shape[-1])
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        layers = len(grads)
        found: list[Tensor | None] = [None] * (layers * len(ctx.joints))
        for group in ctx.groups:
            for number, downs in group.backward(x, grads, grad_x):
                found[layers * number : layers * (number + 1)] = downs
        return None if grad_x is None else grad_x.view(whole.shape), None, *found


@dataclass(frozen=True, eq=False)
class _Group:
    """Adapters whose products are one: `members` of the joints, `down` (K, sum of ranks, in) and its `ranks` by layer;
    a `block` where there are several, else the spans of the one."""

    joints: Sequence[Joint]
    members: tuple[int, ...]
    ranks: tuple[int, ...]
    down: Tensor
    block: Block | None

    @classmethod
    def alone(cls, joints: Sequence[Joint], number: int) -> _Group:
        downs = [down.detach() for down in joints[number].downs if down is not None]
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        return cls(joints, (number,), joints[number].ranks, down[None], None)

    @classmethod
    def of(cls, joints: Sequence[Joint], block: Block) -> _Group:
        own = [joints[number] for number in block.members]
        ranks = tuple(map(max, zip(*(joint.ranks for joint in own), strict=True)))
        down = own[0].downs[next(layer for layer, rank in enumerate(ranks) if rank)]
        columns = zip(*(joint.downs for joint in own), strict=True)
        assert down is not None
        layers = [
            stacked([down.new_zeros(0, down.shape[1]) if d is None else d.detach() for d in column], rank, 0)
            for column, rank in zip(columns, ranks, strict=True)
        ]
        return cls(joints, block.members, ranks, torch.cat(layers, 1), block)

    def forward(self, x: Tensor, lows: Sequence[Tensor]) -> None:
        if self.block is not None:
            made = self.block.gather(x) @ self.down.mT
            for low, part in zip(lows, made.split(self.ranks, -1), strict=True):
                self.block.add(low[:, : part.shape[-1]], part)
            return
        for start, stop in self.joints[self.members[0]].spans:
            made = x[start:stop] @ self.down[0].t()
            for low, part in zip(lows, made.split(self.ranks, -1), strict=True):
                low[start:stop, : part.shape[-1]] = part

    def backward(
        self, x: Tensor, grads: Sequence[Tensor], grad_x: Tensor | None
    ) -> list[tuple[int, list[Tensor | None]]]:
        """For each member, the gradients of its D; that of x is added to `grad_x`."""
        own = [grad[:, :rank] for grad, rank in zip(grads, self.ranks, strict=True)]
        if self.block is not None:
            grad_low = torch.cat([self.block.gather_gradient(grad) for grad in own], -1)
            grad_down = grad_low.mT @ self.block.gather(x)
            if grad_x is not None:
                self.block.add(grad_x, grad_low @ self.down)
        else:
            grad_down = torch.zeros_like(self.down)
            for start, stop in self.joints[self.members[0]].spans:
                grad_low = torch.cat([grad[start:stop] for grad in own], -1)
                grad_down[0].addmm_(grad_low.t(), x[start:stop])
                if grad_x is not None:
                    grad_x[start:stop].addmm_(grad_low, self.down[0])
        return [(n, self._apart(n, whole)) for n, whole in zip(self.members, grad_down, strict=True)]

    def _apart(self, number: int, whole: Tensor) -> list[Tensor | None]:
        """The gradient (sum of ranks, in) of one member by its layers."""
        parts = zip(self.joints[number].downs, whole.split(self.ranks), strict=True)
        return [None if down is None else part[: len(down)] for down, part in parts]
