"""Nested state (optimizers, counters, tensors) as JSON beside named tensors, and back, exactly."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from inlay.errors import FormatError

__all__ = ["pack", "unpack"]

TRUSTED = ("torchao.optim.",)
"""Where the classes of optimizers' own tensors may come from; nothing else is ever imported by a file's word."""


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """`value` as JSON; its tensors go into `tensors` under names made of their place.

    Raises: FormatError naming a value that has no such form.
    """
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        return _pack_parts(value, tensors, name)
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, dict):
        entries = [[key, pack(inner, tensors, f"{name}/{key}")] for key, inner in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(entries) if plain else {"$dict": entries}
    if isinstance(value, (list, tuple)):
        items = [pack(inner, tensors, f"{name}/{n}") for n, inner in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise FormatError(f"the state {name!r} holds a {type(value).__name__}", "It cannot be kept in a checkpoint.")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$parts" in value:
        return _unpack_parts(value, tensors)
    if "$tuple" in value:
        return tuple(unpack(inner, tensors) for inner in value["$tuple"])
    if "$dtype" in value:
        return getattr(torch, value["$dtype"])
    if "$dict" in value:
        return {key: unpack(inner, tensors) for key, inner in value["$dict"]}
    return {key: unpack(inner, tensors) for key, inner in value.items()}


def _pack_parts(value: Any, tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    names, context = value.__tensor_flatten__()
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    parts = {part: pack(getattr(value, part), tensors, f"{name}/{part}") for part in names}
    shape = [list(value.size()), list(value.stride())]
    return {"$parts": parts, "class": kind, "context": pack(context, tensors, f"{name}/context"), "shape": shape}


def _unpack_parts(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if not value["class"].startswith(TRUSTED):
        raise FormatError(f"the checkpoint holds a {value['class']}", "It was not written here.")
    module, _, name = value["class"].rpartition(".")
    kind = getattr(import_module(module), name)
    parts = {part: unpack(inner, tensors) for part, inner in value["$parts"].items()}
    return kind.__tensor_unflatten__(parts, unpack(value["context"], tensors), *value["shape"])
