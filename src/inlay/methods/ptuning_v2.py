"""P-tuning v2: prefixes in every layer that are trained as they are, without a network.

Paper: Liu et al. 2021, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and
Tasks" (arXiv:2110.07602).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from inlay.values import Help

from .contract import Length, Method
from .prefix import PrefixTuning
from .preset import Preset

__all__ = ["PTuningV2"]


@dataclass(frozen=True)
class PTuningV2(Preset):
    """Settings: `num_virtual_tokens` prefix keys a layer. It is `PrefixTuning` without `prefix_projection`, which has
    more settings; the paper's head of a task is added where the task has labels.

    The learning rate is that of prefix tuning without a network.
    """

    title = "P-tuning v2"
    paper = "arXiv:2110.07602"
    lr = 1e-2

    num_virtual_tokens: Annotated[Length, Help("keys put before a row's own in each layer; 20 to 100 is usual")] = 20

    def parts(self) -> list[Method]:
        return [PrefixTuning(self.num_virtual_tokens)]
