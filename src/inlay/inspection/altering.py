"""The changed copies of an adapter that rows are scored with: without each layer, cut to lower ranks, without each of
its virtual tokens, and with these shuffled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inlay.bank.adapter import Adapter, Part
from inlay.bank.variants import changed_part
from inlay.methods.contract import Method, Site

from .altered import cut, keeping
from .spectra import cut_factors, decomposed
from .tokens import token_parts

__all__ = ["heads_alone", "lower_ranks", "replaces_module", "shuffled", "without_layers", "without_tokens"]

SHUFFLES = 3
MOST_RANK = 128
"""Products of a higher rank are not cut: they are meant to be whole matrices."""
Triple = tuple[Tensor, Tensor, Tensor]
"""U, s and V^T of a product."""


def _with(adapter: Adapter, part: Part, other: Part | None) -> list[Part]:
    """The adapter's parts with `other` (none where that is None) in the place of one of them."""
    made = [other if own is part else changed_part(own) for own in adapter.parts]
    return [own for own in made if own is not None]


def replaces_module(part: Part) -> bool:
    """Whether a part is whole modules, as a trained head is, and nothing beside the base's."""
    return type(part.method).whole is not Method.whole


def heads_alone(adapter: Adapter) -> list[Part]:
    """The adapter's trained heads, where it has other parts besides; else nothing."""
    heads = [part for part in adapter.parts if replaces_module(part)]
    made = [changed_part(part) for part in heads] if len(heads) < len(adapter.parts) else []
    return [part for part in made if part is not None]


def block_of(site: Site) -> str:
    """What people call the place of a site: the number of its block, or its path outside of blocks."""
    return f"{site.stack} {site.layer}".strip() if site.layer is not None else site.path


def without_layers(adapter: Adapter) -> dict[str, list[Part]]:
    """For each block, the adapter without what it does there. Prefixes and virtual tokens stay, since a row has them
    in all layers or in none, and so do heads, without which there is no answer. Empty where a single block is left."""
    free = [
        (part, site)
        for part in adapter.parts if not (part in token_parts(adapter) or replaces_module(part))
        for site in part.sites.values()
    ]  # fmt: skip
    blocks = list(dict.fromkeys(block_of(site) for _, site in free))
    made: dict[str, list[Part]] = {}
    for block in blocks:
        places = {(part, site.path) for part, site in free if block_of(site) == block}
        own = [changed_part(p, keeps=lambda s, p=p, at=places: (p, s.path) not in at) for p in adapter.parts]
        if left := [part for part in own if part is not None]:
            made[block] = left
    return made


@torch.no_grad()
def lower_ranks(adapter: Adapter) -> dict[int, list[Part]]:
    """By each lower rank (halves, down to 1), the adapter with its products cut to it. Empty where it has none, or
    one of a rank above `MOST_RANK`, which is no small one."""
    whole: dict[tuple[Part, str], Triple] = {}
    for part in adapter.parts:
        for path in part.sites if part.method.has_form() else ():
            form = part.form(path, None, {})
            factors = form.factors()
            if factors is not None and factors[0].shape[-2] > MOST_RANK:
                return {}
            if factors is not None:
                whole[part, path] = decomposed(*factors, form.scale)
    rank, made = max((s.shape[-1] for _, s, _ in whole.values()), default=0), dict[int, list[Part]]()
    while rank > 1:
        rank //= 2
        own = [changed_part(part, _cut(part, whole, rank)) for part in adapter.parts]
        made[rank] = [part for part in own if part is not None]
    return made


def _cut(part: Part, whole: Mapping[tuple[Part, str], Triple], rank: int) -> Method | None:
    """The part's method with its products of higher ranks cut to `rank`; None where it has none."""
    like = next((value.dtype for own in part.params.values() for value in own.values()), torch.float32)
    factors = {
        path: tuple(one.to(like) for one in cut_factors(*triple, rank))
        for (owner, path), triple in whole.items() if owner is part and triple[1].shape[-1] > rank
    }  # fmt: skip
    return cut(part.method, {path: (down, up) for path, (down, up) in factors.items()}) if factors else None


def without_tokens(adapter: Adapter) -> dict[tuple[int, int], list[Part]]:
    """By part and number of a virtual token, the adapter without it. Empty where a part has a single one."""
    made: dict[tuple[int, int], list[Part]] = {}
    for part in token_parts(adapter):
        count = part.method.virtual_length or part.method.prefix_length
        for n in range(count) if count > 1 else ():
            kept = keeping(part.method, [k for k in range(count) if k != n])
            made[part.index, n] = _with(adapter, part, changed_part(part, kept))
    return made


def shuffled(adapter: Adapter, seed: int = 0) -> dict[int, list[Part]]:
    """The adapter with all its virtual tokens in another order, `SHUFFLES` times."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, list[Part]] = {}
    parts = token_parts(adapter)
    if not any((part.method.virtual_length or part.method.prefix_length) > 1 for part in parts):
        return made
    for turn in range(SHUFFLES):
        own: list[Part | None] = []
        for part in adapter.parts:
            count = part.method.virtual_length or part.method.prefix_length
            other = keeping(part.method, _order(count, generator)) if part in parts else None
            own.append(changed_part(part, other))
        made[turn] = [part for part in own if part is not None]
    return made


def _order(count: int, generator: torch.Generator) -> Sequence[int]:
    """Another order than 0, 1, 2, ... of so many, where there is one."""
    order = torch.randperm(count, generator=generator).tolist()
    return order if count < 2 or order != sorted(order) else [*order[1:], order[0]]
