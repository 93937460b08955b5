"""Which row each image, video or sound of a call belongs to: towers compute them one after another, without rows.

What a tower gives takes the places of special tokens, in order: whose tokens they are says whose image it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.errors import UsageError

__all__ = ["INPUTS", "REMEDY", "Items", "items_of"]

INPUTS = {"pixel_values": "image", "pixel_values_videos": "video", "input_features": "audio", "input_values": "audio"}
"""Arguments that hold images, videos or sounds, and what their tokens and sizes are called by."""
REMEDY = "Give all rows one adapter, or leave what runs before the text out of its targets."
SIZES = ("image", "pixel", "spatial", "aspect", "tile", "patch", "feature_attention", "features_mask")
"""In the names of arguments that say of each item how much of it counts."""


@dataclass(frozen=True)
class Items:
    """The row of each item, in the order in which they are computed; `sizes` are their shares of what one sequence
    holds of all of them, None where each is a unit of its own."""

    rows: Sequence[int]
    sizes: Sequence[int] | None = None


def items_of(config: Any, given: Mapping[str, Any], name: str) -> Items:
    """The items of the argument `name` among the arguments `given` of a model.

    Raises: UsageError where their rows cannot be told.
    """
    kind, values, ids = INPUTS[name], given[name], given.get("input_ids")
    token = _first(config, f"{kind}_token_id", f"{kind}_token_index")
    if not isinstance(ids, Tensor) or token is None:
        raise _untold(kind, "the call has no input_ids, or the model no token for it")
    places = ids == token
    tokens = [int(n) for n in places.sum(1)]
    grid = given.get(f"{kind}_grid_thw")
    if isinstance(grid, Tensor):
        return _by_grid(config, kind, grid, tokens)
    if values.ndim == 5 and values.shape[0] == len(ids) and given.get("image_sizes") is None:
        counts = [int(n) for n in (values != 0).flatten(2).any(2).sum(1)]  # the rest of a row is padding
        if any(own * sum(counts) != n * sum(tokens) for own, n in zip(tokens, counts, strict=True)):
            raise _untold(kind, f"their tokens by row {tokens} do not fit {counts}")
        return _counted(counts)
    return _counted(_by_tokens(kind, given, name, places, tokens))


def _by_grid(config: Any, kind: str, grid: Tensor, tokens: Sequence[int]) -> Items:
    """Items of (frames, height, width) patches each, all in one sequence; each square of them gives one token."""
    inner = getattr(config, "vision_config", config)
    square = int(_first(inner, "spatial_merge_size", "merge_size") or 1) ** 2
    patches, rows, row, left = [int(n) for n in grid.prod(1)], [], 0, list(tokens)
    for size in patches:
        while row < len(left) and not left[row]:
            row += 1
        if row == len(left) or left[row] * square < size:
            raise _untold(kind, f"their tokens by row {list(tokens)} do not fit the patches {patches}")
        left[row] -= size // square
        rows.append(row)
    if any(left):
        raise _untold(kind, f"their tokens by row {list(tokens)} do not fit the patches {patches}")
    return Items(rows, patches)


def _by_tokens(kind: str, given: Mapping[str, Any], name: str, places: Tensor, tokens: Sequence[int]) -> list[int]:
    """Items by row: of so many tokens each where all are of one size, else by the runs of tokens without a break."""
    count, total = len(given[name]), sum(tokens)
    said = [k for k, v in given.items() if v is not None and k not in INPUTS and any(s in k for s in SIZES)]
    if not said and count and total and total % count == 0 and all(n % (total // count) == 0 for n in tokens):
        return [n // (total // count) for n in tokens]
    before = torch.cat([torch.zeros_like(places[:, :1]), places[:, :-1]], 1)
    runs = [int(n) for n in (places & ~before).sum(1)]
    if sum(runs) != count:
        raise _untold(kind, f"there are {count}, and {sum(runs)} runs of their tokens by row {runs}")
    return runs


def _counted(counts: Sequence[int]) -> Items:
    return Items([row for row, count in enumerate(counts) for _ in range(count)])


def _untold(kind: str, why: str) -> UsageError:
    return UsageError(f"which {kind} belongs to which row cannot be told: {why}", REMEDY)


def _first(config: Any, *names: str) -> Any:
    return next((v for name in names if (v := getattr(config, name, None)) is not None), None)
