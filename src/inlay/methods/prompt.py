"""Prompt tuning: embeddings, learned for no real token, that stand before the sequence.

    x' = [P; embed(x)]

Paper: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv:2104.08691).
Shapes: P is (n, hidden), or (n submodules, hidden) where a reference checkpoint of an encoder-decoder holds rows for
its decoder too; the first n are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from inlay.values import Count, Help

from .contract import Params, Site
from .peft_fields import PROMPT_FIELDS
from .virtual import VirtualEmbeddings

__all__ = ["PromptTuning"]


@dataclass(frozen=True)
class PromptTuning(VirtualEmbeddings):
    """Settings: `num_virtual_tokens` embeddings, which start as random ones of the table's size (`init` "random"), as
    those of random tokens ("vocab"), or as those of `init_text`, repeated or cut to length ("text"); `init_ids` are
    the tokens of the text, for those who have no tokenizer at hand. HF PEFT's names of starts are taken too.
    """

    title = "Prompt tuning"
    paper = "arXiv:2104.08691"
    peft_type = "PROMPT_TUNING"
    peft_fields = PROMPT_FIELDS
    lr = 1e-2

    submodules: Annotated[Count, Help("blocks of rows in a reference checkpoint; the first is used")] = 1

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        return {"prompt": self.start(self.num_virtual_tokens * self.submodules, sites[0], generator)}

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
            "prompt_tuning_init": "SAMPLE_VOCAB" if self.init == "vocab" else "RANDOM",  # "TEXT" wants a tokenizer
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> PromptTuning:
        count = config.get("num_transformer_submodules") or 1
        return cls(num_virtual_tokens=config["num_virtual_tokens"], submodules=count)
