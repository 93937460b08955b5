"""EVA's ranks: a budget that goes to the components, over all layers, that explain most of what is read there.

Paper: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation"
(arXiv:2410.07170).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from inlay.errors import UsageError
from inlay.sites.site import Site

from .probes import Components

__all__ = ["redistributed"]


class Ranked(Protocol):
    """What is asked of LoRA."""

    @property
    def eva_adjust_scaling_factors(self) -> bool: ...
    def rank(self, site: Site) -> int: ...
    def alpha_at(self, site: Site) -> float: ...


def redistributed(method: Ranked, sites: Sequence[Site], probes: Mapping[str, Components]) -> dict[str, Any]:
    """The settings `targets`, `rank_pattern` and `alpha_pattern` of ranks by the components that `probes` have seen.
    Layers that get none are no targets.

    Raises: UsageError where a probe has seen fewer tokens than it has components to find.
    """
    for path, probe in probes.items():
        probe.fit()
        if probe.seen < probe.count:
            what = f"init=eva saw {probe.seen} tokens at {path}, and looks for {probe.count} components"
            raise UsageError(what, "Give more rows (init_rows), a lower r, or eva_use_label_mask=false.")
    ranks = _ranks(probes, sum(method.rank(site) for site in sites))
    kept = [site for site in sites if ranks[site.path]]
    grown = {s.path: ranks[s.path] / method.rank(s) if method.eva_adjust_scaling_factors else 1.0 for s in kept}
    return {
        "targets": [site.path for site in kept],
        "rank_pattern": {re.escape(site.path): ranks[site.path] for site in kept},
        "alpha_pattern": {re.escape(site.path): method.alpha_at(site) * grown[site.path] for site in kept},
    }


def _ranks(probes: Mapping[str, Components], budget: int) -> dict[str, int]:
    """The rank of each layer; at most the components of its probe."""
    twin = _twins(probes)
    order = sorted(probes, key=lambda path: path in twin)  # those that read the same come behind the first of them
    entries = [(path, ratio) for path in order for ratio in probes[path].ratios]
    best = torch.stack([ratio for _, ratio in entries]).argsort(descending=True, stable=True)
    counts = Counter(entries[number][0] for number in best[:budget].tolist())
    found = {path: counts[path] for path in probes}
    for path, first in twin.items():  # as the reference has it: the first of those that read the same gets most
        if found[path] > found[first]:
            found[path], found[first] = found[first], found[path]
    return found


def _twins(probes: Mapping[str, Components]) -> dict[str, str]:
    """For each layer that reads what an earlier one reads, that one."""
    first: dict[str, str] = {}
    known: list[str] = []
    for path, probe in probes.items():
        like = (
            p for p in known if probes[p].mean.shape == probe.mean.shape and torch.equal(probes[p].mean, probe.mean)
        )
        same = next(like, None)
        if same is None:
            known.append(path)
        else:
            first[path] = same
    return first
