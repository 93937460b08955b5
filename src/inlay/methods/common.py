"""What the settings of several methods share: activations, the blocks that are kept, values by the end of a path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.values import Count, Help, OneOf, Positive

from .contract import Layers, Method, Site, Structure, check_pattern, parse_layers

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Patterned",
    "Ranks",
    "Scales",
    "check_named",
    "check_patterns",
    "check_rank",
    "in_layers",
    "patterned",
]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _linear(x: Tensor) -> Tensor:
    return x


ACTIVATIONS = {
    "relu": F.relu, "gelu": F.gelu, "swish": F.silu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu, "leaky_relu": F.leaky_relu, "relu6": F.relu6, "relu2": _relu2, "mish": F.mish,
    "gelu_new": _gelu_tanh, "gelu_fast": _gelu_tanh, "gelu_accurate": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python": F.gelu, "quick_gelu": _quick_gelu, "linear": _linear,
}  # fmt: skip
"""By transformers' names, which AdapterHub takes."""
Activation = Annotated[str, OneOf(tuple(ACTIVATIONS), "non_linearity"), Help("between the two projections")]

Ranks = Annotated[Mapping[str, Count], Help("other ranks, by the end of a module's path")]
Scales = Annotated[Mapping[str, Positive], Help("other scales, by the end of a module's path")]


def in_layers(sites: list[Site], layers: Layers, base: Structure) -> list[Site]:
    """Those of `sites` that stand in `layers`; all where they are None."""
    if layers is None:
        return sites
    kept = parse_layers(layers, 1 + max(base.blocks.values(), default=-1))
    return [site for site in sites if site.layer in kept]


def patterned(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that matches the end of `path`, else `default`."""
    return next((v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", path)), default)


def check_patterns(method: Method, *names: str) -> None:
    """Raises: UsageError where a pattern in one of these settings is no regular expression."""
    for name in names:
        for pattern in getattr(method, name):
            check_pattern(pattern, f"{method.title}'s {name}")


def check_named(method: Method, sites: Sequence[Site], *names: str) -> None:
    """Raises: UsageError where a pattern in one of these settings matches none of the sites."""
    for name in names:
        for pattern in getattr(method, name):
            if not any(patterned({pattern: 1.0}, site.path, 0.0) for site in sites):
                what = f"{method.title}'s {name} names {pattern!r}, which no target ends in"
                raise UsageError(what, "Name a target.")


class Patterned(Method):
    """Base of methods whose rank `r` and scale `alpha` patterns may change, by the end of a module's path."""

    r: int
    rank_pattern: Ranks
    alpha_pattern: Scales

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self, "rank_pattern", "alpha_pattern")

    def check_fit(self, sites: Sequence[Site]) -> None:
        check_named(self, sites, "rank_pattern", "alpha_pattern")
        for site in sites:
            check_rank(self, self.rank(site), site)

    def rank(self, site: Site) -> int:
        return int(patterned(self.rank_pattern, site.path, self.r))


def check_rank(method: Method, r: int, site: Site) -> None:
    """Raises: UsageError where a rank is more than a weight's larger side."""
    if r > max(site.in_features, site.out_features):
        shape = f"({site.out_features}, {site.in_features})"
        what = f"{method.title}'s r is {r}, more than {site.path} {shape} has rows or columns"
        raise UsageError(what, "4 to 32 is usual.")
