"""Bottlenecks in AdapterHub's files: a BnConfig, whose flags say which method it is.

The names of its settings are those of the methods here. An invertible adapter is a part of its own here, and settings
of the same config there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from inlay.errors import FormatError
from inlay.methods.bottleneck import Bottleneck
from inlay.methods.contract import Site
from inlay.methods.invertible import Invertible
from inlay.methods.table import METHODS

from .adapterhub_keys import HubFile, block_of
from .adapterhub_places import check_compared
from .peft import Stored

__all__ = ["COUPLINGS", "hub_end", "hub_shared_end", "read_bottleneck", "spot_of"]

BESIDE = {"attention_adapters": "attention", "output_adapters": "mlp", "cross_attention_adapters": "cross-attention"}
"""Modules of AdapterHub's own in a block, and the part that they stand behind."""
PASSED = (
    "architecture", "init_weights_seed", "phm_c_init", "hypercomplex_nonlinearity", "phm_layer", "inv_adapter",
    "inv_adapter_reduction_factor", "leave_out",
)  # fmt: skip
OF_PHM = ("phm_", "shared_", "factorized_", "learn_phm")
"""How settings begin that say something of Compacter alone."""
COUPLINGS = "invertible_adapters."
LOAD_THERE, NOT_WHOLE = "Load it with AdapterHub.", "The checkpoint is not whole."


def read_bottleneck(config: Mapping[str, Any], file: HubFile) -> list[Stored]:
    """The methods that a BnConfig describes, with their values.

    Raises: FormatError naming what Inlay does not have, or what is missing or misshapen.
    """
    method = _method(config, file)
    check_compared(file.base, "bottlenecks", file.where, method.original_ln_before)
    sites = {(block_of(site.path, file.base), site.part): site for site in method.sites(file.base)}
    values: dict[str, dict[str, Tensor]] = {}
    for place, stored in file.take("adapters").items():
        site = sites.pop(spot_of(place, file), None)
        if site is None:
            what = f"{file.where} has an adapter at {place}, where its config has none"
            raise FormatError(what, "Check it, or name the base that it was trained on.")
        values[site.path] = _values(method, site, stored, place, file.where)
    if sites:
        block, part = next(iter(sites))
        raise FormatError(f"{file.where} lacks the adapter behind the {part} of {block}", NOT_WHOLE)
    ordered = {site.path: values[site.path] for site in method.sites(file.base)}
    if keys := method.shared_keys(method.sites(file.base)):
        ordered[""] = _shared({name: (hub_shared_end(key), shape) for name, (key, shape) in keys.items()}, "phm_", file)
    inverse = _invertible(config, file)
    return [(method, ordered), *([] if inverse is None else [inverse])]


def _method(config: Mapping[str, Any], file: HubFile) -> Bottleneck:
    kind = _kind(config)
    known = {field.name for field in dataclasses.fields(kind)}
    for name, value in config.items():
        if name not in known and name not in PASSED and not name.startswith(OF_PHM):
            raise FormatError(f"{file.where} sets {name} to {value!r}, which Inlay does not know", LOAD_THERE)
    given = {name: value for name, value in config.items() if name in known and name != "leave_out"}
    factor = given["reduction_factor"]
    if isinstance(factor, Mapping) and len(file.base.stacks) > 1:  # whose blocks are counted on from stack to stack
        if len(set(factor.values())) != 1 or "default" not in factor:
            raise FormatError(f"{file.where} has several reduction_factors in an encoder-decoder", LOAD_THERE)
        given["reduction_factor"] = factor["default"]
    out = config.get("leave_out") or None
    if out and len(file.base.stacks) > 1:
        raise FormatError(f"{file.where} leaves out blocks of an encoder-decoder", LOAD_THERE)
    return kind(**given, leave_out=out)  # pyright: ignore


def _kind(config: Mapping[str, Any]) -> type[Any]:
    """The class whose defaults are nearest; all settings are said, so that any would do the same."""
    both = config["mh_adapter"]
    if config.get("phm_layer"):
        return METHODS["compacter" if both else "compacter++"]
    if config.get("is_parallel"):
        return METHODS["parallel"]
    if not config.get("original_ln_after", True):
        return METHODS["adapter_plus"]
    return METHODS["houlsby" if both else "pfeiffer"]


def spot_of(place: str, file: HubFile) -> tuple[str | None, str]:
    """The block and the part of it that a module's adapter stands behind."""
    block = block_of(place, file.base)
    inner = "" if block is None else place[len(block) + 1 :]
    if inner in BESIDE:
        return block, BESIDE[inner]
    parts = {site.part for site in file.base.sublayers if site.path.startswith(f"{place}.")}
    return block, parts.pop() if len(parts) == 1 else ""


def _values(method: Bottleneck, site: Site, stored: Mapping[str, Tensor], place: str, where: str) -> dict[str, Tensor]:
    left, found = dict(stored), dict[str, Tensor]()
    for name, (end, shape) in method.peft_keys(site).items():
        key = hub_end(end, method)
        value = left.pop(key, None)
        if value is None or tuple(value.shape) != shape:
            got = "lacks it" if value is None else f"has {tuple(value.shape)}"
            what = f"{place}.adapters ... {key} should be of shape {shape}; {where} {got}"
            raise FormatError(what, "Check its config.")
        found[name] = value
    if method.ln_before:  # the norm is held twice
        left = {key: value for key, value in left.items() if not key.startswith("adapter_down.0.")}
    if left:
        raise FormatError(f"{where} holds {place}.adapters ... {next(iter(left))}, of no use", "Check its config.")
    return found


def hub_end(end: str, method: Any) -> str:
    """The end of a key of AdapterHub's from that of a method's own."""
    if end.startswith(("adapter_down.", "adapter_up.")):
        layer, _, name = end.partition(".")
        if hasattr(method, "phm_dim"):
            name = {"left": "W_left", "right": "W_right", "bias": "b"}.get(name, name)
        inner = ("1." if method.ln_before else "0.") if layer == "adapter_down" else ""
        return f"{layer}.{inner}{name}"
    return end


def hub_shared_end(key: str) -> str:
    """The same for what all places share."""
    name = key.removeprefix("shared_parameters.")
    place, _, rest = name.partition("_")
    return name if place not in ("down", "up") else f"W_{place}" if rest == "W" else f"W_{place}_{rest}"


def _shared(keys: Mapping[str, tuple[str, tuple[int, ...]]], begin: str, file: HubFile) -> dict[str, Tensor]:
    stored = {**file.take_shared(begin), **file.take_shared("W_")}
    found: dict[str, Tensor] = {}
    for name, (end, shape) in keys.items():
        value = stored.get(end)
        if value is None or tuple(value.shape) != shape:
            what = f"{file.where} lacks the shared {end}, or it is not of shape {shape}"
            raise FormatError(what, "Check its config.")
        found[name] = value
    return found


def _invertible(config: Mapping[str, Any], file: HubFile) -> Stored | None:
    """The coupling of the embeddings; AdapterHub's own heads undo it, and no others do."""
    kind = config.get("inv_adapter")
    if kind is None:
        return None
    if kind != "nice":
        what = f"{file.where} sets inv_adapter to {kind!r}, which AdapterHub itself cannot run"
        raise FormatError(what, "Train it with nice.")
    method = Invertible(
        inv_adapter=kind, inv_adapter_reduction_factor=config["inv_adapter_reduction_factor"],
        non_linearity=config["non_linearity"], undo=file.own_heads,
    )  # fmt: skip
    stored = {end: value for ends in file.take("invertible_adapters").values() for end, value in ends.items()}
    found: dict[str, Tensor] = {}
    for name, (key, shape) in method.shared_keys(method.sites(file.base)).items():
        value = stored.get(key.removeprefix(COUPLINGS))
        if value is None or tuple(value.shape) != shape:
            raise FormatError(f"{file.where} lacks {key}, or it is not of shape {shape}", NOT_WHOLE)
        found[name] = value
    return method, {"": found}
