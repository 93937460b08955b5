"""Which units of bottlenecks are at work on rows of data, and which are dead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.bank.adapter import Part
from inlay.methods.contract import BottleneckForm, Site

__all__ = ["DEAD", "Activity", "dead_units"]

DEAD = 0.01
"""What a dead unit's output varies by at most, as a share of the root mean square over its bottleneck's units."""


def dead_units(varies: Tensor, up: Tensor) -> Tensor:
    """Whether each unit is dead (r,): std over tokens of its activity, `varies` (r,), times the norm of its column of
    `up` (hidden, r) is at most `DEAD` times the root mean square of that over units. What does not vary is a bias."""
    strength = varies.double() * torch.linalg.vector_norm(up.double(), dim=0)
    return strength <= DEAD * strength.square().mean().sqrt()


@dataclass
class _Sums:
    form: BottleneckForm
    layer: int | None
    count: int
    sums: Tensor
    squares: Tensor


class Activity:
    """Hears the activity of units, forward by forward; see `inlay.inspection.altered.watched`."""

    def __init__(self) -> None:
        self._found: dict[str, _Sums] = {}

    def hear(self, site: Site, form: BottleneckForm, activity: Tensor) -> None:
        """Take `activity` (n, r) of n tokens at a site."""
        wide = activity.double()
        sums, squares = wide.sum(0), wide.square().sum(0)
        if (own := self._found.get(site.path)) is None:
            self._found[site.path] = _Sums(form, site.layer, len(wide), sums, squares)
        else:
            own.count, own.sums, own.squares = own.count + len(wide), own.sums + sums, own.squares + squares

    def sites(self) -> Iterator[dict[str, Any]]:
        """Of each bottleneck: its path and layer, its units, how many are dead, and on how many tokens."""
        for path, own in self._found.items():
            mean = own.sums / own.count
            varies = (own.squares / own.count - mean.square()).clamp(min=0).sqrt()
            # What a difference of large squares leaves behind is no activity.
            varies = torch.where(varies > 1e-6 * (own.squares / own.count).sqrt(), varies, 0.0)
            dead = dead_units(varies, own.form.up)
            yield {
                "path": path, "layer": own.layer, "units": len(dead), "dead": int(dead.sum()),
                "dead_units": dead.nonzero().flatten().tolist(), "tokens": own.count,
            }  # fmt: skip


def has_units(parts: Sequence[Part]) -> bool:
    """Whether a part of an adapter is a bottleneck somewhere."""
    return any(part.method.has("bottleneck") and _at(part) for part in parts)


def _at(part: Part) -> bool:
    return any(part.method.bottleneck(part.at(path, None, {}), site) for path, site in part.sites.items())
