"""Methods that act on linear layers alone: where they act, how HF PEFT's config maps to their settings, and how a
change of the whole weight is computed and merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError

from .contract import Layers, LinearForm, Method, Params, Site, Structure, Targets, Tokens, select_projections

__all__ = ["LAYERS", "TARGETS", "DeltaMethod", "LinearMethod", "dense_form", "merged_weight"]

TARGETS: Mapping[str, Any] = {"target_modules": None, "exclude_modules": None, "modules_to_save": None}
LAYERS: Mapping[str, Any] = {"layers_to_transform": None, "layers_pattern": None}
"""Fields of HF PEFT's configs that say where a method acts."""


class LinearMethod(Method):
    """Base of methods on linear layers whose settings are fields of HF PEFT's config, in its order and by its names;
    `renamed` maps those that have other names here to HF PEFT's."""

    renamed: ClassVar[Mapping[str, str]] = {}
    targets: Targets
    layers: Layers

    def sites(self, base: Structure) -> list[Site]:
        sites = select_projections(base, self.targets, self.layers)
        if table := next((site for site in sites if site.is_embedding), None):
            what = f"{self.title} cannot act on {table.path}, which is a table"
            raise UsageError(what, "Name linear layers, or choose LoRA.")
        return sites

    @classmethod
    def _read(cls) -> Mapping[str, str]:
        """The settings that HF PEFT's config has, with their names there."""
        assert cls.peft_fields is not None
        names = {name: cls.renamed.get(name, name) for name in cls.__dataclass_fields__}
        return {name: theirs for name, theirs in names.items() if theirs in cls.peft_fields.read}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        assert self.peft_fields is not None
        found = {theirs: getattr(self, name) for name, theirs in self._read().items()}
        found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}
        if "fan_in_fan_out" in self.peft_fields.passed:
            found["fan_in_fan_out"] = all(site.transposed for site in sites)
        return {**found, "target_modules": [site.path for site in sites]}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Method:
        assert cls.peft_fields is not None
        values: dict[str, Any] = {}
        for name, theirs in cls._read().items():
            value = config.get(theirs)
            values[name] = cls.peft_fields.read[theirs] if value is None else value
        return cls(targets=paths, **values)  # pyright: ignore


class DeltaMethod(LinearMethod):
    """Base of methods that are a change of the whole weight, y + dW x; `form_dropout` falls on that x."""

    @abstractmethod
    def delta(self, params: Params, site: Site) -> Tensor:
        """dW (out, in)."""

    def derive(self, params: Params, site: Site | None) -> Params:
        return {} if site is None else {"delta": self.delta(params, site)}

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        return y + F.linear(tokens.dropout(x, self.form_dropout()).to(y.dtype), params["delta"].to(y.dtype))

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        weight = site.weight()
        return merged_weight(site, weight + params["delta"].to(weight))


def merged_weight(site: Site, weight: Tensor) -> dict[str, Tensor]:
    """`weight` (out, in) as the module's own parameter."""
    return {"weight": weight.t().contiguous() if site.transposed else weight}


def dense_form(delta: Tensor) -> LinearForm:
    """The form that adds dW x for any dW (out, in): as a product with the identity, of the smaller side's rank."""
    rows, columns = delta.shape
    eye = torch.eye(min(rows, columns), dtype=delta.dtype, device=delta.device)
    return LinearForm(delta, eye) if rows <= columns else LinearForm(eye, delta)
