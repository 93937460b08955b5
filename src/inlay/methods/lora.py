"""LoRA: a low-rank product beside a frozen weight.

    y = W x + s B A x        s = alpha / r, or alpha / sqrt(r) with rank-stabilised scaling

Papers: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685);
Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv:2312.03732);
Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models" (arXiv:2402.12354).

Shapes: A is (r, in), B is (out, r). On an embedding `in` counts the rows of the table, and A's columns are looked up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from inlay.errors import FormatError, UsageError
from inlay.kernels.again import keep, kept
from inlay.values import Count, Help, Positive

from .contract import Dropout, Layers, Method, Params, Site, Structure, Targets, check_pattern, select_projections

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA(Method):
    """Settings of LoRA.

    `r` is the rank and `alpha` the scale (2r where None); `targets` are module names, groups or a regular expression,
    `layers` restricts them to some blocks; `rank_pattern` and `alpha_pattern` map a name or regular expression over
    the end of a module's path to its own r or alpha; `use_rslora` divides by sqrt(r);
    `dropout` is the share of x's entries that the low-rank branch does not see in training; `loraplus_lr_ratio` is
    by how much faster B learns than A (LoRA+; 16 in its paper, with a lower learning rate than usual).
    """

    title = "LoRA"
    paper = "arXiv:2106.09685"
    peft_type = "LORA"
    takes_product = True

    r: Annotated[Count, Help("rank of the product; 4 to 32 is usual")] = 8
    alpha: Annotated[Positive | None, Help("scale of the product; 2r where unset")] = None
    targets: Targets = "all-linear"
    layers: Layers = None
    rank_pattern: Annotated[Mapping[str, Count], Help("other ranks, by the end of a module's path")] = field(
        default_factory=dict
    )
    alpha_pattern: Annotated[Mapping[str, Positive], Help("other scales, by the end of a module's path")] = field(
        default_factory=dict
    )
    use_rslora: Annotated[bool, Help("divide by the root of r, which suits large ranks")] = False
    dropout: Dropout = 0.0
    loraplus_lr_ratio: Annotated[Positive, Help("by how much faster B learns than A (LoRA+); 16 in its paper")] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                check_pattern(pattern, f"LoRA's {name}")

    def sites(self, base: Structure) -> list[Site]:
        return select_projections(base, self.targets, self.layers)

    def check_fit(self, sites: Sequence[Site]) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                if not any(_matches(pattern, site.path) for site in sites):
                    raise UsageError(f"LoRA's {name} names {pattern!r}, which no target ends in", "Name a target.")
        for site in sites:
            r, most = self.rank(site), max(site.in_features, site.out_features)
            if r > most:
                shape = f"({site.out_features}, {site.in_features})"
                what = f"LoRA's r is {r}, more than {site.path} {shape} has rows or columns"
                raise UsageError(what, "4 to 32 is usual.")

    def rank(self, site: Site) -> int:
        return int(_patterned(self.rank_pattern, site.path, self.r))

    def scale(self, site: Site) -> float:
        r = self.rank(site)
        default = 2 * self.r if self.alpha is None else self.alpha
        return _patterned(self.alpha_pattern, site.path, default) / (math.sqrt(r) if self.use_rslora else r)

    def rate(self, site: Site | None, key: str) -> float:
        return self.loraplus_lr_ratio if key == "B" and site is not None and not site.is_embedding else 1.0

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        r = self.rank(site)
        a, b = torch.zeros(r, site.in_features), torch.zeros(site.out_features, r)
        if site.is_embedding:  # as the reference does: a table's columns start at zero
            torch.nn.init.normal_(b, generator=generator)
        else:
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        return {"A": a, "B": b}

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if site.is_embedding:
            return y + F.linear(F.embedding(x, params["A"].t()), params["B"]) * self.scale(site)
        x = params.drop(x, self.dropout)
        a, b = params.own("A"), params.own("B")
        if torch.is_autocast_enabled(x.device.type):  # whose dtypes are its own affair, in the backward too
            return y + (_by_tokens(x, a) @ a.mT @ b.mT).view(y.shape) * self.scale(site)
        into = _owned(y, site) if params.may_overwrite else None
        if into is None:
            return _Branch.apply(x, y, a, b, self.scale(site), params.frozen)  # pyright: ignore
        return _BranchInto.apply(x, into, a, b, self.scale(site), params.frozen).view(y.shape)  # pyright: ignore

    def outputs(self, params: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return super().outputs(params, x, y, site) if site.is_embedding else self.output(params, x, y, site)

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        delta = params["B"] @ params["A"] * self.scale(site)
        if site.is_embedding:
            return {"weight": site.weight() + delta.t()}
        weight = site.weight() + delta
        return {"weight": weight.t().contiguous() if site.transposed else weight}

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        ends = ("lora_embedding_A", "lora_embedding_B") if site.is_embedding else ("lora_A.weight", "lora_B.weight")
        r = self.rank(site)
        return {"A": (ends[0], (r, site.in_features)), "B": (ends[1], (site.out_features, r))}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "r": self.r,
            "lora_alpha": 2 * self.r if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "target_modules": [site.path for site in sites],
            "fan_in_fan_out": all(site.transposed for site in sites),
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> LoRA:
        for name in ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication"):
            if config.get(name):
                raise FormatError(f"the LoRA checkpoint sets {name}, which is not supported", "Load it with peft.")
        return cls(
            r=config["r"],
            alpha=config["lora_alpha"],
            targets=paths,
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            use_rslora=config.get("use_rslora") or False,
            dropout=config.get("lora_dropout") or 0.0,
        )


class _Branch(torch.autograd.Function):
    """y + s (x A^T) B^T, in one pass over y, keeping only x and s x A^T beside A and B for the backward.

    x and y are (..., in) and (..., out) in the base's dtype, A (r, in) and B (out, r) as they are trained; where A and
    B are those of K adapters, (K, ...), so are x and y. Where y came from x by a `frozen` weight (out, in) without a
    gradient, x gets that product's too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, frozen: Tensor | None) -> Tensor:
        low = _kept(ctx, x, a, b, scale, frozen)
        made = torch.addmm if a.ndim == 2 else torch.baddbmm
        return made(_by_tokens(y, a), low, b.mT.to(y.dtype)).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, low, a, b, *frozen = kept(ctx)
        x, grad = _by_tokens(x, a), _by_tokens(grads[0], a)
        times = _product(a)
        grad_low = times(grad, b.to(grad.dtype)).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _added(grad @ frozen[0], grad_low, a) if frozen else times(grad_low, a.to(grad.dtype))
            grad_x = grad_x.view(ctx.shape)
        grad_y = grads[0] if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, times(grad_low.mT, x).to(a.dtype), times(grad.mT, low).to(b.dtype), None, None


class _BranchInto(_Branch):
    """The same, written into y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, frozen: Tensor | None) -> Tensor:
        low, flat = _kept(ctx, x, a, b, scale, frozen), _by_tokens(y, a)
        _added(flat, low, b.mT)
        ctx.mark_dirty(y)
        return y


def _kept(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, frozen: Tensor | None) -> Tensor:
    """s x A^T (tokens, r); what the backward needs is kept in `ctx`."""
    low = _product(a)(_by_tokens(x, a), a.mT.to(x.dtype)).mul_(scale)
    keep(ctx, x, low, a, b, *([] if frozen is None else [frozen]))
    ctx.shape, ctx.scale = x.shape, scale
    return low


def _product(a: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of matrices, or of K of them where `a` is K adapters'."""
    return torch.mm if a.ndim == 2 else torch.bmm


def _added(y: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """y (tokens, width) or (K, tokens, width), to which low @ up is added in place."""
    return (y.addmm_ if up.ndim == 2 else y.baddbmm_)(low, up.to(y.dtype))


def _by_tokens(x: Tensor, a: Tensor) -> Tensor:
    """x as (tokens, width), or (K, tokens, width) where `a` is K adapters'."""
    return x.reshape(*a.shape[:-2], -1, x.shape[-1])


def _owned(y: Tensor, site: Site) -> Tensor | None:
    """The contiguous tensor that y is all of, if a plain linear layer made it: other modules may need theirs again."""
    whole = y if y._base is None else y._base
    plain = type(site.module) is torch.nn.Linear and whole.numel() == y.numel() and whole.is_contiguous()
    return whole if plain and whole.shape[-1] == y.shape[-1] else None


def _patterned(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that matches the end of `path`, else `default`."""
    return next((v for p, v in patterns.items() if _matches(p, path)), default)


def _matches(pattern: str, path: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None
