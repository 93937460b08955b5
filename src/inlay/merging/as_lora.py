"""Any change of weights as LoRA: exactly where it is a low-rank product, else by the nearest product of a rank.

    D = W' - W = U diag(s) V^T        A = s_r^(1/2) V_r^T, B = U_r s_r^(1/2)

By Eckart and Young no other product of rank r is nearer in the Frobenius norm; the relative error of that is what the
singular values behind the r-th leave.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.bank.adapter import Adapter, Part
from inlay.bank.merging import merged_parameters
from inlay.errors import UsageError
from inlay.methods.contract import LinearForm, Site
from inlay.methods.lora import LoRA

__all__ = ["Lowered", "as_lora"]

KINDS = ("linear", "embedding", "experts")
"""Sites where LoRA can be."""


@dataclass(frozen=True)
class Product:
    """A (r, in), B (out, r) and s of a change s B A, and the share of it (Frobenius) that s B A leaves out."""

    a: Tensor
    b: Tensor
    scale: float = 1.0
    error: float = 0.0


@dataclass(frozen=True)
class Lowered:
    """LoRA with its values, and by the path of a module the relative Frobenius error; 0 where it is exact."""

    method: LoRA
    values: Mapping[str, Mapping[str, Tensor]]
    errors: Mapping[str, float]


@torch.no_grad()
def as_lora(adapter: Adapter, rank: int | None = None) -> Lowered:
    """`adapter` as one LoRA. Products of a rank up to `rank` stay as they are; where `rank` is None, all do.

    Raises: UsageError naming a part that is no change of weights, a bias that it changes, or, without a rank, a module
    whose change is no low-rank product.
    """
    at = _parts_at(adapter)
    products = {path: _exact(path, parts) for path, parts in at.items()}
    if whole := [path for path, product in products.items() if product is None]:
        if rank is None:
            title = at[whole[0]][0].method.title
            raise UsageError(
                f"{title} at {whole[0]} is no low-rank product",
                "Give --rank: then the nearest product of that rank is taken, and its error said.",
            )
        dense = _changes(adapter, at)
        products |= {path: _nearest(dense[path], rank) for path in whole}
    found = {path: _within(product, rank) for path, product in products.items() if product is not None}
    return _lowered({path: parts[0].sites[path] for path, parts in at.items()}, found)


def _parts_at(adapter: Adapter) -> dict[str, list[Part]]:
    """Path of each site -> the parts that act there. Raises: UsageError where LoRA cannot act there."""
    at: dict[str, list[Part]] = {}
    for part in adapter.parts:
        for path, site in part.sites.items():
            if site.kind not in KINDS:
                what = f"{part.method.title} acts on {_KIND_WORDS.get(site.kind, site.kind)} ({path})"
                raise UsageError(f"{what}, where no LoRA gives the same", "Keep it in its own format.")
            at.setdefault(path, []).append(part)
    return at


_KIND_WORDS = {
    "sublayer": "what attention or an MLP gives",
    "block": "the residual stream",
    "attention": "keys and values",
    "tokens": "virtual tokens",
    "norm": "a norm",
    "head": "a whole module",
}


def _exact(path: str, parts: Sequence[Part]) -> Product | None:
    """The change at one site as a product, where the forms of all parts are nothing else."""
    if not all(part.method.has_form() for part in parts):
        return None
    site, forms = parts[0].sites[path], [part.form(path, None, {}) for part in parts]
    factors = [form.factors() for form in forms]
    if any(pair is None for pair in factors) or any(_more(form) for form in forms):
        return None
    scales = [form.scale / site.table_scale for form in forms]
    pairs = [pair for pair in factors if pair is not None]
    if len(pairs) == 1:
        return Product(*pairs[0], scales[0])
    b = torch.cat([scale * up for scale, (_, up) in zip(scales, pairs, strict=True)], -1)
    return Product(torch.cat([down for down, _ in pairs], -2), b)


def _more(form: LinearForm) -> bool:
    return any(one is not None for one in (form.in_scale, form.out_scale, form.shift))


def _changes(adapter: Adapter, at: Mapping[str, Sequence[Part]]) -> dict[str, Tensor]:
    """W' - W (..., out, in) of each site. Raises: UsageError naming a bias that changes, or a part without weights."""
    sites = {parts[0].sites[path].module: parts[0].sites[path] for path, parts in at.items()}
    owners: dict[nn.Module, list[Site]] = {}
    for path, parts in at.items():
        owners.setdefault(parts[0].sites[path].module, []).append(parts[0].sites[path])
    found: dict[str, Tensor] = {}
    for module, name, value in merged_parameters(adapter):
        site = next((s for s in owners[module] if s.experts and s.name == name), sites[module])
        if name == "bias":
            own = getattr(module, "bias", None)
            if own is None or not torch.allclose(value, own):
                raise UsageError(f"the adapter changes the bias of {site.path}, which LoRA cannot", "Keep it as it is.")
            continue
        new = value.mT if site.transposed else value
        change = new - site.weight().to(new)
        found[site.path] = change.mT if site.is_embedding else change  # of a table (width, rows)
    return found


def _nearest(change: Tensor, rank: int) -> Product:
    """The product of `rank` nearest to a change (..., out, in).

    Its singular vectors are the eigenvectors of the smaller of D^T D and D D^T, in float64: several times quicker than
    a singular value decomposition of D itself.
    """
    wide = change.double()
    if wide.shape[-2] < wide.shape[-1]:
        turned = _nearest(change.mT, rank)
        return Product(turned.b.mT, turned.a.mT, error=turned.error)
    squares, v = torch.linalg.eigh(wide.mT @ wide)  # the smallest first
    squares, rank = squares.clamp(min=0), min(rank, v.shape[-1])
    kept, total = squares[..., -rank:], squares.sum()
    root = kept.sqrt().sqrt()
    a = root[..., :, None] * v[..., -rank:].mT
    b = wide @ v[..., -rank:] * torch.where(root > 0, 1 / root, 0.0)[..., None, :]
    error = float((squares[..., :-rank].sum() / total).sqrt()) if total > 0 else 0.0
    return Product(a.to(change), b.to(change), error=error)


def _within(product: Product, rank: int | None) -> Product:
    """The product, cut to `rank` where it has more."""
    if rank is None or product.a.shape[-2] <= rank:
        return product
    left, upper = torch.linalg.qr(product.b)
    right, lower = torch.linalg.qr(product.a.mT)
    inner = _nearest(upper @ lower.mT * product.scale, rank)
    return Product(inner.a @ right.mT, left @ inner.b, error=inner.error)


def _lowered(sites: Mapping[str, Site], products: Mapping[str, Product]) -> Lowered:
    ranks = {path: product.a.shape[-2] for path, product in products.items()}
    alphas = {path: round(product.scale * ranks[path], 12) for path, product in products.items()}
    r, alpha = max(ranks.values()), max(alphas.values(), key=[*alphas.values()].count)
    method = LoRA(
        r=r,
        alpha=alpha,
        targets=[path for path, site in sites.items() if not site.experts],
        target_parameters=[path for path, site in sites.items() if site.experts],
        rank_pattern={re.escape(path): own for path, own in ranks.items() if own != r},
        alpha_pattern={re.escape(path): own for path, own in alphas.items() if own != alpha},
    )
    values = {path: {"A": products[path].a, "B": products[path].b} for path in sites}
    return Lowered(method, values, {path: products[path].error for path in sites})
