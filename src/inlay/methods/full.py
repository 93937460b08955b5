"""Full fine-tuning: an adapter has its own values of every parameter of the base.

    y = (W + dW) x + (b + db)        the same at tables, norms and parameters of experts

The parameters are the differences, which begin at zeros, so that weight decay pulls towards the base. Weights that
modules share (a table and its head) stay shared: they have one difference. An adapter is as large as the base; its
gradients and an optimizer's state come on top, with AdamW 16 bytes a number in all.

Shapes: dW and db are those of the base's own parameters, weights as (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.targets import GROUPS
from inlay.values import Help

from .contract import LinearForm, Method, Params, Site, Structure, select_projections
from .deltas import delta_form, delta_shapes

__all__ = ["Full"]


@dataclass(frozen=True, eq=False)
class _Held(Site):
    """A site, and what the parameters that other sites share with it are called among the shared ones."""

    shares: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Full(Method):
    """Settings: `targets` are endings of modules' paths, or groups of linear layers; every parameter of the base where
    unset. The learning rate is usual for small models with AdamW; rates a third and three times as large did as well.
    """

    title = "Full fine-tuning"
    paper = "training every parameter of the base"
    peft_type = "FULL"
    placed_by_settings = True
    lr = 5e-5

    targets: Annotated[
        str | Sequence[str] | None, Help("module names or groups; every parameter of the base where unset")
    ] = None

    def sites(self, base: Structure) -> list[Site]:
        linear = [site for site in base.projections if site.path not in base.observed.unusable]
        known: list[Site] = [*base.embeddings, *linear, *base.norms, *base.experts]
        chosen = known if self.targets is None else _named(base, known, self.targets)
        if held := next((site.path for site in chosen if site.quantized), None):
            raise UsageError(f"{held} is quantized and cannot be trained", "Open the base without quantization.")
        owners: dict[int, list[tuple[Site, str]]] = {}
        for site in chosen:
            for name in delta_shapes(site):
                owners.setdefault(id(_parameter(site, name)), []).append((site, name))
        if self.targets is None:
            _check_all(base, owners)
        shared = {
            (site.path, name): f"{held[0][0].path}.{held[0][1]}"
            for held in owners.values() if len(held) > 1 for site, name in held
        }  # fmt: skip
        return [_with(site, {n: shared[p, n] for p, n in shared if p == site.path}) for site in chosen]

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in _own(site).items()}

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in _common(sites).items()}

    def form(self, params: Params, site: Site) -> LinearForm:
        assert isinstance(site, _Held)
        weight, bias = (params.get(site.shares.get(name, name)) for name in ("weight", "bias"))
        assert weight is not None
        return delta_form(site, weight, bias)

    # ---- checkpoints

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (f"full_delta.{name}", shape) for name, shape in _own(site).items()}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (f"base_model.model.{name}.full_delta", shape) for name, shape in _common(sites).items()}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {"targets": [self.targets] if isinstance(self.targets, str) else self.targets}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Full:
        return cls(targets=config.get("targets"))


def _with(site: Site, shares: Mapping[str, str]) -> _Held:
    return _Held(**{f.name: getattr(site, f.name) for f in fields(Site)}, shares=shares)


def _own(site: Site) -> dict[str, tuple[int, ...]]:
    """Shapes of the differences that no other site shares."""
    assert isinstance(site, _Held)
    return {name: shape for name, shape in delta_shapes(site).items() if name not in site.shares}


def _common(sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """Shapes of those that several sites share."""
    found: dict[str, tuple[int, ...]] = {}
    for site in sites:
        assert isinstance(site, _Held)
        shapes = delta_shapes(site)
        found |= {common: shapes[name] for name, common in site.shares.items()}
    return found


def _parameter(site: Site, name: str) -> object:
    return getattr(site.module, site.name if site.experts else name)


def _named(base: Structure, known: Sequence[Site], targets: str | Sequence[str]) -> list[Site]:
    wanted = [targets] if isinstance(targets, str) else list(targets)
    paths: set[str] = set()
    for target in wanted:
        if target in GROUPS:
            paths |= {site.path for site in select_projections(base, target)}
            continue
        found = {site.path for site in known if site.path == target or site.path.endswith("." + target)}
        if not found:
            names = ", ".join(sorted({site.name for site in known}))
            raise UsageError(
                f"full fine-tuning's target {target!r} matches no module that it can train", f"Names: {names}."
            )
        paths |= found
    return [site for site in known if site.path in paths]


def _check_all(base: Structure, owners: Mapping[int, object]) -> None:
    """Raises: UsageError naming a parameter of the base that no site holds."""
    left = [name for name, parameter in base.model.named_parameters() if id(parameter) not in owners]
    if left:
        what = f"{len(left)} parameters of the base, first {left[0]}, belong to no linear layer, table or norm"
        raise UsageError(f"{what} that can be told: full fine-tuning would leave them", "Name modules in targets.")
