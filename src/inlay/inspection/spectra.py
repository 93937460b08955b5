"""What an adapter adds to each weight: how much, in how many directions, and along which of the weight's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.bank.adapter import Adapter, Part
from inlay.bank.merging import merged_parameters
from inlay.methods.contract import LinearForm, Site

__all__ = [
    "Spectrum", "cut_factors", "decomposed", "dense_spectra", "effective_rank", "held", "middle", "share_along",
    "spectra", "summary", "top_directions",
]  # fmt: skip

WITHIN = 8
"""Singular directions of the base's weight that an update is compared with."""


@dataclass(frozen=True)
class Spectrum:
    """What is added to one weight W (out, in), as its product s U D is: `values` are its singular values, the largest
    first; `relative` is its Frobenius norm by that of W; `along` the share of its square norm in the `WITHIN` top left
    singular directions of W, and `chance` that of a random change. `scaled` is by how much outputs or inputs are
    scaled besides, root mean square of a - 1 and c - 1."""

    path: str
    layer: int | None
    rank: int
    values: tuple[float, ...] = ()
    relative: float | None = None
    along: float | None = None
    chance: float | None = None
    scaled: float | None = None

    @property
    def effective(self) -> float:
        return effective_rank(self.values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "path": self.path, "layer": self.layer, "rank": self.rank, "relative_norm": self.relative,
            "effective_rank": self.effective if self.values else None, "singular_values": list(self.values),
            "held": held(self.values), "along_base": self.along, "along_base_by_chance": self.chance,
            "scaled": self.scaled,
        }  # fmt: skip


def effective_rank(values: Sequence[float]) -> float:
    """exp(-sum p ln p) with p = values / their sum: n for n equal ones, 1 for a single one, 0 where all are 0.

    Paper: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    wide = torch.tensor(list(values), dtype=torch.float64)
    total = wide.sum()
    if not total > 0:
        return 0.0
    shares = wide[wide > 0] / total
    return float((-(shares * shares.log()).sum()).exp())


def held(values: Sequence[float]) -> list[float]:
    """The share of the square norm that the first k directions hold, sum of s_i^2 up to k by the whole, for each k."""
    squares = torch.tensor(list(values), dtype=torch.float64).square()
    total = squares.sum()
    return (squares.cumsum(0) / total).tolist() if total > 0 else []


def decomposed(down: Tensor, up: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., out, r), s (..., r) and V^T (..., r, in), float64, of `scale` * `up` (..., out, r) `down` (..., r, in).

    The factors are orthogonalised (QR) first, so that the whole product is never made.
    """
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(down.double().mT)
    u, s, vt = torch.linalg.svd(upper @ lower.mT * scale, full_matrices=False)
    return left @ u, s, vt @ right.mT


def cut_factors(u: Tensor, s: Tensor, vt: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """D (..., rank, in) and U (..., out, rank) of the product of `rank` that is nearest to U diag(s) V^T in the
    Frobenius norm (Eckart and Young 1936)."""
    root = s[..., :rank].sqrt()
    return root[..., :, None] * vt[..., :rank, :], u[..., :, :rank] * root[..., None, :]


def top_directions(weight: Tensor, count: int, seed: int = 0) -> Tensor:
    """About the `count` top left singular vectors (out, count) of `weight` (out, in), from a random start.

    Paper: Halko, Martinsson and Tropp 2011, "Finding structure with randomness", algorithm 4.4.
    """
    wide = weight.float()
    start = torch.randn(wide.shape[1], min(count + 8, *wide.shape), generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(wide @ start.to(wide.device))[0]
    for _ in range(3):
        q = torch.linalg.qr(wide @ (wide.mT @ q))[0]
    u = torch.linalg.svd(q.mT @ wide, full_matrices=False)[0]
    return (q @ u)[:, :count]


def share_along(directions: Tensor, left: Tensor, values: Tensor) -> float:
    """||Q^T D||^2 / ||D||^2 for a change D = `left` (out, r) diag(`values`) V^T and orthonormal Q (out, k); k / out for
    a random one. Hu et al. 2021 (arXiv:2106.09685, section 7.3) ask the same of LoRA."""
    whole = values.square().sum()
    inside = (directions.double().mT @ left * values).square().sum()
    return float(inside / whole) if whole > 0 else 0.0


@torch.no_grad()
def spectra(adapter: Adapter) -> list[Spectrum]:
    """Of every site at which a part of the adapter is a linear form."""
    return [
        _spectrum(part, path, site)
        for part in adapter.parts if part.method.has_form()
        for path, site in part.sites.items()
    ]  # fmt: skip


def _spectrum(part: Part, path: str, site: Site) -> Spectrum:
    form = part.form(path, None, {})
    scaled, factors = _scaled(form, site), form.factors()
    if factors is None:
        return Spectrum(path, site.layer, 0, scaled=scaled)
    left, values, _ = decomposed(*factors, form.scale / site.table_scale)
    return _of_change(path, site, factors[0].shape[-2], left, values, scaled)


def _scaled(form: LinearForm, site: Site) -> float | None:
    """Root mean square of c - 1 and a - 1; at a norm a stands in the place of the base's own scale, not of 1."""
    own = site.module.weight + site.offset if site.kind == "norm" else 1.0  # pyright: ignore[reportOperatorIssue]
    pairs = [(form.in_scale, 1.0), (form.out_scale, own)]
    apart = [(one - less).flatten().double() for one, less in pairs if one is not None]
    return float(torch.cat(apart).square().mean().sqrt()) if apart else None


def _of_change(path: str, site: Site, rank: int, left: Tensor, values: Tensor, scaled: float | None = None) -> Spectrum:
    """Of a change by its left singular vectors (..., out, r) and its singular values (..., r). Of experts, each value
    is the root mean square over them."""
    weight = site.weight().mT if site.is_embedding else site.weight()
    size = float(torch.linalg.vector_norm(weight.float()))
    relative = float(torch.linalg.vector_norm(values)) / size if size else None
    along, chance = _along(weight, left, values)
    ordered = values.square().mean(tuple(range(values.ndim - 1))).sqrt() if values.ndim > 1 else values
    return Spectrum(path, site.layer, rank, tuple(ordered.tolist()), relative, along, chance, scaled)


@torch.no_grad()
def dense_spectra(adapter: Adapter) -> list[Spectrum]:
    """Of what an adapter without forms, as OFT's rotation, would change the weights by: W' - W.

    Its singular values are the roots of the eigenvalues of D D^T or D^T D, whichever is smaller, in float64. Raises:
    UsageError where there are no such weights.
    """
    sites = {(s.module, s.name if s.experts else "weight"): s for part in adapter.parts for s in part.sites.values()}
    found = []
    for module, name, value in merged_parameters(adapter):
        site = sites.get((module, name))
        if site is None or site.kind not in ("linear", "embedding", "experts"):
            continue
        change = (value.mT if site.transposed else value).double() - site.weight().double()
        left, values = _left_vectors(change.mT if site.is_embedding else change)
        found.append(_of_change(site.path, site, values.shape[-1], left, values))
    return found


def _left_vectors(change: Tensor) -> tuple[Tensor, Tensor]:
    """U (..., out, r) and s (..., r) of a change (..., out, in), the largest first."""
    if change.shape[-2] <= change.shape[-1]:
        squares, left = torch.linalg.eigh(change @ change.mT)
        return left.flip(-1), squares.clamp(min=0).sqrt().flip(-1)
    squares, right = torch.linalg.eigh(change.mT @ change)
    values = squares.clamp(min=0).sqrt()
    left = change @ right / torch.where(values > 0, values, 1.0)[..., None, :]
    return left.flip(-1), values.flip(-1)


def _along(weight: Tensor, left: Tensor, values: Tensor) -> tuple[float | None, float | None]:
    """None where the site has a weight for each expert, or nothing is added."""
    count = min(WITHIN, *weight.shape)
    if weight.ndim > 2 or not float(values.square().sum()) > 0:
        return None, None
    return share_along(top_directions(weight, count), left, values), count / weight.shape[0]


def middle(found: Sequence[float]) -> float:
    """The median; 0 of none."""
    return float(torch.tensor(list(found), dtype=torch.float64).quantile(0.5)) if found else 0.0


def summary(found: Sequence[Spectrum]) -> Mapping[str, float | int | None]:
    """Over the sites that have a product, the largest rank, and medians of the effective rank, the norm by the
    weight's, and the share along the base's own top directions and by chance; empty where there is none."""
    own = [one for one in found if one.rank]
    if not own:
        return {}
    return {
        "sites": len(own),
        "rank": max(one.rank for one in own),
        "effective_rank": middle([one.effective for one in own]),
        "relative_norm": middle([one.relative for one in own if one.relative is not None]),
        "along_base": middle([one.along for one in own if one.along is not None]),
        "along_base_by_chance": middle([one.chance for one in own if one.chance is not None]),
    }
