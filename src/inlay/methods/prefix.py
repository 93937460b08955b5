"""Prefix tuning: keys and values, learned for every layer, that each token sees beside those of its sequence.

    attention(q, [P_k; K], [P_v; V])        P = g * MLP(E) while training with prefix_projection, else g * P itself

Paper: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (arXiv:2101.00190).

Shapes: P is (n, 2 L heads head_dim), layer by layer, keys before values. With `prefix_projection`, E is (n, d), and the
network W1 (h, d), b1 (h,), W2 (2 L d, h), b2 (2 L d,) with d = heads head_dim. Gates g are (2 L, heads), one for all
keys of a head, one for all its values. Network and gates are multiplied out when saved.
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
from inlay.sites.several import checked
from inlay.values import Count, Help, OneOf

from .contract import Method, Params, Site, Structure, Values
from .peft_fields import PREFIX_FIELDS
from .prefix_starts import prefix_of_tokens
from .virtual import VirtualTokens, network_start

__all__ = ["PrefixTuning"]


@dataclass(frozen=True)
class PrefixTuning(VirtualTokens):
    """Settings: those of `VirtualTokens`, where tokens to start as stand for the keys and values that the base computes
    for them as a text, and "zero" for zeros; "auto" becomes "vocab", or "random" where that cannot be: through a
    network, behind an encoder, without a table of tokens. `prefix_projection` trains prefixes through a network of
    width `encoder_hidden_size` (that of the keys where None); `gated` multiplies those of each head by learned gates,
    which start at 0 where prefixes start at random, else at 1. Layer i of a decoder behind an encoder has the pair
    4i mod 2L in its self-attention, as the reference has it.
    """

    title = "Prefix tuning"
    paper = "arXiv:2101.00190"
    peft_type = "PREFIX_TUNING"
    peft_fields = PREFIX_FIELDS
    lr = 0.01
    whole_text = True  # a row's first key draws much of the attention: it should be what it is in texts

    init: Annotated[
        str, OneOf(("auto", "random", "zero", "vocab", "text"), "init"),
        Help("the base's keys for random tokens (vocab) or init_text (text), random or zero; auto: vocab, else random"),
    ] = "auto"  # fmt: skip
    prefix_projection: Annotated[bool, Help("train them through a small network, folded away when saved")] = False
    encoder_hidden_size: Annotated[Count | None, Help("width of that network; that of the keys where unset")] = None
    gated: Annotated[bool, Help("multiply them by learned gates for each head, folded away when saved")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_projection and self.init in ("vocab", "text"):
            raise UsageError(f"init {self.init!r} gives keys, which no network starts as", "Drop prefix_projection.")

    @property
    def usual_rate(self) -> float:
        return 1e-3 if self.prefix_projection else self.lr

    @property
    def prefix_length(self) -> int:
        return self.num_virtual_tokens

    def sites(self, base: Structure) -> list[Site]:
        sites = checked([site for site in attention_sites(base) if site.stack != "encoder"])
        takes_cache = {"past_key_values", "cache"} & set(inspect.signature(base.stacks[-1].forward).parameters)
        if not uses_interface(base) and not takes_cache:
            raise UsageError("the base takes no keys and values from outside its attention", "Choose LoRA.")
        if not sites:
            raise UsageError("prefix tuning finds no attention with keys and values in this base", "Choose LoRA.")
        uneven = "layers have keys" if len({(s.heads, s.head_dim, s.value_dim) for s in sites}) > 1 else ""
        uneven = uneven or ("keys and values have" if any(s.head_dim != s.value_dim for s in sites) else "")
        if uneven:
            raise UsageError(f"the base's {uneven} different sizes", "Prefix tuning needs equal ones.")
        return sites

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        n, width = self.num_virtual_tokens, sites[0].heads * sites[0].head_dim
        total, zero = 2 * len(sites) * width, self.init == "zero"
        params = {"gate": torch.full((2 * len(sites), sites[0].heads), float(zero))} if self.gated else {}
        if not self.prefix_projection:
            return {"prefix": torch.zeros(n, total) if zero else torch.randn(n, total, generator=generator), **params}
        inner = self.encoder_hidden_size or width
        params["embedding"] = torch.randn(n, width, generator=generator)
        shapes = {"w1": ((inner, width), width), "b1": ((inner,), width)}
        params |= network_start({**shapes, "w2": ((total, inner), inner), "b2": ((total,), inner)}, generator)
        return params | ({"w2": torch.zeros(total, inner), "b2": torch.zeros(total)} if zero else {})

    def begin_at_base(
        self, values: Values, sites: Sequence[Site], base: Structure, generator: torch.Generator
    ) -> tuple[PrefixTuning, Values]:
        if self.init == "auto":
            start = "random" if self.prefix_projection else "vocab"
            try:
                return replace(self, init=start).begin_at_base(values, sites, base, generator)
            except UsageError:
                return replace(self, init="random"), values
        if self.init in ("random", "zero"):
            return self, values
        gates = {name: torch.ones_like(value) for name, value in values[""].items() if name == "gate"}
        return self, {**values, "": {**gates, "prefix": prefix_of_tokens(self, sites, base, generator)}}

    def derive(self, params: Params, site: Site | None) -> Params:
        if site is not None or not (self.prefix_projection or self.gated):
            return {}
        if self.prefix_projection:
            inner = F.linear(params["embedding"], params["w1"], params["b1"]).tanh()
            params = {**params, "prefix": F.linear(inner, params["w2"], params["b2"])}
        if not self.gated:
            return {"prefix": params["prefix"]}
        gate = params["gate"][..., None]
        return {"prefix": (params["prefix"].unflatten(1, (*gate.shape[:2], -1)) * gate).flatten(1)}

    def prefix(self, params: Params, site: Site, index: int) -> tuple[Tensor, Tensor]:
        width, prefix = site.heads * site.head_dim, params["prefix"]
        if site.stack == "decoder":
            index = 2 * index % (prefix.shape[1] // (2 * width))
        both = prefix[:, 2 * index * width : 2 * (index + 1) * width]
        keys, values = both.unflatten(1, (2, site.heads, site.head_dim)).permute(1, 2, 0, 3)  # (heads, n, head_dim)
        return keys, values

    def export(self, params: Params, sites: Sequence[Site]) -> tuple[Method, Mapping[str, Tensor]]:
        if not (self.prefix_projection or self.gated):
            return self, params
        plain = replace(self, prefix_projection=False, encoder_hidden_size=None, gated=False)
        return plain, {"prefix": self.derive(params, None)["prefix"]}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        total = 2 * len(sites) * sites[0].heads * sites[0].head_dim
        return {"prefix": ("prompt_embeddings", (self.num_virtual_tokens, total))}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        heads, width = sites[0].heads, sites[0].heads * sites[0].head_dim
        sizes = {"num_layers": len(sites), "num_attention_heads": heads, "token_dim": width}
        more = {"encoder_hidden_size": width, "num_transformer_submodules": 2 if sites[0].stack == "decoder" else 1}
        return {"num_virtual_tokens": self.num_virtual_tokens, "prefix_projection": False, **sizes, **more}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> PrefixTuning:
        return cls(num_virtual_tokens=config["num_virtual_tokens"])
