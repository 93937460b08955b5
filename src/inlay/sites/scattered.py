"""Experts that are modules of their own: each is given the tokens that were sent to it, in an order of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from .recorder import Call

__all__ = ["scattered"]


def scattered(model: nn.Module, blocks: Mapping[str, int], calls: Mapping[str, Call]) -> frozenset[str]:
    """Paths of the modules that stand in a list of which each gets some tokens of a batch, as a tiny forward shows:
    tokens (n, width) came to one of the list, and either not all there are, or none to another."""
    found: set[str] = set()
    for path, container in model.named_modules():
        block = next((b for b in blocks if path.startswith(f"{b}.")), None)
        if block is None or block not in calls or not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
            continue
        own = [calls.get(f"{path}.{name}") for name, _ in container.named_children()]
        flat = [shape for call in own if call is not None for shape in call.shapes if len(shape) == 2]
        shape = calls[block].input_shape or ()
        tokens = {count * width for count, width in flat} - {math.prod(shape)}
        if flat and (tokens or any(call is None for call in own)):
            found.update(f"{path}.{name}" for name, _ in container.named_modules() if name)
    return frozenset(found)
