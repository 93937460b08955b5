"""ReFT in AdapterHub's files, where directions are orthonormal by torch's orthogonal parametrization.

    R^T = Q H(X) [I; 0]        Q is the base, (hidden, hidden); X what is trained, (r, hidden), at -I in the beginning

Here R's first reflections are made anew from R, so that what is trained begins at zero again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.kernels.reflections import reflections_to
from inlay.methods.contract import Structure
from inlay.methods.loreft import DiReFT, LoReFT, NoReFT, ReFT

from .adapterhub_keys import HubFile, HubKey, Written, check_settings
from .parts import SavedPart
from .peft import Stored

__all__ = ["read_reft", "write_reft"]

SETTINGS = ("r", "prefix_positions", "suffix_positions", "tied_weights", "non_linearity", "dropout")
PASSED = (
    *SETTINGS, "architecture", "layers", "orthogonality", "subtract_projection", "dtype", "init_weights_seed",
)  # fmt: skip
HOLDER = "reft_layer"
ROWS, ORIGINAL = "projection.weight", "projection.parametrizations.weight.original"
BASE = "projection.parametrizations.weight.0.base"
SOURCE = {"W": "learned_source.weight", "b": "learned_source.bias"}


def read_reft(config: Mapping[str, Any], file: HubFile) -> list[Stored]:
    """The method that a ReftConfig describes, with its values."""
    check_settings(config, {"output_reft": True}, PASSED, file.where)
    layers = None if config["layers"] == "all" else config["layers"]
    method = _kind(config, file.where)(**{name: config[name] for name in SETTINGS if name in config}, layers=layers)
    own, values = file.take("refts"), dict[str, dict[str, Tensor]]()
    for site in method.sites(file.base):
        stored = own.pop(f"{site.path}.{HOLDER}", {})
        if method.tied_weights and any(key.startswith("units.1.") for key in stored):
            raise FormatError(f"{file.where} ties the weights of both ends and holds two", "Check its config.")
        values[site.path] = {}
        for unit in method.units:
            values[site.path] |= _unit(stored, unit, method, site.out_features, file.where, site.path)
    if own:
        what = f"{file.where} holds a ReFT at {next(iter(own))}, where its config has none"
        raise FormatError(what, "Check its config.")
    return [(method, values)]


def _kind(config: Mapping[str, Any], where: str) -> type[ReFT]:
    """Raises: FormatError where the config does not say which of two methods it is."""
    if config["orthogonality"]:
        return LoReFT
    if "subtract_projection" not in config:
        raise FormatError(
            f"{where} is NoReFT or DiReFT: AdapterHub writes into its file nothing that tells them apart",
            'Add "subtract_projection": true (NoReFT) or false (DiReFT) to "config" in its adapter_config.json.',
        )
    return NoReFT if config["subtract_projection"] else DiReFT


def _unit(
    stored: Mapping[str, Tensor], unit: str, method: ReFT, width: int, where: str, path: str
) -> dict[str, Tensor]:
    def get(end: str, *shape: int) -> Tensor:
        value = stored.get(f"units.{unit}.{end}")
        if value is None or value.shape != shape:
            found = "lacks" if value is None else f"has the shape {tuple(value.shape)} at"
            raise FormatError(f"{where} {found} {path}.{HOLDER} ... units.{unit}.{end}", f"It should be {shape}.")
        return value

    r = method.r
    found = {"W" + unit: get(SOURCE["W"], r, width), "b" + unit: get(SOURCE["b"], r)}
    if not method.untrained:
        return found | {"R" + unit: get(ROWS, r, width)}
    rows = _rows(get(ORIGINAL, r, width), get(BASE, width, width))
    return found | {"B" + unit: reflections_to(rows), "A" + unit: torch.zeros_like(rows)}


def _rows(original: Tensor, base: Tensor) -> Tensor:
    """Orthonormal rows (r, hidden), as torch's parametrization makes them, in float64."""
    x = original.double().t()
    below = x.tril(-1)
    tau = 2 / (1 + below.square().sum(0))
    q = torch.linalg.householder_product(below, tau) * x.diagonal().sign()
    return (base.double() @ q).t()


def write_reft(part: SavedPart, base: Structure) -> Written:
    """The inverse: what of R was trained goes into its base."""
    method: Any = part.method
    tensors: dict[HubKey, Tensor] = {}
    if not method.subtracts:
        what = f"AdapterHub takes every {method.title} that it opens for NoReFT"
        raise UsageError(what, 'Save it with format="peft".')
    for site in part.sites.values():
        own = part.params[site.path]
        made = {**own, **method.derive(own, site)}
        for unit in method.units:
            ends = {end: made[name + unit] for name, end in SOURCE.items()}
            if method.untrained:
                ends |= _orthogonal(made["R" + unit])
            else:
                ends[ROWS] = made["R" + unit]
            for end, value in ends.items():
                tensors[HubKey(f"{site.path}.{HOLDER}", "refts", f"units.{unit}.{end}")] = value
    config = {name: getattr(method, name) for name in SETTINGS}
    layers = sorted({site.layer for site in part.sites.values() if site.layer is not None})
    every = len(layers) == len(base.blocks)
    fixed = {"orthogonality": bool(method.untrained), "subtract_projection": True, "output_reft": True}
    return {"architecture": "reft", "layers": "all" if every else layers, "dtype": None, **config, **fixed}, tensors


def _orthogonal(rows: Tensor) -> dict[str, Tensor]:
    """What torch's parametrization makes `rows` (r, hidden) of: a base whose first columns they are, and -I."""
    wide = rows.detach().double().t()
    q = torch.linalg.qr(wide, mode="complete").Q
    base = torch.cat([wide, q[:, wide.shape[1] :]], 1).to(rows)
    return {ORIGINAL: -torch.eye(*rows.shape, dtype=rows.dtype), BASE: base}
