"""The base that is there once more, with a head: its weights are the same tensors, and only the head's are new."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from inlay.errors import UsageError

from .folders import stored_tensors
from .heads import Head, can_write, head_class, set_padding

__all__ = ["check_serves", "with_head"]


def check_serves(model: Any) -> None:
    """Raises: UsageError where a base neither writes text nor takes a head."""
    if not can_write(model):
        head_class(model.config.to_dict(), str(model.config._name_or_path), Head("classify"))


def with_head(model: Any, tokenizer: Any, head: Head, folder: Path | None = None) -> tuple[Any, list[str]]:
    """A model of transformers' class for `head`, in evaluation mode, over the weights of `model`. What it has more, as
    the head and for some a pooler, comes from the base's `folder`; the second value names the modules that are not
    there either: they are zeros, and adapters have their own.

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
    stored = {} if folder is None else stored_tensors(folder, _keys(made))
    empty = [path for path, module in made.named_modules() if _fill(path, module, model, stored)]
    set_padding(made, tokenizer)
    return made.eval().requires_grad_(False), empty


def _keys(made: Any) -> dict[str, tuple[str, ...]]:
    """Of the parameters that have no memory yet, the names that files may have for them."""
    body = f"{made.base_model_prefix}."
    lacking = [name for name, value in made.named_parameters() if value.is_meta]
    return {name: (name, name.removeprefix(body), body + name) for name in lacking}


def _share(into: nn.Module, source: nn.Module) -> None:
    """Give every module `into` the parameters and buffers of the one at its path in `source`."""
    known: dict[str, Any] = dict(source.named_modules())
    for path, module in into.named_modules():
        own, here = known.get(path), cast(Any, module)
        if own is not None and type(own) is type(here):
            for kind in ("_parameters", "_buffers"):
                there, into_here = getattr(own, kind), getattr(here, kind)
                into_here.update({name: there[name] for name in into_here if name in there})


def _fill(path: str, module: nn.Module, model: Any, stored: Mapping[str, torch.Tensor]) -> bool:
    """Give a module's parameters without memory what is `stored`, or zeros; returns whether there were such zeros."""
    like, empty = next(model.parameters()), False
    for name, value in module._parameters.items():
        if value is None or not value.is_meta:
            continue
        known = stored.get(f"{path}.{name}".lstrip("."))
        if known is None or known.shape != value.shape:
            known, empty = torch.zeros(value.shape), True
        module._parameters[name] = nn.Parameter(known.to(like.device, like.dtype))
    for name, value in module._buffers.items():
        if value is not None and value.is_meta:
            what = f"{type(module).__name__} keeps a {name} that the base lacks"
            raise UsageError(what, "Ask it with `inlay predict`.")
    return empty
