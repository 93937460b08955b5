"""What AdapterHub's LoRAConfig describes: a product beside linear layers, a scale of what they give, or both.

    y = W x + b + s B A x        y = (W x + b) * l        y = m / |W + B A| * (W x + b + s B A x)

The last one, its DoRA, multiplies the base's bias too, and its norms leave s out: it is read where layers have no bias,
with m by so much larger as the norms here, of W + s B A, are. VeRA's two vectors are the diagonals of whole matrices
there, all of whose numbers are trained: where they are no longer diagonal, it is read as the LoRA that it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inlay.errors import FormatError
from inlay.methods.contract import Site
from inlay.methods.dora import DoRA, row_norms
from inlay.methods.gated_lora import GatedLoRA
from inlay.methods.ia3 import IA3
from inlay.methods.lora import LoRA
from inlay.methods.merged_linear import MergedLoRA
from inlay.methods.vera import VeRA

from .adapterhub_keys import MATRICES, HubFile, block_of, check_blocks, check_settings
from .peft import CONSTANTS, Stored

__all__ = ["read_linear"]

SETTINGS = (
    "architecture", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out", "r", "alpha", "dropout",
    "attn_matrices", "composition_mode", "init_weights", "init_weights_seed", "dtype", "use_dora", "use_gating",
    "vera_d", "vera_b",
)  # fmt: skip
OLD = ("adapters.0.", "adapters.1.0.")
"""Releases whose LoRA left alpha / r out, whatever the config says."""
LOAD_THERE = "Load it with AdapterHub."


def read_linear(config: Mapping[str, Any], file: HubFile) -> list[Stored]:
    """The methods that a LoRAConfig describes, with their values: one for separate layers, one for fused weights.

    Raises: FormatError naming what Inlay does not have, or what is missing or misshapen.
    """
    check_settings(config, {}, SETTINGS, file.where)
    own = file.take("loras")
    known = {site.path: site for site in file.base.projections}
    if strange := next((path for path in own if path not in known), None):
        raise FormatError(f"{file.where} adapts {strange!r}, which is no linear layer here", "It is of another base.")
    sites = {path: site for path, site in known.items() if path in own}
    _check_named(config, sites, file)
    check_blocks(sites.values(), config.get("leave_out") or [], file.base, file.where)
    if config["composition_mode"] not in ("add", "scale"):
        what = f"{file.where} sets composition_mode to {config['composition_mode']!r}"
        raise FormatError(what, 'AdapterHub has "add" and "scale".')
    if config["composition_mode"] == "add" and file.version.startswith(OLD):
        config = {**config, "alpha": config["r"]}
    shared = file.take_shared("lora_")
    if config["composition_mode"] == "scale":
        return [_Reading(config, sites, own, shared, file.where).scales()]
    fused = {path: site for path, site in sites.items() if site.role == "qkv"}
    plain = {path: site for path, site in sites.items() if path not in fused}
    return [_Reading(config, some, own, shared, file.where).products() for some in (plain, fused) if some]


def _check_named(config: Mapping[str, Any], sites: Mapping[str, Site], file: HubFile) -> None:
    """Raises: FormatError naming layers that the config speaks of and the file has nothing for, or the other way."""
    named = set(config["attn_matrices"]) & set(MATRICES) if config["selfattn_lora"] is True else set[str]()
    attending = [site for site in sites.values() if site.part != "mlp"]
    found = named if any(site.role == "qkv" for site in attending) else {site.role for site in attending}
    others = {path.removeprefix(block_of(path, file.base) or "") for path, site in sites.items() if site.part == "mlp"}
    count = sum(config[name] is True for name in ("intermediate_lora", "output_lora"))
    lost = [f"the matrix {one!r}" for one in sorted(named - found)] + ["a layer of each MLP"] * (len(others) < count)
    if lost or not sites:
        what = f"{file.where} names {lost[0]} but holds nothing for it" if lost else f"{file.where} adapts no layer"
        raise FormatError(what, "The checkpoint is not whole.")
    more = [f"the matrix {one!r}" for one in sorted(found - named)] + ["layers of MLPs"] * (len(others) > count)
    if more or (attending and not named):
        what = more[0] if more else "attention"
        raise FormatError(f"{file.where} adapts {what}, which its config does not name", "Check its config.")


class _Reading:
    """One LoRAConfig at some sites; where it is of products, all of them fused or none."""

    def __init__(
        self, config: Mapping[str, Any], sites: Mapping[str, Site], own: Mapping[str, Mapping[str, Tensor]],
        shared: Mapping[str, Tensor], where: str,
    ) -> None:  # fmt: skip
        self.config, self.sites, self.own, self.shared, self.where = config, sites, own, shared, where
        self.targets, self.fused = list(sites), any(site.role == "qkv" for site in sites.values())
        self.enabled = [matrix in config["attn_matrices"] for matrix in MATRICES]
        self.gated, self.normed = bool(config.get("use_gating")), bool(config.get("use_dora"))
        self.has_shared = config.get("vera_d") is not None or config.get("vera_b") is not None

    def products(self) -> Stored:
        more = self.gated or self.normed or self.has_shared
        if self.fused and more:
            raise FormatError(f"{self.where} is more than LoRA on fused weights, which is not read", LOAD_THERE)
        if self.gated and (self.normed or self.has_shared):
            raise FormatError(f"{self.where} has a gate beside more than LoRA, which Inlay does not have", LOAD_THERE)
        if self.gated:
            return GatedLoRA(r=self.r, targets=self.targets, dropout=self.config["dropout"]), self._gated()
        if self.normed:
            return DoRA(targets=self.targets, **self.settings), self._magnitudes()
        if self.has_shared and (diagonal := self._diagonals()):
            return diagonal
        if self.fused:
            return MergedLoRA(targets=self.targets, enable_lora=self.enabled, **self.settings), self.pairs
        return LoRA(targets=self.targets, **self.settings), self.pairs

    @property
    def r(self) -> int:
        return self.config["r"]

    @property
    def settings(self) -> dict[str, Any]:
        return {"r": self.r, "alpha": float(self.config["alpha"]), "dropout": self.config["dropout"]}

    def _get(self, path: str, end: str, *shape: int) -> Tensor:
        value = self.own[path].get(end)
        if value is None:
            raise FormatError(f"{self.where} lacks {path}.loras ... {end}", "The checkpoint is not whole.")
        if value.shape != shape:
            what = f"{path}.loras ... {end} of {self.where} has the shape {tuple(value.shape)}"
            raise FormatError(what, f"The base and the config need {shape}.")
        return value

    def scales(self) -> Stored:
        """What each layer gives is multiplied by l, and by alpha; parts of a fused weight that are not named by alpha
        alone."""
        if self.gated or self.normed:
            raise FormatError(f"{self.where} is IA³ with a gate or DoRA, which Inlay does not have", LOAD_THERE)
        if not math.isfinite(self.config["alpha"]):
            raise FormatError(f"{self.where} sets alpha to {self.config['alpha']}", "It should be a number.")
        values: dict[str, dict[str, Tensor]] = {}
        for path, site in self.sites.items():
            named = self.enabled if site.role == "qkv" else [True]
            rows = torch.tensor(named).repeat_interleave(site.out_features // len(named))
            stored = self._get(path, "lora_B", int(rows.sum()), 1).flatten()
            scale = stored.new_ones(site.out_features)
            scale[rows] = stored
            values[path] = {"l": scale * self.config["alpha"]}
        return IA3(targets=self.targets, feedforward=[]), values

    # ---- products

    @cached_property
    def pairs(self) -> dict[str, dict[str, Tensor]]:
        """A and B of each layer."""
        return {path: self._pair(path, site) for path, site in self.sites.items()}

    def _pair(self, path: str, site: Site) -> dict[str, Tensor]:
        if self.has_shared:
            d, b = self._get(path, "vera_D", self.r, self.r), self._get(path, "vera_B", *[site.out_features] * 2)
            a0, b0 = self._matrices(site)
            return {"A": d @ a0, "B": b @ b0}
        parts, width = (sum(self.enabled), site.out_features // len(MATRICES)) if self.fused else (1, site.out_features)
        a = self._get(path, "lora_A", parts * self.r, site.in_features)
        return {"A": a, "B": self._get(path, "lora_B", parts * width, self.r)}

    def _gated(self) -> dict[str, dict[str, Tensor]]:
        return {
            path: {
                **self.pairs[path], "gate": self._get(path, "gate.weight", 1, site.in_features),
                "gate_bias": self._get(path, "gate.bias", 1),
            }
            for path, site in self.sites.items()
        }  # fmt: skip

    def _magnitudes(self) -> dict[str, dict[str, Tensor]]:
        values: dict[str, dict[str, Tensor]] = {}
        for path, site in self.sites.items():
            bias = getattr(site.module, "bias", None)
            if bias is not None and bool(bias.any()):
                what = f"{self.where} is DoRA, which multiplies the bias of {path} too in AdapterHub and nowhere else"
                raise FormatError(what, LOAD_THERE)
            if site.transposed:
                raise FormatError(f"{self.where} is DoRA on {path}, whose weight is stored transposed", LOAD_THERE)
            pair, weight = self.pairs[path], site.weight().double()
            a, b = pair["A"].to(weight), pair["B"].to(weight)
            ratio = row_norms(weight, a, b, self.settings["alpha"] / self.r) / row_norms(weight, a, b, 1.0)
            stored = self._get(path, "m.weight", site.out_features, 1).flatten()
            values[path] = {**pair, "m": (stored.to(ratio) * ratio).to(stored)}
        return values

    # ---- VeRA

    def _matrices(self, site: Site) -> tuple[Tensor, Tensor]:
        a, b = self.shared.get("lora_A"), self.shared.get("lora_B")
        if a is None or b is None or a.shape != (self.r, site.in_features) or b.shape != (site.out_features, self.r):
            what = f"{self.where} lacks the matrices that VeRA's layers share, or they do not fit {site.path}"
            raise FormatError(what, "Check its config.")
        return a, b

    def _diagonals(self) -> Stored | None:
        """As VeRA, where all its matrices are diagonal."""
        values: dict[str, dict[str, Tensor]] = {}
        for path, site in self.sites.items():
            d, b = self._get(path, "vera_D", self.r, self.r), self._get(path, "vera_B", *[site.out_features] * 2)
            if not all(torch.equal(square, square.diagonal().diag()) for square in (d, b)):
                return None
            values[path] = {"d": d.diagonal() * (self.config["alpha"] / self.r), "b": b.diagonal()}
        a, b = self._matrices(next(iter(self.sites.values())))
        values[CONSTANTS] = {"A": a, "B": b}
        return VeRA(r=self.r, targets=self.targets, dropout=self.config["dropout"]), values
