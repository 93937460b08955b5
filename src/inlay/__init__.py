"""Inlay: parameter-efficient fine-tuning where the adapter is a batch dimension."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.bank.bank import Bank, attach
    from inlay.integrations.trainer import InlayCallback
    from inlay.methods.bitfit import BitFit
    from inlay.methods.bottleneck import Houlsby, Pfeiffer
    from inlay.methods.dora import DoRA
    from inlay.methods.head import ModulesToSave
    from inlay.methods.ia3 import IA3
    from inlay.methods.lora import LoRA
    from inlay.methods.loreft import DiReFT, LoReFT, NoReFT
    from inlay.methods.mam import MAM
    from inlay.methods.norm import NormTuning
    from inlay.methods.parallel import Parallel, ScaledParallel
    from inlay.methods.prefix import PrefixTuning
    from inlay.methods.prompt import PromptTuning
    from inlay.methods.vera import VeRA

__all__ = [
    "IA3",
    "MAM",
    "Bank",
    "BitFit",
    "DiReFT",
    "DoRA",
    "Houlsby",
    "InlayCallback",
    "LoRA",
    "LoReFT",
    "ModulesToSave",
    "NoReFT",
    "NormTuning",
    "Parallel",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "ScaledParallel",
    "VeRA",
    "__version__",
    "attach",
]

__version__ = "0.1.0"

_WHERE = {
    "Bank": "inlay.bank.bank",
    "attach": "inlay.bank.bank",
    "BitFit": "inlay.methods.bitfit",
    "DoRA": "inlay.methods.dora",
    "Houlsby": "inlay.methods.bottleneck",
    "Pfeiffer": "inlay.methods.bottleneck",
    "IA3": "inlay.methods.ia3",
    "InlayCallback": "inlay.integrations.trainer",
    "LoRA": "inlay.methods.lora",
    "DiReFT": "inlay.methods.loreft",
    "LoReFT": "inlay.methods.loreft",
    "MAM": "inlay.methods.mam",
    "NoReFT": "inlay.methods.loreft",
    "ModulesToSave": "inlay.methods.head",
    "NormTuning": "inlay.methods.norm",
    "Parallel": "inlay.methods.parallel",
    "ScaledParallel": "inlay.methods.parallel",
    "PrefixTuning": "inlay.methods.prefix",
    "PromptTuning": "inlay.methods.prompt",
    "VeRA": "inlay.methods.vera",
}


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for, so that `import inlay` is quick."""
    if name not in _WHERE:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
