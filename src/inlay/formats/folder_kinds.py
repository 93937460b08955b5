"""By which files a folder is told to hold an adapter, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

from .peft import CONFIG

__all__ = ["FUSION", "KINDS", "SETUP", "fusion_of", "is_fusion"]

FUSION = "adapter_fusion_config.json"
"""AdapterHub's, of a fusion alone: the adapters that it is over are in folders of their own."""
SETUP = "adapter_setup.json"
"""AdapterHub's, of several adapters, each in a folder inside, and of the fusion over them."""
KINDS = (CONFIG, SETUP, FUSION)
"""An adapter's own comes first: AdapterHub writes several things to one folder if it is told to."""


def is_fusion(folder: Path) -> bool:
    """Whether what a folder holds is one of AdapterHub's fusions, with its adapters or without them."""
    return next((name for name in KINDS if (folder / name).is_file()), CONFIG) != CONFIG


def fusion_of(folder: Path) -> Path:
    """The folder of a fusion itself: `folder`, or the first inside of a setup; `folder` too where a setup has none."""
    if not (folder / SETUP).is_file():
        return folder
    return next(iter(sorted(path.parent for path in folder.glob(f"*/{FUSION}"))), folder)
