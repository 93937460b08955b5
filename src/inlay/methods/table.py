"""The one table of methods: the name people type, and the class behind it."""

from __future__ import annotations

from .bottleneck import Houlsby, Pfeiffer
from .contract import Method
from .ia3 import IA3
from .lora import LoRA
from .norm import NormTuning
from .prefix import PrefixTuning
from .prompt import PromptTuning

__all__ = ["METHODS"]

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "ia3": IA3,
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "norm": NormTuning,
    "prefix": PrefixTuning,
    "prompt": PromptTuning,
}
