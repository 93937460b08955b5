"""LLaMA-Adapter: in the last blocks, each token attends to learned prompts too, apart from its sequence and gated.

    y' = y + W_o (g softmax(q K_p^T / sqrt(head_dim)) V_p)        K_p = W_k P, V_p = W_v P

y is what attention gives, q its queries with their rotations, P the prompts, which have no position. W_k, W_v and W_o
are the base's own, with their biases, and a norm of its keys. g starts at 0, which leaves the base as it is.

Paper: Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention"
(arXiv:2303.16199). As in HF PEFT, nothing is put through W_o where one layer gives q, k and v (GPT-2); nor is it where
W_o stands outside of the attention module (BERT), since y is put through it there.

Shapes: P is (n, hidden), g (1,) in each block; K_p is (heads, n, head_dim), V_p (heads, n, value_dim).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.sites.hints import is_key_norm, role_of
from inlay.sites.observe import attention_sites, uses_interface
from inlay.sites.site import is_conv1d, plain_call
from inlay.values import Count, Help

from .contract import Length, Method, Params, Site, Structure, Tokens
from .peft_fields import Fields

__all__ = ["LlamaAdapter"]


@dataclass(frozen=True)
class LlamaAdapter(Method):
    """Settings, by HF PEFT's names: `adapter_len` prompts in each of the last `adapter_layers` blocks (all where None;
    the paper's are 10 in 30 of 32).

    The learning rate is that of HF PEFT's best run on MetaMathQA; on film reviews three times that did as well.
    """

    title = "LLaMA-Adapter"
    paper = "arXiv:2303.16199"
    peft_type = "ADAPTION_PROMPT"
    peft_fields = Fields(read={"target_modules": None, "adapter_len": None, "adapter_layers": None})
    lr = 5e-3
    placed_by_settings = True

    adapter_len: Annotated[Length, Help("prompts in each block; 10 is the paper's")] = 10
    adapter_layers: Annotated[Count | None, Help("blocks that have them, the last ones; all where unset")] = None

    def sites(self, base: Structure) -> list[Site]:
        if not uses_interface(base):
            what = "LLaMA-Adapter needs the queries of attention, which this base's own attention does not hand out"
            raise UsageError(what, "Choose prefix tuning or LoRA.")
        sites = [site for site in attention_sites(base) if site.stack != "encoder"]
        count = len(sites) if self.adapter_layers is None else self.adapter_layers
        if count > len(sites):
            what = f"LLaMA-Adapter's adapter_layers is {count}, and the base has {len(sites)} attention layers"
            raise UsageError(what, f"Choose {len(sites)} or fewer.")
        return [self._site(site, base) for site in sites[len(sites) - count :]]

    def _site(self, site: Site, base: Structure) -> Site:
        layers = _layers(site)
        keys: Any = layers.get("k", layers.get("qkv", site.module))
        fits = "v" in layers if "k" in layers else "qkv" in layers and is_conv1d(keys)
        if not fits:
            what = f"LLaMA-Adapter finds no layers in {site.path} that give keys and values, each or in order"
            raise UsageError(what, "Choose prefix tuning or LoRA.")
        width = keys.weight.shape[0] if is_conv1d(keys) else keys.in_features
        shape = base.observed.calls[site.path].output_shape
        return replace(site, kind="attended", in_features=int(width), out_features=shape[-1] if shape else 0)

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {"P": torch.randn(self.adapter_len, site.in_features, generator=generator), "g": torch.zeros(1)}

    def derive(self, params: Params, site: Site | None) -> Params:
        if site is None:
            return {}
        layers, prompts = _layers(site), params["P"]
        weight: Any = next(iter(layers.values())).weight
        prompts = prompts.to(weight.dtype) if weight.is_floating_point() else prompts  # as the base reads its tokens
        if "k" in layers:
            keys, values = (plain_call(layers[role], {}, prompts) for role in ("k", "v"))
        else:
            keys, values = plain_call(layers["qkv"], {}, prompts).chunk(3, -1)[1:]
        norm = next((child for name, child in site.module.named_children() if is_key_norm(name)), None)
        whole = norm is not None and norm.weight.numel() == keys.shape[-1] != site.head_dim  # pyright: ignore
        if norm is not None and whole:
            keys = plain_call(norm, {}, keys)
        keys = keys.unflatten(1, (site.heads, -1))
        if norm is not None and not whole:
            keys = plain_call(norm, {}, keys)
        return {"K": keys.transpose(0, 1), "V": values.unflatten(1, (site.heads, -1)).transpose(0, 1)}

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        queries = x.unflatten(1, (site.heads, -1, site.head_dim))  # (n, heads of keys, queries of each, head_dim)
        scores = torch.einsum("nhqd,hpd->nhqp", queries, params["K"].to(x.dtype)) * site.head_dim**-0.5
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = params["g"].to(x.dtype) * scores.softmax(-1, dtype=wide).to(x.dtype)
        added = torch.einsum("nhqp,hpd->nhqd", weights, params["V"].to(x.dtype)).flatten(1)
        layers = _layers(site)
        if "o" in layers and "k" in layers:
            added = plain_call(layers["o"], {}, added)
        return y + added.to(y.dtype)

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"P": ("adaption_prompt", (1, self.adapter_len, site.in_features)), "g": ("adaption_gate", (1,))}

    def own_shape(self, name: str, value: Tensor) -> Tensor:
        return value[0] if name == "P" else value

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {"target_modules": sites[0].name, "adapter_len": self.adapter_len, "adapter_layers": len(sites)}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> LlamaAdapter:
        return cls(config["adapter_len"], config["adapter_layers"])


def _layers(site: Site) -> dict[str, nn.Module]:
    """The projections of an attention module, by role."""
    return {role: child for name, child in site.module.named_children() if (role := role_of(name))}
