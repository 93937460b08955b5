"""DoRA: LoRA with a magnitude for every row of the weight, beside its direction.

    y = m / |W + s B A| * (W + s B A) x + bias        |.| is the norm of each row; no gradient flows through it

Paper: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353); the norm is a constant of the
gradient by its section 4.3, and dropout falls on what A reads alone.

Shapes: A is (r, in), B is (out, r), m is (out,) and starts as the norms of the base's own rows. On an embedding, A is
(r, rows of the table), B (width, r) and m (width,): the norms are those of the table's columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .contract import LinearForm, Params, Site
from .lora import LoRA

__all__ = ["DoRA", "row_norms"]


@dataclass(frozen=True)
class DoRA(LoRA):
    """Settings of DoRA: those of LoRA (r = 8, alpha = 2r). It begins with LoRA's learning rate, as its paper does."""

    title = "DoRA"
    paper = "arXiv:2402.09353"
    uncast = ("m",)  # it begins as m = |W|: their quotient is 1 to the last bit
    begins_inside = False  # its norms are those of W + s B A

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        made = super().create(site, generator)
        weight = _weight(site)
        a, b = (made[name].to(weight.device, weight.dtype) for name in ("A", "B"))
        return {**made, "m": row_norms(weight, a, b, self.scale(site))}

    def derive(self, params: Params, site: Site | None) -> Params:
        """The scale a = m / |W + s B A| (out,), and the shift (1 - a) bias that leaves the base's bias as it is."""
        if site is None:
            return {}
        m, bias = params["m"], getattr(site.module, "bias", None)
        weight = _weight(site)
        a, b = (params[name].detach().to(weight.dtype) for name in ("A", "B"))
        scale = m / row_norms(weight, a, b, self.scale(site))
        return {"scale": scale} if bias is None else {"scale": scale, "shift": (1 - scale) * bias.to(m.dtype)}

    def form(self, params: Params, site: Site) -> LinearForm:
        return replace(super().form(params, site), out_scale=params["scale"], shift=params.get("shift"))

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {**super().peft_keys(site), "m": ("lora_magnitude_vector", (site.out_features,))}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {k: v for k, v in super().to_peft(sites).items() if k != "target_parameters"} | {"use_dora": True}

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return super().claims(config) and bool(config.get("use_dora"))


def _weight(site: Site) -> Tensor:
    """(out, in); for an embedding (width, rows)."""
    return site.weight().t() if site.is_embedding else site.weight()


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The norms (out,) of the rows of W + s B A, which is not made: |W|^2 + 2 s B (A W^T) + s^2 B (A A^T) B^T.

    W (out, in), A (r, in) and B (out, r) are of one dtype. The norms are float32, or float64 where that is.
    """
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=kind).square()
    wide = b.to(kind)
    squares += 2 * scale * (wide * (weight @ a.t()).to(kind)).sum(1)
    squares += scale**2 * (wide * (wide @ (a.to(kind) @ a.to(kind).t()))).sum(1)
    return squares.clamp_(min=0).sqrt()
