"""ReFT: the residual stream behind each block is edited in a few directions, at a prompt's first and last tokens.

    LoReFT, NoReFT   h' = h + R^T (W h + b - R h)        DiReFT   h' = h + R^T (W h + b)

The rows of LoReFT's R are orthonormal: R^T = -B H(A) [I; 0], where B and H(A) are products of r reflections. B makes R
what it is at the start and is never trained; A, read above its diagonal, starts at zeros. So torch's orthogonal
parametrization trains R, but for the size of B. Positions and dropout are those of AdapterHub's `adapters` 1.3.0,
counted among the row's own tokens.

Paper: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models" (arXiv:2404.03592).
Shapes: W, R, A and what B is made of are (r, hidden), b is (r,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.kernels.reflections import orthonormal_rows, reflections_to
from inlay.values import Count, Help

from .common import ACTIVATIONS, Activation, in_layers
from .contract import Dropout, Layers, Method, Params, Site, Structure, Tokens

__all__ = ["DiReFT", "LoReFT", "NoReFT", "ReFT"]

Positions = Annotated[int, Ge(0), Le(4096)]


@dataclass(frozen=True)
class ReFT(Method):
    """Settings, by AdapterHub's names: `r` is the number of directions; the first `prefix_positions` and the last
    `suffix_positions` tokens of a prompt are edited, with the same parameters where weights are tied; where both reach
    a token, it is edited as one of the last. `dropout` is the share of an edited stream that training drops.
    """

    paper = "arXiv:2404.03592"
    lr = 3e-4  # a third of the paper's 9e-4 for LLaMA, where film reviews are learned worse or not (docs/methods.md)
    placed_by_settings = True
    projection: ClassVar[tuple[tuple[str, str], ...]] = (("R", "projection.weight"),)
    subtracts: ClassVar[bool] = True

    r: Annotated[Count, Help("directions that are edited; 1 to 8 is usual")] = 1
    prefix_positions: Annotated[Positions, Help("tokens edited at a prompt's beginning")] = 3
    suffix_positions: Annotated[Positions, Help("tokens edited at a prompt's end")] = 0
    tied_weights: Annotated[bool, Help("edit both ends with the same parameters")] = False
    non_linearity: Annotated[Activation | None, Help("around W h + b; none where unset")] = None
    dropout: Dropout = 0.05
    layers: Layers = None

    @property
    def causal(self) -> bool:
        return not self.suffix_positions

    def sites(self, base: Structure) -> list[Site]:
        if not self.units:
            raise UsageError(f"{self.title} edits no position", "Set prefix_positions or suffix_positions.")
        inside = {module for stack in base.stacks for module in stack.modules()}  # the rest sees no rows of tokens
        sites = in_layers([site for site in base.block_sites if site.module in inside], self.layers, base)
        if not sites:
            raise UsageError(f"{self.title} finds no stream behind blocks in this base", "Choose LoRA.")
        return sites

    def check_fit(self, sites: Sequence[Site]) -> None:
        if narrow := next((site for site in sites if self.r >= site.out_features), None):
            what = f"{self.title}'s r is {self.r}, and {narrow.path} gives {narrow.out_features} features"
            raise UsageError(what, "1 to 8 is usual.")

    @property
    def units(self) -> list[str]:
        """Which parameters there are: those of the first tokens, those of the last."""
        first, last = self.prefix_positions > 0, self.suffix_positions > 0
        return ["0"] * (first or (last and self.tied_weights)) + ["1"] * (last and not self.tied_weights)

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        self.check_fit([site])
        wide, bound, params = (self.r, site.out_features), site.out_features**-0.5, {}
        for unit in self.units:
            for name, shape in {"W": wide, "b": wide[:1], "R": wide}.items():
                params[name + unit] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            if self.untrained:
                q, upper = torch.linalg.qr(params.pop("R" + unit).t())
                params["B" + unit] = reflections_to((q * upper.diagonal().sign()).t())
                params["A" + unit] = torch.zeros(wide)
        return params

    def derive(self, params: Params, site: Site | None) -> Params:
        units = self.units if site is not None and self.untrained else []
        made = {unit: orthonormal_rows(params["A" + unit], params["B" + unit]) for unit in units}
        return {"R" + unit: rows.to(params["W" + unit].dtype) for unit, rows in made.items()}

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        position, length = tokens.position.to(y.device), tokens.length.to(y.device)
        own = (position >= 0) & (position < length)
        first, last = own & (position < self.prefix_positions), own & (position >= length - self.suffix_positions)
        edited = {"0": first | last} if self.tied_weights else {"0": first, "1": last}
        out = y
        for unit in self.units:
            source = F.linear(y, params["W" + unit], params["b" + unit])
            source = source if self.non_linearity is None else ACTIVATIONS[self.non_linearity](source)
            if self.subtracts:
                source = source - F.linear(y, params["R" + unit])
            made = tokens.dropout(y + source @ params["R" + unit], self.dropout)
            out = torch.where(edited[unit][:, None], made, out)
        return out

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        wide, keys = (self.r, site.out_features), {}
        for unit in self.units:
            for name, end in (("W", "learned_source.weight"), ("b", "learned_source.bias"), *self.projection):
                keys[name + unit] = f"reft_layer.units.{unit}.{end}", wide[:1] if name == "b" else wide
        return keys

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> ReFT:
        return cls(**{field.name: config[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class LoReFT(ReFT):
    """The edit replaces what a few orthonormal directions of the stream hold."""

    title = "LoReFT"
    peft_type = "LOREFT"
    projection = (("A", "projection.original"), ("B", "projection.base"))
    untrained = frozenset({"B0", "B1"})
    uncast = ("A0", "A1", "B0", "B1")  # rows of R that are rounded before they are made are not orthonormal


@dataclass(frozen=True)
class NoReFT(ReFT):
    """LoReFT whose directions need not be orthonormal."""

    title = "NoReFT"
    peft_type = "NOREFT"


@dataclass(frozen=True)
class DiReFT(ReFT):
    """NoReFT that adds to the stream and takes nothing from it."""

    title = "DiReFT"
    peft_type = "DIREFT"
    subtracts = False
