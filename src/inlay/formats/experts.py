"""Experts in HF PEFT's files: how the matrices of many experts are one tensor there, and under which key.

HF PEFT wraps the module once for each of its parameters that it targets, in the order in which the module holds them:
the last one's wrapper is outermost, and each one before it stands under one `base_layer` more. A is (E * r, in), expert
after expert, and B (out, r * E), with the experts innermost. Here A is (E, r, in) and B (E, out, r), under the key of
the parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from inlay.errors import FormatError
from inlay.methods.contract import Site, Structure
from inlay.methods.starts import began_inside
from inlay.sites.parameters import matches, why_no_experts

from .names import without_adapter_name
from .parts import BASE_LAYER, ROOT
from .separate_experts import join_experts

__all__ = ["stacked_keys", "unstacked_keys"]

ENDS = ("lora_A.weight", "lora_B.weight")


def unstacked_keys(tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Tensors of an adapter at `sites` as HF PEFT writes them."""
    made = dict(tensors)
    for site, place in _places([site for site in sites if site.experts]):
        a, b = (made.pop(f"{ROOT}{site.path}.{end}") for end in ENDS)
        if _turned(site):
            a, b = b.mT, a.mT
        made[f"{place}.{ENDS[0]}"] = a.reshape(-1, a.shape[2]).contiguous()
        made[f"{place}.{ENDS[1]}"] = b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()
    return made


def stacked_keys(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], base: Structure, where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse, for a file's config and tensors (by true names): `target_parameters` then are whole paths of
    parameters of experts. Files of experts that were single modules are read too; see `separate_experts`.

    Raises: FormatError naming a target parameter that has no site here, or a tensor that is missing or misshapen.
    """
    sites, layers = _targeted(config, stored, base, where)
    if sites and began_inside(config, where):
        what = f"{where} began with init_lora_weights={config['init_lora_weights']!r} on parameters of experts"
        raise FormatError(what, "No release of HF PEFT makes such an adapter.")
    made = dict(stored)
    for site, place in _places(sites):
        a, b = (made.pop(_stored_key(made, f"{place}.{end}", site, where)) for end in ENDS)
        turned = _turned(site)
        n_in, n_out = (site.out_features, site.in_features) if turned else (site.in_features, site.out_features)
        rank = len(a) // site.experts
        if a.shape != (rank * site.experts, n_in) or b.shape != (n_out, rank * site.experts):
            what = f"the tensors of {place} in {where} have the shapes {tuple(a.shape)} and {tuple(b.shape)}"
            raise FormatError(
                f"{what}, the base has {site.experts} experts of {n_in} and {n_out}", "It is of another base."
            )
        a, b = a.reshape(site.experts, rank, n_in), b.reshape(n_out, rank, site.experts).permute(2, 0, 1)
        a, b = (b.mT, a.mT) if turned else (a, b)
        made |= {f"{ROOT}{site.path}.{end}": value.contiguous() for end, value in zip(ENDS, (a, b), strict=True)}
    for path in base.expert_modules:
        own = tuple(f"{ROOT}{path}.{end}" for end in ("lora_", f"{BASE_LAYER}."))
        if lost := next((key for key in made if key.startswith(own)), None):
            what = f"{where} holds {lost!r}, of a parameter which its target_parameters do not name"
            raise FormatError(what, "Check its config.")
    targets = config.get("target_modules") or []
    if layers and isinstance(targets, str):  # a regular expression
        targets = "|".join([f"(?:{targets})", *map(re.escape, layers)])
    elif layers:
        targets = [*targets, *layers]
    named = {"target_modules": targets, "target_parameters": [site.path for site in sites]}
    return join_experts({**config, **(named if sites or layers else {})}, made, base, where)


def _stored_key(keys: Mapping[str, Tensor], wanted: str, site: Site, where: str) -> str:
    found = wanted if wanted in keys else without_adapter_name(keys, wanted, wanted.removesuffix(".weight"), where)
    if found is None:
        what = f"{where} targets the parameter {site.path!r} but holds no {wanted}"
        raise FormatError(what, "The checkpoint is not whole.")
    return found


def _targeted(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], base: Structure, where: str
) -> tuple[list[Site], list[str]]:
    """The parameters of experts that a config targets, and the plain layers whose weights it does."""
    names = config.get("target_parameters") or []
    if not names:
        return [], []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"target_parameters of {where} are no list of names", "Save the adapter again.")
    weights = {f"{site.path}.weight": site.path for site in base.projections if not site.transposed}
    paths = [path for path, _ in base.model.named_parameters(remove_duplicate=False)]
    known, layers = {site.path for site in base.experts}, []
    for name in names:
        found = [path for path in paths if matches(path, name)]
        strange = next((path for path in found if path not in known and path not in weights), None)
        if strange is not None or not found:
            raise FormatError(f"{where}: {why_no_experts(base, strange or name)[0]}", "Load it with HF PEFT.")
        layers += [weights[path] for path in found if path in weights]
    if lost := next((p for p in layers if not any(k.startswith(f"{ROOT}{p}.lora_A.") for k in stored)), None):
        raise FormatError(f"{where} targets {lost!r} but holds no tensor for it", "The checkpoint is not whole.")
    return [site for site in base.experts if any(matches(site.path, name) for name in names)], layers


def _places(sites: Sequence[Site]) -> Iterator[tuple[Site, str]]:
    """Each site, and the path of its wrapper in a file."""
    for site in sites:
        own = [other for other in sites if other.module is site.module]
        inside = len(own) - 1 - own.index(site)
        yield site, f"{ROOT}{site.path.rpartition('.')[0]}{f'.{BASE_LAYER}' * inside}"


def _turned(site: Site) -> bool:
    """Whether HF PEFT takes the parameter for the transposed of what it is: it goes by a word that the module may lack,
    and then its A is what B is here."""
    return bool(getattr(site.module, "is_transposed", False)) is not site.stored_transposed
