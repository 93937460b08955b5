"""LoRA-FA: LoRA whose A stays as it was drawn, so that a step keeps r numbers a token for its gradients, not `in`.

    y = W x + s B A x        A is frozen

Paper: Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning"
(arXiv:2308.03303). HF PEFT's optimizer of that name corrects B's gradient by (A A^T)^-1 as well, which is not in the
paper and is left out here.

A checkpoint is LoRA's, as which it opens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inlay.errors import UsageError

from .contract import Site, Structure
from .lora import LoRA

__all__ = ["LoRAFA"]


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """Settings of LoRA-FA: those of LoRA. It begins with LoRA's learning rate, the best of three for it too."""

    title = "LoRA-FA"
    paper = "arXiv:2308.03303"
    untrained = frozenset({"A"})
    begins_inside = False  # B alone could not take the start back

    def sites(self, base: Structure) -> list[Site]:
        sites = super().sites(base)
        if table := next((site for site in sites if site.is_embedding), None):
            what = f"{self.title} cannot act on {table.path}, a table, where A begins at zero and would stay there"
            raise UsageError(what, "Leave it out of the targets, or use LoRA.")
        return sites

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return False
