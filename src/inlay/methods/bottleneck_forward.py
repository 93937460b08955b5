"""What a bottleneck adapter computes, by its settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .bottleneck_settings import BottleneckSettings
from .common import ACTIVATIONS
from .contract import BottleneckForm, Params, Site, Tokens
from .form import behind

__all__ = ["BottleneckForward"]


@dataclass(frozen=True)
class BottleneckForward(BottleneckSettings):
    """Parameters, by name: down D, down_bias d, up U, up_bias u; norm_before, norm_after, gate and their biases; scale.

    At a sublayer, y is what it gives and x the stream that y is added to. At the norm of a post-norm block, x is their
    sum and y its norm.
    """

    @property
    def causal(self) -> bool:
        return not self.use_gating

    def scale(self, params: Params) -> Tensor | float:
        return params["scale"] if "scale" in params else float(self.scaling)

    def network(self, params: Params) -> BottleneckForm:
        """The network with its matrices whole."""
        return BottleneckForm(
            params["down"], params["down_bias"], params["up"], params["up_bias"],
            ACTIVATIONS[self.non_linearity], self.scale(params), self.reads,
        )  # fmt: skip

    def added(self, params: Params, z: Tensor) -> Tensor:
        """s (U act(D z + d) + u), (n, hidden)."""
        return self.network(params).added(z)

    def bottleneck(self, params: Params, site: Site) -> BottleneckForm | None:
        more = self.ln_before or self.ln_after or self.use_gating
        return self.network(params) if self.adds and site.kind == "sublayer" and not more else None

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        kept = self._kept(y, site, tokens)
        if kept is not None and not bool(kept.any()):
            return y
        z = self._read(x, y, site)
        made = self._joined(params, self._branch(params, z, tokens), x, y, z, site)
        return made if kept is None else torch.where(kept, made, y)

    def _kept(self, y: Tensor, site: Site, tokens: Tokens) -> Tensor | None:
        """Whether the block has its adapter in each token's step, (n, 1); None where it always does."""
        layer = site.layer or 0
        chance = tokens.chance(y, of_step=True) if layer < self.drop_layers else None
        return None if chance is None else layer >= (chance * (self.drop_layers + 1)).floor()

    def _read(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if self.reads == "behind":
            return y if site.kind == "norm" else behind(x, y, site)
        return x if self.reads == "stream" else y

    def _branch(self, params: Params, z: Tensor, tokens: Tokens) -> Tensor:
        """What the adapter adds to its residual, (n, hidden)."""
        made = self.added(params, _normed(params, "norm_before", z) if self.ln_before else z)
        chance = tokens.chance(z) if self.stochastic_depth else None
        if chance is not None:
            made = made * ((chance >= self.stochastic_depth).to(made.dtype) / (1 - self.stochastic_depth))
        made = tokens.dropout(made, self.dropout)
        if self.use_gating:
            made = made * tokens.prompt_mean(torch.sigmoid(F.linear(z, params["gate"], params["gate_bias"])))
        before = self.ln_after and not self.adapter_residual_before_ln
        return _normed(params, "norm_after", made) if before else made

    def _joined(self, params: Params, added: Tensor, x: Tensor, y: Tensor, z: Tensor, site: Site) -> Tensor:
        """What leaves the site: `added` and its residual, less the x that the block adds where that is in there."""
        if self.adds and site.kind == "sublayer":
            return y + added
        made = added + self._residual(x, y, z, site)
        if self.ln_after and self.adapter_residual_before_ln:
            made = _normed(params, "norm_after", made)
        return made if self.original_ln_after or site.kind == "norm" else made - x

    def _residual(self, x: Tensor, y: Tensor, z: Tensor, site: Site) -> Tensor:
        if self.residual_before_ln is True or self.reads == "output":
            return y
        if self.residual_before_ln == "post_add":
            return x if site.kind == "norm" else x + y
        return z


def _normed(params: Params, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], params[name], params[f"{name}_bias"])
