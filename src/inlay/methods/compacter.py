"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products of small ones.

    y' = y + act(z H_D + d) H_U + u        H = sum_s rule_s (x) (L_s R_s), for s = 1 to phm_dim

By default all places share one rule. A bottleneck's size is a multiple of `phm_dim`: where hidden / reduction_factor is
none, which AdapterHub's `adapters` 1.3.0 refuses, the next one above it.

Paper: Karimi Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers" (arXiv:2106.04647).
Shapes, with n = phm_dim and r = phm_rank: a rule is (n, n, n), L (n, in / n, r), R (n, r, out / n), W = L R
(n, in / n, out / n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.kernels.phm import phm_matrix, phm_product
from inlay.values import Count, Help, Positive

from .bottleneck import KEYS, Bottleneck
from .bottleneck_settings import Reduction
from .common import ACTIVATIONS, Activation
from .contract import BottleneckForm, Params, Site

__all__ = ["Compacter"]

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Compacter(Bottleneck):
    """Two a block, as Houlsby's. Settings, by AdapterHub's names: without `shared_phm_rule` each matrix has a rule of
    its own; `factorized_phm_rule` and `factorized_phm_W` make rules and W of two factors; `shared_W_phm` is one W for
    all places; without `learn_phm`, rules stay as they start."""

    title = "Compacter"
    paper = "arXiv:2106.04647"
    peft_type = "COMPACTER"
    lr = 3e-3  # the paper's
    placed_by_settings = True  # a place may have no parameters of its own

    reduction_factor: Reduction = 32
    non_linearity: Activation = "gelu"
    phm_dim: Annotated[Count, Help("how many Kronecker products are summed up; divides the hidden size")] = 4
    phm_rank: Annotated[Count, Help("rank of W")] = 1
    factorized_phm_W: Annotated[bool, Help("W is a product of rank phm_rank")] = True
    shared_W_phm: Annotated[bool, Help("one W for all places")] = False
    shared_phm_rule: Annotated[bool, Help("one rule for all places")] = True
    factorized_phm_rule: Annotated[bool, Help("rules are products of rank 1")] = False
    learn_phm: Annotated[bool, Help("train the rules")] = True
    phm_init_range: Annotated[Positive, Help("spread of a shared rule's start")] = 1e-4
    phm_bias: Annotated[bool, Help("biases in the two projections")] = True

    @property
    def untrained(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        places = () if self.learn_phm else ("", "down_", "up_")
        return frozenset(f"{place}phm_rule{side}" for place in places for side in ("", "_left", "_right"))

    def size(self, site: Site) -> int:
        return self.phm_dim * max(1, -(-super().size(site) // self.phm_dim))

    def check_fit(self, sites: Sequence[Site]) -> None:
        if wrong := next((site for site in sites if site.out_features % self.phm_dim), None):
            what = f"{self.title}'s phm_dim is {self.phm_dim}, which does not divide the {wrong.out_features} features"
            raise UsageError(f"{what} of {wrong.path}", "Choose a divisor.")

    def _rules(self, place: str) -> Shapes:
        n = self.phm_dim
        if self.factorized_phm_rule:
            return {f"{place}phm_rule_left": (n, n, 1), f"{place}phm_rule_right": (n, 1, n)}
        return {f"{place}phm_rule": (n, n, n)}

    def _weights(self, site: Site) -> Shapes:
        n, r = self.phm_dim, self.phm_rank
        wide, small = site.out_features // n, self.size(site) // n
        if self.factorized_phm_W:
            down, up = {"down_left": (n, wide, r), "down_right": (n, r, small)}, {"up_left": (n, small, r)}
            return {**down, **up, "up_right": (n, r, wide)}
        return {"down_W": (n, wide, small), "up_W": (n, small, wide)}

    def shapes(self, site: Site) -> Shapes:
        self.check_fit([site])
        found = {} if self.shared_W_phm else self._weights(site)
        found |= {} if self.shared_phm_rule else self._rules("down_") | self._rules("up_")
        found |= {"down_bias": (self.size(site),), "up_bias": (site.out_features,)} if self.phm_bias else {}
        return found | self.further_shapes(site.out_features)

    def shared_shapes(self, sites: Sequence[Site]) -> Shapes:
        """What all places share."""
        if self.shared_W_phm and len({site.out_features for site in sites}) > 1:
            raise UsageError(f"{self.title} has one W for places of different widths", "Unset shared_W_phm.")
        found = self._weights(sites[0]) if self.shared_W_phm else {}
        return found | self._rules("") if self.shared_phm_rule else found

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        return {name: self.drawn(name, shape, generator) for name, shape in self.shared_shapes(sites).items()}

    def drawn(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if len(shape) < 3:
            return super().drawn(name, shape, generator)
        spread = (2 / (shape[1] + shape[2])) ** 0.5
        if "phm_rule" in name:
            spread = self.phm_init_range if self.shared_phm_rule else 0.01
        return torch.randn(shape, generator=generator) * spread

    def _rule(self, params: Params, place: str) -> Tensor:
        name = "phm_rule" if self.shared_phm_rule else f"{place}_phm_rule"
        return params[f"{name}_left"] @ params[f"{name}_right"] if self.factorized_phm_rule else params[name]

    def network(self, params: Params) -> BottleneckForm:
        (down, d), (up, u) = self._whole(params, "down"), self._whole(params, "up")
        return BottleneckForm(down, d, up, u, ACTIVATIONS[self.non_linearity], self.scale(params), self.reads)

    def _whole(self, params: Params, place: str) -> tuple[Tensor, Tensor]:
        w = params[f"{place}_left"] @ params[f"{place}_right"] if self.factorized_phm_W else params[f"{place}_W"]
        matrix = phm_matrix(self._rule(params, place), w).t()
        return matrix, params[f"{place}_bias"] if self.phm_bias else matrix.new_zeros(len(matrix))

    def added(self, params: Params, z: Tensor) -> Tensor:
        if not self.factorized_phm_W:
            return super().added(params, z)
        low = ACTIVATIONS[self.non_linearity](self._projected(params, "down", z))
        return self._projected(params, "up", low) * self.scale(params)

    def _projected(self, params: Params, place: str, x: Tensor) -> Tensor:
        made = phm_product(x, self._rule(params, place), params[f"{place}_left"], params[f"{place}_right"])
        return made + params[f"{place}_bias"] if self.phm_bias else made

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        shapes = self.shapes(site).items()
        return {name: (KEYS.get(name, f"adapter_{name.replace('_', '.', 1)}"), shape) for name, shape in shapes}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (f"shared_parameters.{name}", shape) for name, shape in self.shared_shapes(sites).items()}
