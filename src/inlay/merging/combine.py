"""Makes one adapter of several that lie in folders, and says how far it is from their sum by weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inlay.bank.adapter import Adapter
from inlay.bank.bank import Bank, attach
from inlay.bank.combining import products
from inlay.bank.rules import Combination
from inlay.bases.adapters import adapter_folder
from inlay.bases.load import load_base
from inlay.data.prompting import prompting_of
from inlay.errors import UsageError
from inlay.formats.notes import read_notes

from .folders import whole_folder
from .merge import check_out

__all__ = ["combine_to_folder"]

NAME = ":combined"
"""By what the bank knows it: no folder is called so."""


@torch.no_grad()
def combine_to_folder(
    base: str, adapters: Sequence[str], weights: Sequence[float], out: str, by: Combination
) -> dict[str, Any]:
    """Write the combination of `adapters` by their `weights` (equal shares where none are given) to the new folder
    `out`, whole or not at all.

    Returns: the folder, rule and rank; how far its products are from the sum by weights, as a share of that sum's
    norm, in the mean and at most over the modules; and whether the adapters' common template travels with it. Raises:
    UsageError where `out` cannot be made, weights do not fit, or an adapter is more than low-rank products.
    """
    folder = Path(out).expanduser()
    check_out(folder)
    sources = [adapter_folder(name) for name in adapters]
    shares = list(weights) or [1 / max(1, len(sources))] * len(sources)
    if not sources or len(shares) != len(sources):
        what = f"there are {len(sources)} adapters and {len(weights)} weights"
        raise UsageError(what, "Give --adapter for each, and --weight for each or none.")
    if twice := next((name for name in adapters if list(adapters).count(name) > 1), None):
        raise UsageError(f"adapter {twice} is given twice", "Give it once, with the sum of its weights.")
    bank = attach(load_base(base, "float32", device="cpu").model)
    for name, source in zip(adapters, sources, strict=True):
        bank.load(name, source)
    by_name = dict(zip(adapters, shares, strict=True))
    adapter = bank.combine(NAME, by_name, **vars(by))
    apart = _apart(adapter, [(bank.adapters[name], weight) for name, weight in by_name.items()])
    noted, notes = _notes(sources)
    _save(bank, folder, notes)
    return {
        "combined": str(folder),
        "adapters": list(adapters),
        "weights": shares,
        "how": by.how,
        "rank": adapter.method.to_peft([*adapter.sites.values()])["r"],
        "mean_difference": sum(apart) / len(apart),
        "max_difference": max(apart),
        "template": noted,
    }


def _apart(adapter: Adapter, chosen: Sequence[tuple[Adapter, float]]) -> list[float]:
    """Of each module: |made - sum| / |sum|."""
    made, found = products(adapter), [(products(own), weight) for own, weight in chosen]
    shares: list[float] = []
    for path, product in made.items():
        whole = sum(weight * own[path].whole().double() for own, weight in found if path in own)
        assert isinstance(whole, torch.Tensor)
        norm = float(whole.norm())
        apart = float((product.whole().double() - whole).norm())
        shares.append(apart / norm if norm else apart)
    return shares


def _notes(sources: Sequence[Path]) -> tuple[bool, Mapping[str, Any]]:
    """What the adapters say alike of their training's template; nothing where they differ."""
    try:
        prompting = prompting_of(sources)
    except UsageError:
        return False, {}
    if prompting is None:
        return False, {}
    notes = {"template": prompting.template.to_dict(), "max_length": prompting.max_length}
    return True, {**notes, "virtual_tokens_at": prompting.virtual_at, "base": read_notes(sources[0]).base}


def _save(bank: Bank, folder: Path, notes: Mapping[str, Any]) -> None:
    with whole_folder(folder) as beside:
        bank.save(NAME, beside, notes=notes)
