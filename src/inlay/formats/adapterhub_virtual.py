"""Prefixes and prompts in AdapterHub's files.

A prefix is one tensor of all layers, keys before values, or the network that makes it; a row's own positions begin at 0
there, as if no prefix stood before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import FormatError, UsageError
from inlay.methods.common import ACTIVATIONS
from inlay.methods.contract import Site, Structure
from inlay.methods.gated_prefix import GatedPrefix
from inlay.methods.unmoved import UnmovedPrefix

from .adapterhub_keys import HubFile, HubKey, Written, check_settings, model_prefix
from .adapterhub_places import check_compared, places_of
from .parts import SavedPart
from .peft import Stored

__all__ = ["read_prefix", "read_prompt", "write_prefix", "write_prompt"]

LOCATION, HOLDER = "self_prefix", ".prefix_tuning"
PREFIX_PASSED = (
    "architecture", "encoder_prefix", "cross_prefix", "flat", "prefix_length", "bottleneck_size", "non_linearity",
    "dropout", "use_gating", "shared_gating", "init_weights_seed",
)  # fmt: skip
LOAD_THERE = "Load it with AdapterHub."
PROMPTS = (
    "AdapterHub puts a prompt behind the positions and the norm of an encoder's embeddings, where other libraries and "
    "Inlay put it before them"
)
NETWORK = (
    "wte.weight", "control_trans.0.weight", "control_trans.0.bias", "control_trans.2.weight", "control_trans.2.bias",
)  # fmt: skip


def read_prefix(config: Mapping[str, Any], file: HubFile) -> list[Stored]:
    """The prefix that a PrefixTuningConfig describes, with the gates of its rows; a network is multiplied out."""
    check_settings(config, {"leave_out": []}, PREFIX_PASSED, file.where)
    check_compared(file.base, "prefixes", file.where)
    own = {end: value for ends in file.take("prefix_tunings").values() for end, value in ends.items()}
    if other := next((end for end in own if not end.startswith(LOCATION + ".")), None):
        what = f"{file.where} has prefixes of an encoder or of cross-attention ({other.partition('.')[0]})"
        raise FormatError(what, LOAD_THERE)
    own = {end.removeprefix(LOCATION + "."): value for end, value in own.items()}
    method: Any = UnmovedPrefix(num_virtual_tokens=config["prefix_length"])
    if config.get("use_gating"):
        shared = bool(config["shared_gating"])
        method = GatedPrefix(config["prefix_length"], prefix_projection=False, shared_gating=shared)
    sites = method.sites(file.base)
    ((_, shape),) = method.shared_keys(sites).values()
    prefix = own.get("control_trans") if config["flat"] else _from_network(own, config, file.where)
    if prefix is None or prefix.numel() != shape[0] * shape[1]:
        found = "lacks the prefix" if prefix is None else f"has a prefix of {prefix.numel()} numbers"
        raise FormatError(f"{file.where} {found}, the base needs {shape[0]} times {shape[1]}", "It is of another base.")
    gates = file.take("prefix_gates")
    values = {site.path: _gate(method, site, gates.pop(site.path + HOLDER, {}), file.where) for site in sites}
    if gates:
        raise FormatError(f"{file.where} holds a gate at {next(iter(gates))}, of no use", "Check its config.")
    return [(method, {"": {"prefix": prefix.reshape(shape)}, **{path: own for path, own in values.items() if own}})]


def _gate(method: Any, site: Site, stored: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The gate of one layer, by the names here."""
    found: dict[str, Tensor] = {}
    for name, (end, shape) in method.peft_keys(site).items():
        value = stored.get(end.rpartition(".")[2])
        if value is None or tuple(value.shape) != shape:
            what = f"{where} lacks the gate of {site.path}, or it is not of shape {shape}"
            raise FormatError(what, "Check its config.")
        found[name] = value
    return found


def _from_network(own: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Tensor:
    if lost := next((end for end in NETWORK if end not in own), None):
        raise FormatError(f"{where} lacks {LOCATION}.{lost}", "The checkpoint is not whole.")
    if (name := config["non_linearity"].lower()) not in ACTIVATIONS:
        raise FormatError(f"{where} sets non_linearity to {name!r}, which Inlay does not have", LOAD_THERE)
    table, w1, b1, w2, b2 = (own[end].double() for end in NETWORK)
    return F.linear(ACTIVATIONS[name](F.linear(table, w1, b1)), w2, b2).to(own[NETWORK[0]].dtype)


def write_prefix(part: SavedPart, base: Structure) -> Written:
    """The inverse, without a network. Raises: UsageError where positions are counted from behind the prefix."""
    method, sites = part.method, list(part.sites.values())
    if method.moves_positions:
        what = f"{method.title} counts a row's positions from behind its prefix, AdapterHub from 0"
        raise UsageError(what, 'Save it with format="peft".')
    if places_of(base).hooked:
        raise UsageError("AdapterHub has no prefixes in this model", 'Save it with format="peft".')
    shared = part.params.get("", {})
    params = {**shared, **method.derive(shared, None)}
    pairs = [torch.stack(method.prefix(params, site, i)) for i, site in enumerate(sites)]  # (2, heads, n, head_dim)
    prefix = torch.cat(pairs).permute(2, 0, 1, 3).flatten()  # (n, 2 L, heads, head_dim)
    config = {
        "architecture": "prefix_tuning", "flat": True, "prefix_length": method.prefix_length, "leave_out": [],
        "encoder_prefix": True, "cross_prefix": True, "bottleneck_size": 512, "non_linearity": "tanh", "dropout": 0.0,
        "use_gating": bool(method.peft_keys(sites[0])), "shared_gating": getattr(method, "shared_gating", True),
        "init_weights_seed": None,
    }  # fmt: skip
    holder = ".".join(filter(None, (model_prefix(base), "prefix_tuning")))
    tensors = {HubKey(holder, "prefix_tunings", f"{LOCATION}.control_trans"): prefix}
    for site in sites:
        for name, (end, _) in method.peft_keys(site).items():
            key = HubKey(site.path + HOLDER, "prefix_gates", end.rpartition(".")[2])
            tensors[key] = part.params[site.path][name]
    return config, tensors


def read_prompt(config: Mapping[str, Any], file: HubFile) -> list[Stored]:
    """Raises: FormatError, since no prompt there is one here."""
    raise FormatError(f"{file.where} is prompt tuning: {PROMPTS}", LOAD_THERE)


def write_prompt(part: SavedPart, base: Structure) -> Written:
    """Raises: UsageError, since no prompt here is one there."""
    raise UsageError(f"{part.method.title} is not AdapterHub's: {PROMPTS}", 'Save it with format="peft".')
