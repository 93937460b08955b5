"""Writes bottlenecks and invertible adapters as AdapterHub's BnConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from inlay.errors import UsageError
from inlay.methods.contract import Structure

from .adapterhub_bottleneck import COUPLINGS, hub_end, hub_shared_end
from .adapterhub_keys import HubKey, Written, block_of, model_prefix
from .adapterhub_places import places_of
from .parts import SavedPart

__all__ = ["write_bottleneck", "write_coupling"]

INSTEAD = 'Save it with format="peft".'
OWN = ("layers", "leave_out", "drop_layers", "phm_bias")
"""Settings that are written otherwise, or that AdapterHub does not have."""
PLAIN: Mapping[str, Any] = {
    "inv_adapter": None, "inv_adapter_reduction_factor": None, "phm_layer": False, "init_weights_seed": None,
    "phm_c_init": "normal", "hypercomplex_nonlinearity": "glorot-uniform",
}  # fmt: skip


def write_coupling(part: SavedPart, base: Structure) -> Written:
    """The settings that an invertible adapter adds to a BnConfig, and its tensors.

    Raises: UsageError where it does what AdapterHub does not.
    """
    method: Any = part.method
    if method.undo and len(part.sites) > 1:
        what = f"{method.title} is undone before the head, which AdapterHub does for heads of its own alone"
        raise UsageError(what, f"Train it with undo=false. {INSTEAD}")
    keys = method.shared_keys(list(part.sites.values()))
    tensors = {
        HubKey(model_prefix(base), "invertible_adapters", key.removeprefix(COUPLINGS)): part.params[""][name]
        for name, (key, _) in keys.items()
    }
    names = ("inv_adapter", "inv_adapter_reduction_factor", "non_linearity")
    return {name: getattr(method, name) for name in names}, tensors


def write_bottleneck(part: SavedPart, base: Structure) -> Written:
    """The BnConfig of a part, and its tensors. Raises: UsageError where AdapterHub has no place for it."""
    method: Any = part.method
    if len(base.stacks) > 1:
        raise UsageError(f"{method.title} in an encoder-decoder is not written for AdapterHub", INSTEAD)
    if not hasattr(method, "original_ln_before"):
        raise UsageError(f"AdapterHub has no {method.title}", INSTEAD)
    places = places_of(base)
    if places.hooked and not method.original_ln_after:
        raise UsageError(f"AdapterHub has no {method.title} without original_ln_after in this model", INSTEAD)
    if places.other_stream and method.original_ln_before:
        raise UsageError(f"{method.title} reads the stream that AdapterHub computes otherwise in this model", INSTEAD)
    held = {"attention": places.attention, "mlp": places.mlp}
    tensors: dict[HubKey, Tensor] = {}
    layers: dict[str, set[int]] = {}
    for path, site in part.sites.items():
        block = block_of(path, base)
        if block is None or site.part not in held:
            raise UsageError(f"AdapterHub has no place behind {path}", INSTEAD)
        layers.setdefault(site.part, set()).add(base.blocks[block])
        for name, (end, _) in method.peft_keys(site).items():
            value = part.params[path][name]
            tensors[HubKey(f"{block}.{held[site.part]}", "adapters", hub_end(end, method))] = value
            if name.startswith("norm_before"):  # the norm is held twice
                again = f"adapter_down.0.{end.rpartition('.')[2]}"
                tensors[HubKey(f"{block}.{held[site.part]}", "adapters", again)] = value
    for name, (key, _) in method.shared_keys(list(part.sites.values())).items():
        tensors[HubKey(model_prefix(base), "shared_parameters", hub_shared_end(key))] = part.params[""][name]
    own = {name: value for name, value in dataclasses.asdict(method).items() if name not in OWN}
    if "scale" in next(iter(part.params.values())) and not isinstance(own["scaling"], str):
        own["scaling"] = "learned"
    found = next(iter(layers.values()))
    out = sorted(set(base.blocks.values()) - found)
    phm = {"phm_layer": hasattr(method, "phm_dim"), "phm_bias": getattr(method, "phm_bias", True)}
    return {**PLAIN, **own, **phm, "leave_out": out}, tensors
