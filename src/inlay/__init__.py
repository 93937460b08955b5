"""Inlay: parameter-efficient fine-tuning where the adapter is a batch dimension."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inlay.methods.table import CLASSES

if TYPE_CHECKING:
    from inlay.bank.bank import Bank, attach
    from inlay.integrations.module import InlayModule
    from inlay.integrations.trainer import InlayCallback
    from inlay.methods.table import *  # noqa: F403

__version__ = "0.1.0"

_WHERE = {
    "Bank": "inlay.bank.bank",
    "attach": "inlay.bank.bank",
    "InlayCallback": "inlay.integrations.trainer",
    "InlayModule": "inlay.integrations.module",
    **{kind: f"inlay.methods.{module}" for module, _, kind in (entry.partition(".") for entry in CLASSES.values())},
}
"""The public names, every method's class among them, and the modules they are in."""

__all__ = ["Bank", "InlayCallback", "InlayModule", "__version__", "attach"]
__all__ += sorted({*_WHERE} - {*__all__})  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for, so that `import inlay` is quick."""
    if name not in _WHERE:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
