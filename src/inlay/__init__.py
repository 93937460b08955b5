"""Inlay: parameter-efficient fine-tuning where the adapter is a batch dimension."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.bank.bank import Bank, attach
    from inlay.integrations.trainer import InlayCallback
    from inlay.methods.bottleneck import Houlsby, Pfeiffer
    from inlay.methods.ia3 import IA3
    from inlay.methods.lora import LoRA
    from inlay.methods.norm import NormTuning
    from inlay.methods.prefix import PrefixTuning
    from inlay.methods.prompt import PromptTuning

__all__ = [
    "IA3",
    "Bank",
    "Houlsby",
    "InlayCallback",
    "LoRA",
    "NormTuning",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "__version__",
    "attach",
]

__version__ = "0.1.0"

_WHERE = {
    "Bank": "inlay.bank.bank",
    "attach": "inlay.bank.bank",
    "Houlsby": "inlay.methods.bottleneck",
    "Pfeiffer": "inlay.methods.bottleneck",
    "IA3": "inlay.methods.ia3",
    "InlayCallback": "inlay.integrations.trainer",
    "LoRA": "inlay.methods.lora",
    "NormTuning": "inlay.methods.norm",
    "PrefixTuning": "inlay.methods.prefix",
    "PromptTuning": "inlay.methods.prompt",
}


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for, so that `import inlay` is quick."""
    if name not in _WHERE:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
