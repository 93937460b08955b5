"""The base that is there once more, with a head: its weights are the same tensors, and only the head's are new."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from inlay.errors import UsageError

from .heads import Head, can_write, head_class, set_padding

__all__ = ["check_serves", "with_head"]


def check_serves(model: Any) -> None:
    """Raises: UsageError where a base neither writes text nor takes a head."""
    if not can_write(model):
        head_class(model.config.to_dict(), str(model.config._name_or_path), Head("classify"))


def with_head(model: Any, tokenizer: Any, head: Head) -> Any:
    """A model of transformers' class for `head`, in evaluation mode, over the weights of `model`. Its head, and a
    pooler that `model` lacks, are zeros: adapters have their own.

    Raises: UsageError where the base takes no such head, or its weights are quantized.
    """
    name = str(model.config._name_or_path)
    if getattr(model, "hf_quantizer", None) is not None:
        raise UsageError(f"base {name} is quantized, and takes no head beside it", "Serve it unquantized.")
    config = copy.deepcopy(model.config)
    for key, value in head.settings().items():
        setattr(config, key, value)
    kind: Any = head_class(config.to_dict(), name, head)._model_mapping[type(config)]
    with torch.device("meta"):
        made = kind(config)
    _share(made.base_model, model.base_model)
    like = next(model.parameters())
    for module in made.modules():
        _fill(module, like)
    set_padding(made, tokenizer)
    return made.eval().requires_grad_(False)


def _share(into: nn.Module, source: nn.Module) -> None:
    """Give every module `into` the parameters and buffers of the one at its path in `source`."""
    known: dict[str, Any] = dict(source.named_modules())
    for path, module in into.named_modules():
        own, here = known.get(path), cast(Any, module)
        if own is not None and type(own) is type(here):
            for kind in ("_parameters", "_buffers"):
                there, into_here = getattr(own, kind), getattr(here, kind)
                into_here.update({name: there[name] for name in into_here if name in there})


def _fill(module: nn.Module, like: torch.Tensor) -> None:
    """Put zeros in the place of tensors that have no memory yet."""
    for name, value in module._parameters.items():
        if value is not None and value.is_meta:
            module._parameters[name] = nn.Parameter(torch.zeros_like(value, dtype=like.dtype, device=like.device))
    for name, value in module._buffers.items():
        if value is not None and value.is_meta:
            raise UsageError(
                f"{type(module).__name__} keeps a {name} that the base lacks", "Ask it with `inlay predict`."
            )
