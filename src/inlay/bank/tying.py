"""Weights that two modules share: an adapter on one of them must not change the other when it is merged."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["untie"]


def untie(model: Any, module: nn.Module, key: str) -> None:
    """Give `module` a copy of its own where another module holds the same parameter, and note it in the config."""
    parameter = getattr(module, key)
    others = [m for m in model.modules() if m is not module and any(p is parameter for p in m._parameters.values())]
    if not others:
        return
    setattr(module, key, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
