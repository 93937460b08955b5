"""Which of the last states a head for whole rows reads: seen by the gradient of what it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .tiny import quietly, tiny_inputs

__all__ = ["reads_every_state"]


def reads_every_state(model: nn.Module, backbone: nn.Module) -> bool:
    """Whether what `model` gives for a row of some tokens, (1, labels), comes of several states of `backbone`, as of
    their mean; False where it comes of one, or of none, or nothing can be run."""
    last: list[Tensor] = []

    def replaced(module: nn.Module, args: Any, out: Any) -> Any:
        states = out[0].detach().requires_grad_()
        last.append(states)
        if isinstance(out, tuple):
            return (states, *out[1:])
        out[next(iter(out.keys()))] = states
        return out

    with quietly(model):
        for make in tiny_inputs(model):
            last.clear()
            handle = backbone.register_forward_hook(replaced)
            try:
                with torch.enable_grad():
                    logits = getattr(model(**make()), "logits", None)
                    total = logits.square().sum() if isinstance(logits, Tensor) and logits.ndim == 2 else None
            except Exception:  # whatever it lacks, the next batch may have
                continue
            finally:
                handle.remove()
            if not last or total is None or not total.requires_grad:
                return False
            grad = torch.autograd.grad(total, last[-1], allow_unused=True)[0]
            return grad is not None and grad.ndim > 2 and int((grad[0].flatten(1) != 0).any(1).sum()) > 1
    return False
