"""Gated prefix tuning: keys and values before a row's own, which a gate of the row lets through, more or less.

    attention(q, [g_k P_k; K], [g_v P_v; V])        g = mean of sigmoid(w x + b) over a row's prompt

x is what the layer's attention reads, and the mean goes over the row where no prompt is known. Gates, sizes and
positions, which the prefix does not move, are those of AdapterHub's `adapters` 1.3.0.

Paper: Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning" (arXiv:2110.07577).
Shapes: w is (1, hidden) for both or (2, hidden), b (1,) or (2,), in each layer; the others are those of
`inlay.methods.prefix`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.values import Count, Help

from .contract import Length, Params, Site, Structure, Tokens
from .unmoved import UnmovedPrefix

__all__ = ["GatedPrefix"]


@dataclass(frozen=True)
class GatedPrefix(UnmovedPrefix):
    """Settings: those of prefix tuning; without `shared_gating`, values have a gate of their own."""

    title = "Gated prefix tuning"
    paper = "arXiv:2110.07577"
    peft_type = "GATED_PREFIX"

    num_virtual_tokens: Annotated[Length, Help("keys put before a row's own in each layer")] = 10
    prefix_projection: Annotated[bool, Help("train them through a small network, folded away when saved")] = True
    encoder_hidden_size: Annotated[Count | None, Help("width of that network; that of the keys where unset")] = 512
    shared_gating: Annotated[bool, Help("one gate for keys and values")] = True

    @property
    def causal(self) -> bool:
        return False

    def sites(self, base: Structure) -> list[Site]:
        found = []
        for site in super().sites(base):
            call = base.observed.calls.get(site.path)
            if call is None or call.input_shape is None or len(call.input_shape) != 3:
                raise UsageError(f"{self.title} needs to see what {site.path} reads", "Choose prefix tuning.")
            found.append(replace(site, in_features=call.input_shape[-1]))
        return found

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        gates = 1 if self.shared_gating else 2
        drawn = torch.randn(gates, site.in_features, generator=generator) * 0.02
        return {"row_gate": drawn, "row_gate_bias": torch.zeros(gates)}

    def prefix_gates(self, params: Params, x: Tensor, site: Site, tokens: Tokens) -> Tensor:
        gate = tokens.prompt_mean(torch.sigmoid(F.linear(x, params["row_gate"], params["row_gate_bias"])))
        return gate.expand(-1, 2)

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        gates = 1 if self.shared_gating else 2
        return {
            "row_gate": ("prefix_gate.weight", (gates, site.in_features)),
            "row_gate_bias": ("prefix_gate.bias", (gates,)),
        }
