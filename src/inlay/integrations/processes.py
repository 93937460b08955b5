"""Several processes of torch.distributed that train one adapter: the same start, and the average of their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed, nn

from inlay.runtime.processes import by_kind

__all__ = ["average_gradients", "broadcast"]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its average over all processes; one that a process has not got counts as zero.

    Does nothing where there is one process. Every process calls it, once a step, with the same parameters.
    """
    if processes() == 1:
        return
    for alike in by_kind(parameters):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= processes()
        for parameter, part in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
            parameter.grad = part.view_as(parameter)


@torch.no_grad()
def broadcast(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the first one's values."""
    if processes() == 1:
        return
    for alike in by_kind(parameters):
        flat = torch.cat([p.detach().flatten() for p in alike])
        distributed.broadcast(flat, src=0)
        for parameter, part in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
            parameter.copy_(part.view_as(parameter))


def processes() -> int:
    """How many processes torch.distributed has brought together; 1 where it was not started."""
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1
