"""loralib's state dicts: LoRA factors by module, without alpha and without the enabled parts of fused weights.

`lora.Linear` and `lora.Embedding` keep A (r, in) and B (out, r). `lora.MergedLinear` keeps, for n enabled parts of
equal width, A (n r, in) and B (n width, r), part by part, as `inlay.methods.merged_linear` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.files import written_beside
from inlay.methods.bitfit import BitFit
from inlay.methods.contract import LinearForm, Method, Site, Structure
from inlay.methods.lora import LoRA
from inlay.methods.merged_linear import MergedLoRA

from .names import true_names
from .parts import ROOT, SavedPart
from .tensors import check_numbers, read_tensors
from .weights import taken_weights

__all__ = ["read_loralib", "write_loralib"]

Tensors = dict[str, dict[str, Tensor]]


def read_loralib(
    file: Path, base: Structure, alpha: float | None, enabled: Sequence[bool] | None = None
) -> list[tuple[Method, Tensors]]:
    """The LoRA in a state dict, with the `alpha` it was trained with and the `enabled` parts of fused weights; then
    what stands beside it: biases (lora_state_dict's "all" and "lora_only"), and the base's own weights where they
    differ from those here.

    Raises: UsageError where alpha or enabled is needed and not said; FormatError naming what does not fit.
    """
    if alpha is None:
        raise UsageError(f"{file} does not say its alpha", "Give alpha=... as it was in training.")
    named = true_names(read_tensors(file), base, str(file))
    stored = {key.removeprefix(ROOT): named.pop(key) for key in [*named] if key.rpartition(".")[2].startswith("lora_")}
    sites = {site.path: site for site in [*base.embeddings, *base.projections]}
    pairs = _pairs(file, stored, sites)
    whole: Tensors = {}
    fused: Tensors = {}
    for path, (a, b) in pairs.items():
        parts, out = a.shape[0] // max(1, b.shape[1]), sites[path].out_features
        of_parts = parts > 1 or (b.shape[0] != out and enabled is not None)
        if of_parts:
            out = _height(file, path, parts, sites[path], enabled)
        if a.shape != (parts * b.shape[1], sites[path].in_features) or b.shape[0] != out:
            what = f"{path!r} in {file} has A {tuple(a.shape)} and B {tuple(b.shape)}"
            raise FormatError(f"{what}, which do not fit the base", "It was trained on another base.")
        (fused if of_parts else whole)[path] = {"A": a, "B": b}
    found = _beside(file, named, base)
    parts_said: dict[str, Any] = {"enable_lora": list(enabled or ())}
    for kind, tensors, more in ((LoRA, whole, {}), (MergedLoRA, fused, parts_said)):
        ranks = {re.escape(path): own["B"].shape[1] for path, own in tensors.items()}
        if tensors:
            found.append((kind(alpha=alpha, targets=list(tensors), rank_pattern=ranks, **more), tensors))
    return found


def _beside(file: Path, stored: dict[str, Tensor], base: Structure) -> list[tuple[Method, Tensors]]:
    """What else a state dict holds. Raises: FormatError naming a tensor that is of no module of the base."""
    sites = {site.path for site in [*base.projections, *base.norms]}
    paths = [key.removeprefix(ROOT).removesuffix(".bias") for key in stored if key.endswith(".bias")]
    biases = {path: {"bias": stored.pop(f"{ROOT}{path}.bias")} for path in paths if path in sites}
    for path, own in biases.items():
        check_numbers(f"{path}.bias", own["bias"], str(file))
    own = taken_weights(stored, base, str(file))
    if stored:
        raise FormatError(
            f"{file} holds {next(iter(stored))!r}, which belongs to no module of the base", "Check the base."
        )
    found: list[tuple[Method, Tensors]] = [] if own is None else [own]
    return [*found, (BitFit(targets=list(biases)), biases)] if biases else found


def write_loralib(file: Path, parts: Sequence[SavedPart], enabled: Sequence[bool] | None = None) -> float:
    """Write the one part of an adapter, a method whose form is a low-rank product alone, as a state dict that loralib
    loads with `strict=False`.

    `enabled` says which of the equal parts of a fused weight are adapted; they are written part by part.
    Returns: the alpha to build loralib's modules with. Raises: UsageError where the method is more than a product, its
    modules need different alphas, or B does not fall into the enabled parts.
    """
    if len(parts) > 1:
        raise UsageError(f"loralib has no place for {len(parts)} parts", 'Save it with format="peft".')
    part, tensors = parts[0], dict[str, Tensor]()
    if experts := next((site.path for site in part.sites.values() if site.experts), None):
        raise UsageError(f"loralib has no place for parameters of experts ({experts})", 'Save it with format="peft".')
    alphas: set[float] = set()
    for site in part.sites.values():
        a, b, scale = _factors(part.method, {**part.constants, **part.params.get(site.path, {})}, site)
        r = a.shape[0]
        if enabled is not None and site.role == "qkv":
            b, r = _collected(site, b, enabled), r // sum(enabled)
        alphas.add(round(scale * r, 9))
        tensors[f"{site.path}.lora_A"], tensors[f"{site.path}.lora_B"] = a.contiguous(), b.contiguous()
    if len(alphas) > 1:
        raise UsageError(f"the adapter's modules have the alphas {sorted(alphas)}", 'Save it with format="peft".')
    with written_beside(file) as beside:
        if file.suffix == ".safetensors":
            save_file(tensors, beside)
        else:
            torch.save(tensors, beside)
    return alphas.pop()


def _factors(method: Method, params: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor, float]:
    """A (r, in), B (out, r) and the scale of their product, on the CPU. Raises: UsageError where that is not all."""
    form = method.form({**params, **method.derive(params, site)}, site) if method.has_form() else LinearForm()
    more = (form.in_scale, form.out_scale, form.shift)
    found = form.factors()
    if found is None or any(one is not None for one in more):
        raise UsageError(f"loralib has no {method.title}", 'Save it with format="peft".')
    a, b = (factor.detach().cpu() for factor in found)
    return a, b, form.scale / site.table_scale


def _pairs(file: Path, stored: Mapping[str, Tensor], sites: Mapping[str, Site]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module. Raises: FormatError naming the key that is missing or belongs to no module."""
    if not stored:
        raise FormatError(f"{file} holds no lora_A and lora_B", "Save it with loralib.lora_state_dict.")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key in stored:
        path, _, end = key.rpartition(".")
        if path not in sites or end not in ("lora_A", "lora_B"):
            raise FormatError(f"{file} holds {key!r}, which belongs to no module of the base", "Check the base.")
        for other in (f"{path}.lora_A", f"{path}.lora_B"):
            if other not in stored:
                raise FormatError(f"{file} lacks {other!r}", "The checkpoint is not whole.")
        found[path] = (stored[f"{path}.lora_A"], stored[f"{path}.lora_B"])
        check_numbers(key, stored[key], str(file))
    return {path: found[path] for path in sites if path in found}


def _height(file: Path, path: str, parts: int, site: Site, enabled: Sequence[bool] | None) -> int:
    """The rows of B (n width, r) for the n enabled parts. Raises: UsageError where other parts, or none, are said."""
    if enabled is None or sum(enabled) != parts or site.out_features % len(enabled):
        said = "nothing was said" if enabled is None else f"enabled={list(enabled)}"
        raise UsageError(f"{path!r} in {file} holds {parts} parts of a fused weight, {said}", "Give enabled=[...].")
    return parts * (site.out_features // len(enabled))


def _collected(site: Site, b: Tensor, enabled: Sequence[bool]) -> Tensor:
    """The rows of enabled parts: B (out, n r) as (n width, r). Raises: UsageError where B has more than those parts."""
    parts = sum(enabled)
    width, r = site.out_features // len(enabled), b.shape[1] // max(1, parts)
    left, pieces = b.clone(), []
    for n, place in enumerate(i for i, on in enumerate(enabled) if on):
        rows, columns = slice(place * width, (place + 1) * width), slice(n * r, (n + 1) * r)
        pieces.append(b[rows, columns])
        left[rows, columns] = 0
    if b.shape[1] % max(1, parts) or bool(left.any()):
        raise UsageError(f"{site.path!r} is no LoRA of {parts} separate parts", "Save it without `enabled`.")
    return torch.cat(pieces)
