"""aLoRA: LoRA that acts from a sequence of tokens on, so that what stands before it is the base's own, and a key-value
cache of it serves the base and every aLoRA alike.

    y_t = W x_t + s B A x_t      for tokens t from the start of the row's last invocation on;  y_t = W x_t before

Paper: Greenewald et al. 2025, "Activated LoRA: Fine-tuned LLMs for Intrinsics" (arXiv:2504.12397).

As in HF PEFT the last occurrence in a row counts, and a row without one is the base's. Text that is written goes on
from what its prompt held. The shapes are LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.values import Help

from .contract import Method, Params, Site, Structure, Tokens
from .lora import LoRA

__all__ = ["ALoRA"]


@dataclass(frozen=True)
class ALoRA(LoRA):
    """Settings of aLoRA: those of LoRA (its paper uses ranks of 16 to 32), and the sequence that switches it on. It
    begins with LoRA's learning rate.
    """

    title = "aLoRA"
    paper = "arXiv:2504.12397"
    begins_inside = False  # the start would be taken back where nothing acts

    alora_invocation_tokens: Annotated[
        Sequence[Annotated[int, Ge(0)]], Help("ids of the tokens that switch it on; must be in every prompt")
    ] = ()
    invocation: Annotated[str | None, Help("the same as text, which the base's tokenizer turns into ids")] = None

    @property
    def causal(self) -> bool:
        return False

    def sites(self, base: Structure) -> list[Site]:
        if not self.alora_invocation_tokens:
            what = "aLoRA does not know from which tokens on it acts"
            raise UsageError(what, "Set alora_invocation_tokens, or invocation where a tokenizer is at hand.")
        if len(base.stacks) != 1 or not base.tables:
            raise UsageError("aLoRA acts on a base of one stack that reads tokens", "Choose LoRA.")
        sites = super().sites(base)
        if other := next((site for site in sites if site.is_embedding or site.experts), None):
            raise UsageError(f"aLoRA cannot act on {other.path}, which is no linear layer", "Name linear layers.")
        return sites

    def with_tokenizer(self, tokenizer: Any) -> Method:
        if self.invocation is None or self.alora_invocation_tokens:
            return self
        ids = tokenizer(self.invocation, add_special_tokens=False)["input_ids"]
        return replace(self, alora_invocation_tokens=[int(token) for token in ids])

    @classmethod
    def has_form(cls) -> bool:
        """It has none: what it adds depends on the token."""
        return False

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        low = F.linear(tokens.dropout(x, self.dropout).to(y.dtype), params["A"].to(y.dtype))
        made = y + F.linear(low, params["B"].to(y.dtype)) * self.scale(site)
        active = tokens.behind(self.alora_invocation_tokens)
        return torch.where(active.to(y.device)[:, None], made, y)

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        own = {"alora_invocation_tokens": list(self.alora_invocation_tokens), "task_type": "CAUSAL_LM"}
        return {k: v for k, v in super().to_peft(sites).items() if k != "target_parameters"} | own

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return super().claims(config) and bool(config.get("alora_invocation_tokens"))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> LoRA:
        made = super().from_peft(config, paths)
        return replace(made, alora_invocation_tokens=config["alora_invocation_tokens"])  # pyright: ignore
