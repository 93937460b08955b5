"""AdapterFusion: at each sublayer, a token attends to what several trained adapters would add there.

    y' = y + sum over the adapters i of p_i V a_i        p = softmax_i((Q z + q) . (K a_i + k))

a_i is what adapter i adds to y, and z the stream behind the sublayer, or y. The adapters stay as they are: Q, K and V
are trained, and V begins as the identity.

Paper: Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning" (arXiv:2005.00247).
Forward, starts and defaults are those of AdapterHub's `adapters` 1.3.0 ("dynamic"; "static" has no V). Shapes: Q, K
and V are (hidden, hidden), q and k (hidden,).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.values import Help

from .around import Values
from .contract import Dropout, Method, Params, Site, Structure, Tokens
from .form import behind

__all__ = ["Fusion"]

KEYS = {"Q": "query.weight", "q": "query.bias", "K": "key.weight", "k": "key.bias", "V": "value.weight"}
PULL = 0.01
"""The weight of |I - V|^2 in the loss."""


@dataclass(frozen=True)
class Fusion(Method):
    """Settings, by AdapterHub's names: `adapters` are names of adapters of the bank, which act on sublayers alone
    (Houlsby, Pfeiffer, parallel and their kin), or folders, which are loaded. `key`, `query` and `value` say which
    matrices there are; `query_before_ln` lets y ask instead of the stream behind the sublayer, as where the adapters
    read y; `residual_before` lets keys and values be y + a_i. `regularization` pulls V towards the identity.

    `targets` are the sublayers, all on which the adapters act where unset. The learning rate is the paper's.
    """

    title = "AdapterFusion"
    paper = "arXiv:2005.00247"
    peft_type = "FUSION"
    placed_by_settings = True
    lr = 5e-5

    adapters: Annotated[Sequence[str], Help("names of the bank's adapters, or folders")] = ()
    key: Annotated[bool, Help("a matrix for what the adapters add")] = True
    query: Annotated[bool, Help("a matrix for what asks")] = True
    value: Annotated[bool, Help("a matrix for what is taken of the adapters")] = True
    query_before_ln: Annotated[bool, Help("ask with what the sublayer gives, not with the stream behind it")] = False
    residual_before: Annotated[bool, Help("attend to what would leave the sublayer, not to what is added")] = False
    regularization: Annotated[bool, Help("pull the value matrix towards the identity")] = True
    dropout: Dropout = 0.0
    targets: Annotated[Sequence[str] | None, Help("paths of sublayers; those of the adapters where unset")] = None

    @property
    def uses(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def over(self, sites: Mapping[str, Sequence[Site]]) -> Self:
        found: dict[str, None] = {}
        for name, own in sites.items():
            if other := next((site for site in own if site.kind != "sublayer"), None):
                what = f"{name!r} acts at {other.path}, which is no sublayer: {self.title} cannot be over it"
                raise UsageError(what, "Name bottleneck adapters, such as Pfeiffer.")
            found |= dict.fromkeys(site.path for site in own)
        if self.targets is None:
            return replace(self, targets=tuple(found))
        if lost := next((path for path in self.targets if path not in found), None):
            raise UsageError(f"none of {', '.join(map(repr, sites))} acts at {lost}", "Leave targets out.")
        return self

    def sites(self, base: Structure) -> list[Site]:
        if len(set(self.adapters)) < 2 or len(set(self.adapters)) < len(self.adapters):
            what = f"{self.title} is over {list(self.adapters)!r}, which are not two adapters or more"
            raise UsageError(what, "Name them in adapters, each once.")
        wanted = set(self.targets or ())
        sites = [site for site in base.sublayers if site.path in wanted]
        if lost := wanted - {site.path for site in sites}:
            raise UsageError(f"{min(lost)} is no sublayer of the base", "Leave targets out.")
        return sites

    def _shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        wide = site.out_features
        found: dict[str, tuple[int, ...]] = {}
        for there, weight, bias in ((self.query, "Q", "q"), (self.key, "K", "k")):
            found |= {weight: (wide, wide), bias: (wide,)} if there else {}
        return {**found, "V": (wide, wide)} if self.value else found

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name, shape in self._shapes(site).items():
            made[name] = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.zeros(shape)
        if self.value:  # as the reference begins
            made["V"] = torch.full_like(made["V"], 1e-6).fill_diagonal_(1.0)
        return made

    def fuse(self, params: Params, x: Tensor, y: Tensor, made: Sequence[Tensor], site: Site, tokens: Tokens) -> Tensor:
        added = torch.stack([own if self.residual_before else own - y for own in made], 1)  # (n, adapters, hidden)
        asks = y if self.query_before_ln else behind(x, y, site)
        query = F.linear(asks, params["Q"], params["q"]) if self.query else asks
        key = F.linear(added, params["K"], params["k"]) if self.key else added
        value = F.linear(added, params["V"]) if self.value else added
        scores = tokens.dropout((key @ query[..., None])[..., 0], self.dropout)
        taken = (scores.softmax(-1)[:, None] @ value)[:, 0]
        return taken if self.residual_before else y + taken

    def penalty(self, values: Values) -> Tensor | None:
        if not (self.value and self.regularization):
            return None
        matrices = [own["V"] for own in values.values()]
        return PULL * torch.stack([(torch.eye(len(v)).to(v) - v).square().sum() for v in matrices]).sum()

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (f"adapter_fusion_layer.{KEYS[name]}", shape) for name, shape in self._shapes(site).items()}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Self:
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})
