"""Which modules of a base an HF PEFT config names, by HF PEFT's own rules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from inlay.sites.targets import endings

__all__ = ["Named", "holds_name"]

ANY_LIST = r".*?\.[^.]*"
"""Before a block's number where no pattern says which list of blocks is meant: the first numbered part counts."""


class Named:
    """Whether a config's target_modules name the module at a path, and neither exclude_modules nor modules_to_save
    keep it out. layers_to_transform and layers_pattern count where the targets are a list."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        targets = config.get("target_modules") or []
        self.pattern = targets if isinstance(targets, str) else None
        self.listed = frozenset(() if isinstance(targets, str) else targets)
        excluded = config.get("exclude_modules") or []
        self.out_pattern = excluded if isinstance(excluded, str) else None
        self.out = frozenset(() if isinstance(excluded, str) else excluded)
        self.saved = tuple(config.get("modules_to_save") or ())
        layers = config.get("layers_to_transform")
        numbers = [layers] if isinstance(layers, int) else layers
        self.layers = frozenset(numbers) if numbers and self.pattern is None else None
        self.lists = _patterns(config.get("layers_pattern"))

    def __call__(self, path: str) -> bool:
        ends = endings(path)
        if not self._targets(path, ends) or not self.out.isdisjoint(ends):
            return False
        if self.out_pattern is not None and re.fullmatch(self.out_pattern, path):
            return False
        if any(holds_name(path, name) for name in self.saved):
            return False
        return self.layers is None or self._layer(path) in self.layers

    def _targets(self, path: str, ends: Sequence[str]) -> bool:
        if self.pattern is not None:
            return re.fullmatch(self.pattern, path) is not None
        return not self.listed.isdisjoint(ends)

    def _layer(self, path: str) -> int | None:
        found = (re.match(rf"{lists}\.(?P<number>\d+)\.", path) for lists in self.lists)
        first = next((match for match in found if match is not None), None)
        return None if first is None else int(first["number"])


def holds_name(path: str, name: str) -> bool:
    """Whether the module at `path` is one that modules_to_save names, or stands inside of it."""
    return any(end == name or end.startswith(name + ".") for end in endings(path))


def _patterns(lists: Any) -> list[str]:
    """What stands before a block's number in a path."""
    if not lists:
        return [ANY_LIST]
    return [rf"(?:^|.*?\.){name}" for name in ([lists] if isinstance(lists, str) else lists)]
