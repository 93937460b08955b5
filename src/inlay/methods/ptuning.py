"""P-tuning: virtual tokens whose embeddings come from a small network while they are trained.

    x' = [f(E); embed(x)]        f is an MLP of three layers, or one of two behind a bidirectional LSTM

Paper: Liu et al. 2021, "GPT Understands, Too" (arXiv:2103.10385); the networks are HF PEFT's.

Shapes: E is (n, hidden). The network's tensors have torch's names and shapes: `mlp_head.i.weight` (out, in) and `.bias`
(out,), `lstm_head.weight_ih_l0` (4 h, in) and so on. It is multiplied out when saved, as in HF PEFT, whose files hold
f(E) alone: a saved adapter is trained on as plain embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.values import Count, Help, OneOf, Share

from .contract import Length, Method, Params, Site, Structure
from .peft_fields import SIZES, Fields
from .virtual import network_start, token_table

__all__ = ["PTuning"]


@dataclass(frozen=True)
class PTuning(Method):
    """Settings, by HF PEFT's names: `encoder_reparameterization_type` is the network, "none" where it is folded away;
    `encoder_hidden_size` is its width, that of the embeddings where None; `encoder_num_layers` are those of the LSTM,
    between which training drops the share `encoder_dropout`.

    The learning rate is the best of three with its network (docs/methods.md), and that of prompt tuning without.
    """

    title = "P-tuning"
    paper = "arXiv:2103.10385"
    peft_type = "P_TUNING"
    lr = 3e-4
    placed_by_settings = True
    peft_fields = Fields(
        read={"num_virtual_tokens": None, "num_transformer_submodules": None, "modules_to_save": None},
        passed={
            **SIZES, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": None, "encoder_num_layers": 2,
            "encoder_dropout": 0.0,
        },
    )  # fmt: skip

    num_virtual_tokens: Annotated[Length, Help("embeddings put before a row's own; 20 is usual")] = 20
    encoder_reparameterization_type: Annotated[
        str, OneOf(("MLP", "LSTM", "none")), Help("the network that they come from in training")
    ] = "MLP"
    encoder_hidden_size: Annotated[Count | None, Help("width of that network; that of the base where unset")] = None
    encoder_num_layers: Annotated[Count, Help("layers of the LSTM")] = 2
    encoder_dropout: Annotated[Share, Help("share that training drops between layers of the LSTM")] = 0.0
    submodules: Annotated[Count, Help("blocks of rows in a reference checkpoint; the first is used")] = 1

    @property
    def usual_rate(self) -> float:
        return 1e-2 if self.encoder_reparameterization_type == "none" else self.lr

    @property
    def virtual_length(self) -> int:
        return self.num_virtual_tokens

    def sites(self, base: Structure) -> list[Site]:
        return [replace(token_table(base, "P-tuning"), kind="tokens")]

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        width = sites[0].out_features
        rows = torch.randn(self.num_virtual_tokens * self.submodules, width, generator=generator)
        if self.encoder_reparameterization_type == "none":
            return {"prompt": rows}
        return {"embedding": rows, **network_start(self._shapes(width), generator)}

    def _shapes(self, width: int) -> dict[str, tuple[tuple[int, ...], int]]:
        """Of each tensor of the network its shape, and the number of inputs that its start's bound is of."""
        h, found = self.encoder_hidden_size or width, {}
        sizes = (width, h, h, width)
        if self.encoder_reparameterization_type == "LSTM":
            sizes = (2 * h, 2 * h, width)
            for layer in range(self.encoder_num_layers):
                shapes = ((4 * h, 2 * h if layer else width), (4 * h, h), (4 * h,), (4 * h,))
                found |= {name: (shapes[n % 4], h) for n, name in enumerate(_lstm_names(layer))}
        for number, (read, gives) in enumerate(pairwise(sizes)):
            found[f"mlp_head.{2 * number}.weight"] = (gives, read), read
            found[f"mlp_head.{2 * number}.bias"] = (gives,), read
        return found

    def draw(self, params: Params, dropout: Callable[[Tensor, float], Tensor]) -> Params:
        if self.encoder_reparameterization_type != "LSTM" or not self.encoder_dropout or self.encoder_num_layers == 1:
            return {}
        rows, inner = len(params["embedding"]), params["lstm_head.weight_hh_l0"].shape[1]
        ones = params["embedding"].new_ones((self.encoder_num_layers - 1) * rows, 2 * inner)
        return {"mask": dropout(ones, self.encoder_dropout)}

    def derive(self, params: Params, site: Site | None) -> Params:
        if site is not None or self.encoder_reparameterization_type == "none":
            return {}
        made, count = params["embedding"], 3
        if self.encoder_reparameterization_type == "LSTM":
            made, count = self._lstm(params, made), 2
        for number in range(count):
            made = made.relu() if number else made
            made = F.linear(made, params[f"mlp_head.{2 * number}.weight"], params[f"mlp_head.{2 * number}.bias"])
        return {"prompt": made}

    def _lstm(self, params: Params, x: Tensor) -> Tensor:
        """What the bidirectional LSTM gives for x (n, in): (n, 2 h)."""
        masks = params["mask"].split(len(x)) if "mask" in params else ()
        for layer in range(self.encoder_num_layers):
            weights = [params[name].contiguous() for name in _lstm_names(layer)]
            start = x.new_zeros(2, 1, weights[1].shape[1])
            x = torch.lstm(x[None], (start, start), weights, True, 1, 0.0, False, True, True)[0][0]
            x = x * masks[layer] if layer < len(masks) else x
        return x

    def virtual(self, params: Params) -> Tensor:
        return params["prompt"][: self.num_virtual_tokens]

    def export(self, params: Params, sites: Sequence[Site]) -> tuple[Method, Mapping[str, Tensor]]:
        if self.encoder_reparameterization_type == "none":
            return self, params
        return replace(self, encoder_reparameterization_type="none"), self.derive(params, None)

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"prompt": ("prompt_embeddings", (self.num_virtual_tokens * self.submodules, sites[0].out_features))}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        width = sites[0].out_features
        sizes = {"num_virtual_tokens": self.num_virtual_tokens, "num_transformer_submodules": self.submodules}
        return {**sizes, "token_dim": width, "encoder_hidden_size": self.encoder_hidden_size or width}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> PTuning:
        count = config.get("num_transformer_submodules") or 1
        return cls(config["num_virtual_tokens"], encoder_reparameterization_type="none", submodules=count)


def _lstm_names(layer: int) -> list[str]:
    """The tensors of one layer of a bidirectional LSTM, as torch orders them."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [f"lstm_head.{kind}_l{layer}{end}" for end in ("", "_reverse") for kind in kinds]
