"""The trainable tensors of one adapter as one tensor, for the passes that go over all of them alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["flattened"]


@torch.no_grad()
def flattened(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """A parameter (n,) whose values and gradient are those of `parameters`, laid end to end.

    They become views of it: what it learns they learn, and their gradients add up in its own. Hundreds of small
    tensors would cost clipping and an optimizer as many calls each.
    """
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        parameter.data = flat.data[start:end].view(parameter.shape)
        parameter.grad = flat.grad[start:end].view(parameter.shape)
        start = end
    return flat
