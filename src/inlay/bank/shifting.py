"""Decoders that are given no positions but count their cache: rows behind a prefix are counted from its end."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from inlay.batch.forward import FORWARD
from inlay.batch.padded import PaddedLayout
from inlay.errors import UsageError
from inlay.sites.backbone import Backbone
from inlay.sites.hints import CACHE_LENGTHS

from .hooks import Hook

__all__ = ["shifting_hooks"]


def shifting_hooks(backbone: Backbone, owner: object) -> list[Hook]:
    """Hooks on the tables of positions that are told how many tokens precede, as in Bart's family.

    HF PEFT hands a prefix over as a cache, whose length those tables add to each position. Here the prefix is in no
    cache, so that its length is added in its place, for each row its own.
    """
    if backbone.takes_positions:
        return []  # the layout moves them
    return [
        Hook.after(module, _shifted(name, owner), named=True)
        for module in backbone.module.modules()
        for name in CACHE_LENGTHS & set(inspect.signature(module.forward).parameters)
        if module is not backbone.module and not any(module.children())
    ]


def _checked(layout: PaddedLayout) -> None:
    """Raises: UsageError where the cache, which a base counts for all rows alike, holds prefixes of unequal lengths."""
    if len(set(layout.prefixes.lengths)) > 1:
        raise UsageError(
            "this base counts its cache for all rows alike: rows with prefixes of unequal lengths cannot share a batch",
            "Run them in batches of their own.",
        )


def _shifted(name: str, owner: object) -> Any:
    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor | None:
        forward = FORWARD.get()
        if forward is None or forward.owner is not owner or not isinstance(forward.layout, PaddedLayout):
            return None
        layout = forward.layout
        if not layout.prefixes.longest or not isinstance(out, Tensor):
            return None
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        given, lengths = dict(bound.arguments), layout.prefixes.lengths
        rows = (out if out.ndim == 3 else out[None]).expand(len(lengths), -1, -1)
        if layout.by_cache and layout.backbone.part != "decoder":
            return _checked(layout)
        counted = layout.prefixes.longest if layout.by_cache else 0  # in the cache's length already
        for length in set(lengths) - {counted}:
            moved = {**given, name: given[name] + length - counted}
            if isinstance(given.get("position_ids"), Tensor):
                moved["position_ids"] = given["position_ids"] + length - counted
            own = torch.tensor([n == length for n in lengths], device=out.device)[:, None, None]
            try:
                rows = torch.where(own, module.forward(**moved), rows)
            except IndexError:
                what = f"the base has no positions for a prefix of {length} before tokens as many as these"
                raise UsageError(what, "Shorten the rows or the prefix.") from None
        return rows

    return run
