"""Prompt tuning: embeddings, learned for no real token, that stand before the sequence.

    x' = [P; embed(x)]

Paper: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv:2104.08691).
Shapes: P is (n, hidden), or (n submodules, hidden) where a reference checkpoint of an encoder-decoder holds rows for
its decoder too; the first n are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.site import plain_call
from inlay.values import Count, Help, OneOf

from .contract import Length, Method, Params, Site, Structure
from .peft_fields import PROMPT_FIELDS

__all__ = ["PromptTuning"]

NotNegative = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class PromptTuning(Method):
    """Settings: `num_virtual_tokens` embeddings, which start as random ones of the table's size (`init` "random"), as
    those of random tokens ("vocab"), or as those of `init_text`, repeated or cut to length ("text"); `init_ids` are
    the tokens of the text, for those who have no tokenizer at hand.
    """

    title = "Prompt tuning"
    paper = "arXiv:2104.08691"
    peft_type = "PROMPT_TUNING"
    peft_fields = PROMPT_FIELDS
    lr = 1e-2
    placed_by_settings = True

    num_virtual_tokens: Annotated[Length, Help("embeddings put before a row's own; 20 is usual")] = 20
    init: Annotated[str, OneOf(("random", "vocab", "text"), "init"), Help("what the embeddings start as")] = "random"
    init_text: Annotated[str | None, Help("words that they start as, repeated or cut to length")] = None
    init_ids: Annotated[Sequence[NotNegative] | None, Help("the tokens of those words, without a tokenizer")] = None
    submodules: Annotated[Count, Help("blocks of rows in a reference checkpoint; the first is used")] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_text is not None or self.init_ids is not None:
            object.__setattr__(self, "init", "text")
        elif self.init == "text":
            raise UsageError("init is 'text' but there is no text", "Give init_text.")

    @property
    def virtual_length(self) -> int:
        return self.num_virtual_tokens

    def sites(self, base: Structure) -> list[Site]:
        try:
            table: Any = base.stacks[0].get_input_embeddings()  # pyright: ignore[reportCallIssue]
        except (AttributeError, NotImplementedError):
            table = None
        site = next((s for s in base.tables if s.module is table), None)
        if site is None:
            raise UsageError("prompt tuning needs a base that embeds token ids", "Choose LoRA or prefix tuning.")
        return [replace(site, kind="tokens")]

    def with_tokenizer(self, tokenizer: Any) -> Method:
        if self.init_text is None or self.init_ids is not None:
            return self
        return replace(self, init_ids=tuple(tokenizer(self.init_text, add_special_tokens=False)["input_ids"]))

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        rows, site = self.num_virtual_tokens * self.submodules, sites[0]
        sample = torch.randint(site.in_features, (max(rows, 256),), generator=generator)
        if self.init == "text":
            if not self.init_ids:
                raise UsageError("init_text gives no tokens here", "Give other words, or init_ids.")
            if (highest := max(self.init_ids)) >= site.in_features:
                raise UsageError(f"init_ids holds {highest}", f"The base's table has rows 0 to {site.in_features - 1}.")
            sample = torch.tensor(list(self.init_ids)).repeat(rows)
        looked_up = plain_call(site.module, {}, sample.to(site.module.weight.device)).detach().float().cpu()  # pyright: ignore
        if self.init == "random":
            return {"prompt": torch.randn(rows, site.out_features, generator=generator) * looked_up.std()}
        return {"prompt": looked_up[:rows].clone()}

    def virtual(self, params: Params) -> Tensor:
        return params["prompt"][: self.num_virtual_tokens]

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        shape = (self.num_virtual_tokens * self.submodules, sites[0].out_features)
        return {"prompt": ("prompt_embeddings", shape)}

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": sites[0].out_features,
            "num_transformer_submodules": self.submodules,
            "prompt_tuning_init": "RANDOM",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> PromptTuning:
        count = config.get("num_transformer_submodules") or 1
        return cls(num_virtual_tokens=config["num_virtual_tokens"], submodules=count)
