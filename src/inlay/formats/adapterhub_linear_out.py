"""Writes methods at linear layers as AdapterHub's LoRAConfig, by what their linear forms are.

All layers have one rank and one alpha there: smaller products get zeros, and scales that differ go into B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.methods.contract import LinearForm, Site, Structure
from inlay.methods.dora import row_norms

from .adapterhub_keys import MATRICES, HubKey, Written, block_of
from .adapterhub_places import Places, places_of
from .parts import SavedPart

__all__ = ["write_linear"]

INSTEAD = 'Save it with format="peft".'


class Change(NamedTuple):
    """What is done at one layer, by AdapterHub's names without "lora_": A (n r, in) and B (n width, r) of n parts of a
    fused weight, or B (n width, 1) alone, a scale; "m.weight" (out, 1) of DoRA. `matrices` are those n parts."""

    tensors: Mapping[str, Tensor]
    matrices: frozenset[str] = frozenset()

    @property
    def kind(self) -> tuple[str, ...]:
        return tuple(sorted(self.tensors))

    @property
    def rank(self) -> int:
        return self.tensors["B"].shape[1]


def write_linear(parts: Sequence[SavedPart], base: Structure) -> Written:
    """The one LoRAConfig of parts at linear layers, and its tensors.

    Raises: UsageError where AdapterHub has no place for them.
    """
    places, title = places_of(base), " beside ".join(part.method.title for part in parts)
    sites = {path: site for part in parts for path, site in part.sites.items()}
    if len(sites) < sum(len(part.sites) for part in parts):
        raise UsageError(f"AdapterHub has no place for {title} at one layer", INSTEAD)
    if any(part.method.has_form() for part in parts):
        forms = {path: _form(part, site) for part in parts for path, site in part.sites.items()}
        forms, sites = _giving(forms, sites, title, base)
        scale, changes = _changes(forms, sites, title)
    else:
        scale, changes = 1.0, {path: _gated(part, site) for part in parts for path, site in part.sites.items()}
    kinds = {change.kind for change in changes.values()}
    if len(kinds) > 1:
        raise UsageError(f"{title} does not do the same at all its layers", INSTEAD)
    kind, r = kinds.pop(), max(change.rank for change in changes.values())
    config = {
        "architecture": "lora", **_places(sites, changes, places, base), "r": r,
        "alpha": scale * r if "A" in kind else 1, "dropout": 0.0,
        "composition_mode": "add" if "A" in kind else "scale", "init_weights": "lora" if "A" in kind else "ia3",
        "init_weights_seed": None, "use_gating": "gate.weight" in kind, "use_dora": "m.weight" in kind,
        "vera_d": None, "vera_b": None, "dtype": None,
    }  # fmt: skip
    return config, {
        HubKey(path, "loras", end if "." in end else f"lora_{end}"): value
        for path, change in changes.items()
        for end, value in _widened(change, r).items()
    }


def _giving(
    forms: Mapping[str, LinearForm], sites: Mapping[str, Site], title: str, base: Structure
) -> tuple[dict[str, LinearForm], dict[str, Site]]:
    """The forms and their sites, where a scale of what a layer reads is one of what another gives.

    Raises: UsageError where it is not.
    """
    places, known = places_of(base), {site.path: site for site in base.projections}
    found, at = dict[str, LinearForm](), dict[str, Site]()
    for path, form in forms.items():
        if form.in_scale is not None:
            block = block_of(path, base) or ""
            other = f"{block}.{places.factors.get(path[len(block) + 1 :], '')}"
            more = form.factors() is not None or form.out_scale is not None or form.shift is not None
            if other not in known or more:
                what = f"{title} scales what {path} reads; AdapterHub scales what a layer gives"
                raise UsageError(what, INSTEAD)
            path, form = other, LinearForm(out_scale=form.in_scale)
        if path in found:
            raise UsageError(f"AdapterHub has no place for {title} at one layer", INSTEAD)
        found[path], at[path] = form, known.get(path) or sites[path]
    return found, at


def _changes(
    forms: Mapping[str, LinearForm], sites: Mapping[str, Site], title: str
) -> tuple[float, dict[str, Change]]:  # fmt: skip
    """The scale of all products, 1 where they have none in common, and what is done at each layer."""
    scales = {form.scale for form in forms.values()}
    scale = scales.pop() if len(scales) == 1 and all(form.out_scale is None for form in forms.values()) else 1.0
    return scale, {path: _change(forms[path], scale, site, title) for path, site in sites.items()}


def _gated(part: SavedPart, site: Site) -> Change:
    """A product behind a gate of each row, which is no linear form; AdapterHub has no scale of it."""
    own, method = part.params.get(site.path, {}), part.method
    keys = {name: end for name, (end, _) in method.peft_keys(site).items()}
    if {*keys.values()} != {"lora_A.weight", "lora_B.weight", "gate.weight", "gate.bias"} or site.role == "qkv":
        raise UsageError(f"AdapterHub has no {method.title} at {site.path}", INSTEAD)
    alpha = getattr(method, "alpha", None)
    scale = 1.0 if alpha is None else alpha / own["A"].shape[0]
    return Change({"A": own["A"], "B": own["B"] * scale, "gate.weight": own["gate"], "gate.bias": own["gate_bias"]})


def _form(part: SavedPart, site: Site) -> LinearForm:
    """The form at one site, on the CPU. Raises: UsageError where AdapterHub has no such site."""
    if not part.method.has_form():
        raise UsageError(f"AdapterHub has no {part.method.title}", INSTEAD)
    if site.kind != "linear":
        raise UsageError(f"AdapterHub has no place at {site.path}, which is no linear layer of a block", INSTEAD)
    own = {**part.constants, **part.params.get("", {}), **part.params.get(site.path, {})}
    return part.method.form({**own, **part.method.derive(own, site)}, site)


def _change(form: LinearForm, scale: float, site: Site, title: str) -> Change:
    """Raises: UsageError where a form is more than a product, a scale, or both, as AdapterHub has them."""
    factors, bias = form.factors(), getattr(site.module, "bias", None)
    biased = bias is not None and bool(bias.any())
    if (form.shift is not None and (biased or factors is None or form.out_scale is None)) or (
        factors is None and form.out_scale is None
    ):
        shifts = factors is None or form.out_scale is None
        what = "shifts what" if shifts else "does not scale the bias of what"
        raise UsageError(f"{title} {what} {site.path} gives, and AdapterHub does otherwise", INSTEAD)
    fused = site.role == "qkv"
    if factors is None:
        assert form.out_scale is not None
        return _of_matrices({"B": form.out_scale[:, None]}, 1.0) if fused else Change({"B": form.out_scale[:, None]})
    a, b = factors[0], factors[1] * (form.scale / scale)
    if form.out_scale is None:
        return _of_matrices({"A": a, "B": b}, 0.0) if fused else Change({"A": a, "B": b})
    if fused or site.transposed or biased:
        raise UsageError(f"{title} at {site.path} is computed otherwise by AdapterHub", INSTEAD)
    weight = site.weight().to(a)
    m = form.out_scale * row_norms(weight, a, b, 1.0).to(a)
    return Change({"A": a, "B": b, "m.weight": m[:, None]})


def _of_matrices(whole: Mapping[str, Tensor], neutral: float) -> Change:
    """A change of a fused weight by its matrices: those whose rows of B (3 width, R) are not all `neutral`."""
    rows: dict[str, Tensor] = dict(zip(MATRICES, whole["B"].chunk(len(MATRICES)), strict=True))
    used = [name for name, own in rows.items() if bool((own != neutral).any())] or [*MATRICES]
    if "A" not in whole:
        return Change({"B": torch.cat([rows[name] for name in used])}, frozenset(used))
    columns = {name: own.tensor_split(len(used), 1) for name, own in rows.items()}
    apart = whole["A"].shape[0] % len(used) == 0 and not any(
        bool(block.any()) for at, name in enumerate(used) for i, block in enumerate(columns[name]) if i != at
    )
    if apart:  # each matrix has columns of B, and rows of A, of its own
        return Change(
            {"A": whole["A"], "B": torch.cat([columns[name][at] for at, name in enumerate(used)])}, frozenset(used)
        )
    stacked = {"A": whole["A"].repeat(len(used), 1), "B": torch.cat([rows[name] for name in used])}
    return Change(stacked, frozenset(used))


def _widened(change: Change, r: int) -> dict[str, Tensor]:
    """The tensors with zeros up to the rank r."""
    found = dict(change.tensors)
    if "A" in found and (more := r - change.rank):
        parts = len(change.matrices) or 1
        found["A"] = F.pad(found["A"].unflatten(0, (parts, -1)), (0, 0, 0, more)).flatten(0, 1)
        found["B"] = F.pad(found["B"], (0, more))
    return found


def _places(
    sites: Mapping[str, Site], changes: Mapping[str, Change], places: Places, base: Structure
) -> dict[str, Any]:
    """The fields that say where. Raises: UsageError naming a layer that they cannot, or a block unlike the others."""
    blocks, by_block = list(base.blocks), dict[int, frozenset[str]]()
    for path, site in sites.items():
        block = block_of(path, base)
        inner = "" if block is None else path[len(block) + 1 :]
        names = changes[path].matrices or {places.matrix(site, inner)}
        if block is None or "" in names:
            known = f"q, k and v, {places.intermediate} and {places.output}"
            raise UsageError(f"AdapterHub has no place at {path}; in this model it has {known}", INSTEAD)
        by_block[blocks.index(block)] = by_block.get(blocks.index(block), frozenset()) | names
    first = next(iter(by_block.values()))
    if other := next((at for at, names in by_block.items() if names != first), None):
        raise UsageError(f"{blocks[other]} has other layers adapted than the first; AdapterHub has one list", INSTEAD)
    return {
        "selfattn_lora": bool(first & set(MATRICES)),
        "intermediate_lora": "intermediate" in first,
        "output_lora": "output" in first,
        "attn_matrices": [matrix for matrix in MATRICES if matrix in first],
        "leave_out": [at for at in range(len(blocks)) if at not in by_block],
    }
