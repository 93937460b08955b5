"""Tells one base from another, whatever dtype it was loaded in.

A fingerprint is two halves of 8 hexadecimal digits. The first names the shapes of all weights and the signs of some
embeddings, which no rounding changes. The second names some values of every weight, rounded to bfloat16. A load that
rounds otherwise (float16, quantized) cannot know it and has zeros there; `same_base` takes that into account.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .heads import HEADED

__all__ = ["fingerprint", "same_base"]

UNKNOWN = "0" * 8
EXACT = (torch.float64, torch.float32, torch.bfloat16)
"""Dtypes that round to the same bfloat16 as the weights they were loaded from."""


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that say which base `model` is; about 0.02 s for 135M weights.

    Equal for float64, float32 and bfloat16 loads of one checkpoint and with or without adapters beside it; different
    for other weights of equal shapes. float16 and quantized loads share the first half (see `same_base`).
    """
    config = getattr(model, "config", None)
    # Few settings: the rest come and go between releases of transformers, or show in the shapes.
    kind = [f"{key}={getattr(config, key, None)}" for key in ("model_type", "num_attention_heads")]
    shapes, values, exact = hashlib.sha256(";".join(kind).encode()), hashlib.sha256(), True
    for name, size, weight in _weights(model):
        if size:
            shapes.update(f";{name}{size}".encode())
        if exact := exact and _plain(weight) and weight.dtype in EXACT:
            values.update(_bytes(_sample(weight, 16).to("cpu", torch.float32).to(torch.bfloat16).view(torch.int16)))
    shapes.update(_embedding_signs(model))
    return shapes.hexdigest()[:8] + (values.hexdigest()[:8] if exact else UNKNOWN)


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints can be of one base; where one load was lossy, only what both know is compared."""
    return one == other or (one[:8] == other[:8] and UNKNOWN in (one[8:], other[8:]))


def _weights(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Name, shape and tensor of every weight. Layers say their shape themselves, because quantized weights are packed
    into others; a layer's bias has none (), because quantized layers keep it elsewhere."""
    body = f"{getattr(model, 'base_model_prefix', '')}." if type(model).__name__.endswith(HEADED) else ""
    for path, module in model.named_modules():
        if body and (not path.startswith(body) or "pooler" in path.split(".")):
            continue
        size = _layer_size(module)
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{key}"
            if size is None:
                yield name, tuple(parameter.shape), parameter
            elif key != "weight":
                yield name, (), parameter
        if size is not None:
            weight = getattr(module, "weight", None)
            yield f"{path}.weight", size, weight if isinstance(weight, Tensor) else torch.empty(0, dtype=torch.uint8)


def _layer_size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of any make, (in, out) of GPT-2's Conv1D, None for other modules."""
    for first, second in (("out_features", "in_features"), ("nx", "nf")):
        size = getattr(module, first, None), getattr(module, second, None)
        if isinstance(size[0], int) and isinstance(size[1], int):
            return size[0], size[1]
    return None


def _plain(weight: Tensor) -> bool:
    return type(weight.detach()) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta


def _sample(weight: Tensor, most: int) -> Tensor:
    """At most `most` evenly spread entries along each of the first two dims (`most`² of a vector), 2 along others."""
    limits = [most**2] if weight.ndim == 1 else [most, most] + [2] * (weight.ndim - 2)
    steps = (slice(None, None, max(1, -(-size // limit))) for size, limit in zip(weight.shape, limits, strict=False))
    return weight.detach()[tuple(steps)]


def _embedding_signs(model: nn.Module) -> bytes:
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):
        return b""
    if not isinstance(table, Tensor) or not _plain(table) or not table.ndim:
        return b""
    return _bytes(_sample(table, 64).signbit().to("cpu"))


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()
