"""Two adapters beside one another: which is better, where they agree, and whether they do the same to the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from inlay.bank.adapter import Adapter, Part
from inlay.evaluation.compare import compare
from inlay.evaluation.rows import RowScores

from .finding import Finding, within
from .rows import row_changes
from .spectra import middle

__all__ = ["about_pair", "compared", "cosine", "overlap"]

Factors = tuple[Tensor, Tensor]
"""D (r, in) and U (out, r) of a product."""


def cosine(one: Factors, other: Factors) -> float:
    """<U D, U' D'> / (|U D| |U' D'|), Frobenius, of two products; 1 where they are the same but for their size. No
    product is made: <U D, U' D'> is the sum over (U^T U') * (D D'^T)."""
    both, first, second = (
        float((a[1].double().mT @ b[1].double() * (a[0].double() @ b[0].double().mT)).sum())
        for a, b in ((one, other), (one, one), (other, other))
    )
    size = (max(first, 0.0) * max(second, 0.0)) ** 0.5
    return both / size if size else 0.0


def overlap(one: Factors, other: Factors) -> tuple[float, float]:
    """||Q^T Q'||^2 / min(r, r') for orthonormal bases Q, Q' (out, r) of what two products give, and what random ones
    have on the mean, max(r, r') / out.

    Paper: Hu et al. 2021 (arXiv:2106.09685, section 7.2), whose left singular spaces these are.
    """
    bases = [_basis(down, up) for down, up in (one, other)]
    ranks = [own.shape[1] for own in bases]
    if not min(ranks):
        return 0.0, 0.0
    shared = float((bases[0].mT @ bases[1]).square().sum())
    return shared / min(ranks), max(ranks) / len(bases[0])


def _basis(down: Tensor, up: Tensor) -> Tensor:
    """Of the columns that U D spans, (out, r), its null directions left out."""
    left, upper = torch.linalg.qr(up.double())
    lower = torch.linalg.qr(down.double().mT)[1]
    u, s, _ = torch.linalg.svd(upper @ lower.mT)
    return (left @ u)[:, s > 1e-6 * s.max()] if float(s.max()) > 0 else left[:, :0]


@torch.no_grad()
def _modules(one: Adapter, other: Adapter) -> list[dict[str, Any]]:
    """Where both add products: the cosine between these, and how far what they give overlaps."""
    ours, theirs = _products(one), _products(other)
    found = []
    for path in (path for path in ours if path in theirs):
        share, chance = overlap(ours[path], theirs[path])
        alike = cosine(ours[path], theirs[path])
        found.append({"path": path, "cosine": alike, "overlap": share, "overlap_by_chance": chance})
    return found


def _products(adapter: Adapter) -> dict[str, Factors]:
    """By path, of parts that add a single matrix there."""
    parts: list[tuple[str, Part]] = [(p, part) for part in adapter.parts if part.method.has_form() for p in part.sites]
    forms = {path: part.form(path, None, {}) for path, part in parts}
    return {
        path: (own[0] * form.scale, own[1])
        for path, form in forms.items()
        if (own := form.factors()) is not None and own[0].ndim == 2
    }


def compared(
    one: Adapter, other: Adapter, ours: RowScores | None = None, theirs: RowScores | None = None
) -> dict[str, Any]:
    """Two adapters, with what each scored on the same rows where there are rows, as JSON."""
    found: dict[str, Any] = {}
    if ours is not None and theirs is not None:
        found["score"] = compare(ours, theirs, "loss").to_dict()
        found["rows"] = row_changes(theirs, ours)
        if ours.predicted is not None and theirs.predicted is not None:
            found["agree"] = float(np.mean(ours.predicted == theirs.predicted))
    if modules := _modules(one, other):
        found["modules"] = modules
        found["cosine"] = middle([own["cosine"] for own in modules])
        found["overlap"] = middle([own["overlap"] for own in modules])
        found["overlap_by_chance"] = middle([own["overlap_by_chance"] for own in modules])
    found["findings"] = [finding.to_dict() for finding in about_pair(found)]
    return found


def about_pair(found: dict[str, Any]) -> list[Finding]:
    """Which of two is better, how often they agree, and whether they work in the same directions: more than twice
    chance."""
    told: list[Finding] = []
    if score := found.get("score"):
        words = f"The first one's loss differs from the second one's by {within(score)} on {score['rows']} rows"
        which = {True: "the first is better", False: "the second is better"}
        verdict = which.get(score["better"], "the rows do not tell which is better")
        told.append(Finding("score", f"{words}: {verdict}.", noise=score["better"] is None))
    if "agree" in found:
        told.append(Finding("rows", f"They give the same label to {found['agree']:.0%} of the rows."))
    if "overlap" in found:
        share, chance = found["overlap"], found["overlap_by_chance"]
        words = f"Of the directions that one writes to, the other shares {share:.0%}, by chance {chance:.0%} (median)"
        more = f"cosine {found['cosine']:.2f}"
        if share > 2 * chance:
            told.append(Finding("weights", f"{words}: they work in the same place ({more})."))
        else:
            told.append(Finding("weights", f"{words}: no more than two random ones ({more}).", noise=True))
    elif not told:
        told.append(Finding("weights", "They have no module in common to which both add a product: give --data."))
    return told
