"""How many tokens an adapter adds to a row, by the settings in its folder alone, without its base."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from inlay.errors import InlayError
from inlay.methods.table import METHODS

from .adapterhub import is_adapterhub
from .folder_kinds import is_fusion
from .peft import read_config

__all__ = ["added_tokens"]


def added_tokens(folder: Path) -> tuple[int, int]:
    """Virtual tokens of the adapter in `folder`, and keys of its prefixes; 0 where its settings name none.

    Raises: UsageError where there is no adapter; FormatError where its settings are no JSON.
    """
    if is_fusion(folder):
        return 0, 0
    config = read_config(folder)
    if is_adapterhub(config):
        own = config["config"] if isinstance(config["config"], dict) else {}
        return _whole(own.get("prompt_length")), _whole(own.get("prefix_length"))
    parts = config.get("parts")
    found = [_of(part) for part in (parts if isinstance(parts, list) else [config]) if isinstance(part, dict)]
    return sum(virtual for virtual, _ in found), sum(prefix for _, prefix in found)


def _of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Of one method, by HF PEFT's field for both kinds."""
    count = _whole(config.get("num_virtual_tokens"))
    for kind in METHODS.values():
        with suppress(InlayError, KeyError, TypeError, ValueError, AttributeError):
            if count and kind.placed_by_settings and kind.claims(config):
                method = kind.from_peft(config, [])
                return method.virtual_length, method.prefix_length
    return 0, 0


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
