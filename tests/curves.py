"""Training curves of a model, for tests that hold two of them side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["adamw_losses"]


def adamw_losses(model: nn.Module, parameters: Sequence[Tensor], ids: Tensor, lr: float, steps: int) -> list[float]:
    """The losses of `steps` AdamW steps on predicting `ids` (rows, tokens) backwards, each before its step."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flip(1).flatten())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses
