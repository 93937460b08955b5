"""Prefix tuning: keys and values, learned for every layer, that each token sees beside those of its sequence.

    attention(q, [P_k; K], [P_v; V])        P = MLP(E) while training with prefix_projection, else P itself

Paper: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (arXiv:2101.00190).
Shapes: P is (n, 2 L heads head_dim), layer by layer, keys before values. With `prefix_projection`, E is (n, d), and the
network W1 (h, d), b1 (h,), W2 (2 L d, h), b2 (2 L d,) with d = heads head_dim; it is multiplied out when saved.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.sites.observe import attention_sites, uses_interface
from inlay.values import Count, Help

from .contract import Length, Method, Params, Site, Structure
from .peft_fields import PREFIX_FIELDS

__all__ = ["PrefixTuning"]


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Settings: `num_virtual_tokens` prefix keys a layer; `prefix_projection` trains them through a network of width
    `encoder_hidden_size` (that of the keys where None).

    A decoder that attends to an encoder has prefixes in its self-attention, laid out as the reference does: layer i
    takes the pair 4i mod 2L.
    """

    title = "Prefix tuning"
    paper = "arXiv:2101.00190"
    peft_type = "PREFIX_TUNING"
    peft_fields = PREFIX_FIELDS
    lr = 0.01
    placed_by_settings = True

    num_virtual_tokens: Annotated[Length, Help("keys put before a row's own in each layer; 10 to 20 is usual")] = 20
    prefix_projection: Annotated[bool, Help("train them through a small network, folded away when saved")] = False
    encoder_hidden_size: Annotated[Count | None, Help("width of that network; that of the keys where unset")] = None

    @property
    def usual_rate(self) -> float:
        return 1e-3 if self.prefix_projection else self.lr

    @property
    def prefix_length(self) -> int:
        return self.num_virtual_tokens

    def sites(self, base: Structure) -> list[Site]:
        sites = [site for site in attention_sites(base) if site.stack != "encoder"]
        takes_cache = {"past_key_values", "cache"} & set(inspect.signature(base.stacks[-1].forward).parameters)
        if not uses_interface(base) and not takes_cache:
            raise UsageError("the base takes no keys and values from outside its attention", "Choose LoRA.")
        if not sites:
            raise UsageError("prefix tuning finds no attention with keys and values in this base", "Choose LoRA.")
        if len({(s.heads, s.head_dim, s.value_dim) for s in sites}) > 1:
            raise UsageError("the base's layers have keys of different sizes", "Prefix tuning needs equal ones.")
        if any(s.head_dim != s.value_dim for s in sites):
            raise UsageError("the base's keys and values have different sizes", "Prefix tuning needs equal ones.")
        return sites

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        n, width = self.num_virtual_tokens, sites[0].heads * sites[0].head_dim
        total = 2 * len(sites) * width
        if not self.prefix_projection:
            return {"prefix": torch.randn(n, total, generator=generator)}
        inner = self.encoder_hidden_size or width
        params = {"embedding": torch.randn(n, width, generator=generator)}
        for name, (rows, columns) in {"1": (inner, width), "2": (total, inner)}.items():
            bound = columns**-0.5
            params[f"w{name}"] = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
            params[f"b{name}"] = torch.empty(rows).uniform_(-bound, bound, generator=generator)
        return params

    def derive(self, params: Params, site: Site | None) -> Params:
        if site is not None or not self.prefix_projection:
            return {}
        inner = F.linear(params["embedding"], params["w1"], params["b1"]).tanh()
        return {"prefix": F.linear(inner, params["w2"], params["b2"])}

    def prefix(self, params: Params, site: Site, index: int) -> tuple[Tensor, Tensor]:
        width, prefix = site.heads * site.head_dim, params["prefix"]
        if site.stack == "decoder":
            index = 2 * index % (prefix.shape[1] // (2 * width))
        both = prefix[:, 2 * index * width : 2 * (index + 1) * width]
        keys, values = both.unflatten(1, (2, site.heads, site.head_dim)).permute(1, 2, 0, 3)  # (heads, n, head_dim)
        return keys, values

    def export(self, params: Params, sites: Sequence[Site]) -> tuple[Method, Mapping[str, Tensor]]:
        if not self.prefix_projection:
            return self, params
        plain = replace(self, prefix_projection=False, encoder_hidden_size=None)
        return plain, {"prefix": self.derive(params, None)["prefix"]}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        width = sites[0].heads * sites[0].head_dim
        return {"prefix": ("prompt_embeddings", (self.num_virtual_tokens, 2 * len(sites) * width))}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "prefix_projection": False,
            "encoder_hidden_size": sites[0].heads * sites[0].head_dim,
            "num_layers": len(sites),
            "num_attention_heads": sites[0].heads,
            "token_dim": sites[0].heads * sites[0].head_dim,
            "num_transformer_submodules": 2 if sites[0].stack == "decoder" else 1,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> PrefixTuning:
        return cls(num_virtual_tokens=config["num_virtual_tokens"])
