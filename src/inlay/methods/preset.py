"""Presets: one name and one set of settings for several methods, which an adapter has as its parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.errors import FormatError, UsageError

from .contract import Method, Site, Structure

__all__ = ["Preset"]


@dataclass(frozen=True)
class Preset(Method):
    """Base of every preset: `bank.add` makes an adapter of its `parts`, and knows no more of it."""

    peft_type = ""

    @abstractmethod
    def parts(self) -> list[Method]:
        """The methods, in the order in which they act where they meet."""

    def sites(self, base: Structure) -> list[Site]:
        return [site for part in self.parts() for site in part.sites(base)]

    @property
    def prefix_length(self) -> int:
        return sum(part.prefix_length for part in self.parts())

    @property
    def virtual_length(self) -> int:
        return sum(part.virtual_length for part in self.parts())

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return False

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        raise UsageError(f"{self.title} is a name for several methods", "Save its parts.")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Method:
        raise FormatError(f"{cls.title} is a name for several methods", "Read its parts.")
