"""Weights that modules share: an adapter on one of them must not change the others when it is merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.sites.tiny import run_tiny

__all__ = ["check_untied", "untie"]

Merged = Sequence[tuple[nn.Module, str, Tensor]]
"""Modules, names of their parameters, and the values that these are to get."""


def untie(model: Any, merged: Merged) -> None:
    """Give modules a copy of their own of what they share, and note it in the config, but where all that share it are
    to get equal values."""
    for module, key in _shared(model, merged):
        shared = getattr(module, key)
        setattr(module, key, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
        for config in _configs(model):
            config.tie_word_embeddings = False


def check_untied(model: Any, merged: Merged) -> None:
    """Raises: UsageError where `untie` would have to note it in the config of a base that computes otherwise then, as
    those of T5's family do that scale their last states where tables are tied."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = [config for config in _configs(model) if getattr(config, "tie_word_embeddings", False)]
    if head is None or not tied or not any(True for _ in _shared(model, merged)):
        return
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        run_tiny(model, seen.clear)
        before = list(seen)
        for config in tied:
            config.tie_word_embeddings = False
        run_tiny(model, seen.clear)
    finally:
        handle.remove()
        for config in tied:
            config.tie_word_embeddings = True
    if len(before) == len(seen) and any(not torch.allclose(a, b) for a, b in zip(before, seen, strict=True)):
        what = f"{type(model).__name__} scales its last states where its tables are tied, and merging would untie them"
        raise UsageError(what, "Keep the adapter beside the base.")


def _shared(model: Any, merged: Merged) -> Iterator[tuple[nn.Module, str]]:
    """The parameters that others share which are not to get equal values."""
    written = {(module, key): value for module, key, value in merged}
    for module, key, value in merged:
        shared = getattr(module, key)
        others = [(m, k) for m in model.modules() if m is not module for k, p in m._parameters.items() if p is shared]
        if not all(other in written and torch.equal(written[other], value) for other in others):
            yield module, key


def _configs(model: Any) -> list[Any]:
    return list({id(config): config for config in (model.config, model.config.get_text_config())}.values())
