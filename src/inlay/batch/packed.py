"""One packed forward: a single row of tokens, cut into segments that never see each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.sites.attention import QKV, is_own
from inlay.sites.backbone import Backbone

from . import flash
from .blocks import Blocks, StreamMask
from .layout import Layout, Unit
from .partition import Partition
from .prefixes import Prefixes
from .route import Blend

__all__ = ["PackedLayout", "checked_places"]


class PackedLayout(Layout):
    """Segments of `lengths` tokens, each with its blend, its virtual tokens before token `places[i]`, its prefix keys.

    With `last_virtual_predicts`, the state that a segment's token before its virtual ones hands on is that of the last
    virtual one. `prompts` are the lengths of the segments' prompts, where they are known.
    """

    attends = True

    def __init__(
        self, blends: Sequence[Blend], lengths: Sequence[int], backbone: Backbone, virtual: Sequence[int],
        prefixes: Prefixes, values: Callable[[Blend], Tensor | None], places: Sequence[int] | None = None,
        last_virtual_predicts: bool = True, prompts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.places = checked_places(places, lengths)
        self.last_virtual_predicts = last_virtual_predicts
        self.lengths = [length + v for length, v in zip(lengths, virtual, strict=True)]
        super().__init__(blends, Partition(blends, self.lengths), backbone, prefixes, values)
        self.virtual, self.prompts = list(virtual), list(lengths if prompts is None else prompts)
        self.starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        spans = zip(self.lengths, self.places, virtual, strict=True)
        self._real = torch.cat([_outside(torch.arange(n), at, v) for n, at, v in spans])
        self._filled = not any(virtual)
        self._rows: flash.Rows | None = None
        self._blocks: Blocks | None = None

    def to_units(self, value: Tensor, width: int | None) -> Tensor:
        tokens = self.partition.total
        if self._by_head(value):
            value = value.transpose(1, 2)
        if tokens not in value.shape[:2] or (value.ndim > 2 and value.shape[1] != tokens):
            raise UsageError(
                f"an activation {tuple(value.shape)} does not hold {tokens} tokens", "Choose other targets."
            )
        return value.reshape(-1, width) if width else value.reshape(tokens)

    def from_units(self, value: Tensor, like: Tensor) -> Tensor:
        if not self._by_head(like):
            return value.reshape(like.shape)
        return value.view(1, like.shape[2], like.shape[1], like.shape[3]).transpose(1, 2)

    def in_order(self, value: Tensor) -> bool:
        return not self._by_head(value)

    def samples(self, members: Sequence[int], vectors: int) -> list[Unit]:
        return [(segment, 0, self.lengths[segment] * vectors) for segment in members]

    def positions(self) -> tuple[Tensor, Tensor]:
        position = torch.full((len(self._real),), -1, device=self._real.device)
        own = [torch.arange(n - v) for n, v in zip(self.lengths, self.virtual, strict=True)]
        position[self._real] = torch.cat(own).to(position.device)
        lengths = [torch.full((n,), p) for n, p in zip(self.lengths, self.prompts, strict=True)]
        return position, torch.cat(lengths).to(position.device)

    def _by_head(self, value: Tensor) -> bool:
        """Whether heads come before tokens, as where a norm acts on a query's heads; tokens have the larger stride."""
        if value.ndim != 4 or value.shape[2] != self.partition.total:
            return False
        return value.shape[1] == 1 or value.stride(1) < value.stride(2)

    # ---- the backbone's arguments

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        ids = given.get("input_ids")
        tokens = sum(self.lengths) - sum(self.virtual)
        if ids is None or ids.shape != (1, tokens):
            raise UsageError(f"the stream's segments hold {tokens} tokens", "Give input_ids of shape (1, tokens).")
        device = ids.device
        self._real = self._real.to(device)
        if not self._filled:
            wide = torch.full((1, len(self._real)), self.backbone.filler, dtype=ids.dtype, device=device)
            ids = wide.masked_scatter(self._real[None], ids)
        # A mask of ones keeps the base from looking for segments of its own.
        given = {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if self.backbone.takes_positions:
            shifts = self.prefixes.shifts
            spans = [torch.arange(n) + shift for n, shift in zip(self.lengths, shifts, strict=True)]
            given["position_ids"] = (torch.cat(spans) + self.backbone.first).to(device)[None]
        return given

    def embed(self, embedded: Tensor) -> Tensor | None:
        if self._filled:
            return None
        self._filled = True
        given = [self._values(blend) if new else None for blend, new in zip(self.blends, self.virtual, strict=True)]
        values = torch.cat([value for value in given if value is not None])
        at = (~self._real).nonzero()[:, 0]
        return embedded.index_copy(1, at, values[None].to(embedded.dtype))

    def narrow(self, states: Tensor) -> Tensor:
        if not any(self.virtual):
            return states
        kept = self._real.nonzero()[:, 0]
        for start, at, virtual in zip(self.starts, self.places, self.virtual, strict=True):
            if self.last_virtual_predicts and at and virtual:
                kept[kept == start + at - 1] = start + at + virtual - 1
        return states[:, kept]

    def own_tokens(self, embedded: Tensor) -> list[tuple[int, Tensor]]:
        sizes = [n - v for n, v in zip(self.lengths, self.virtual, strict=True)]
        return [(0, index) for index in self._real.nonzero()[:, 0].split(sizes)]

    # ---- attention

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        return StreamMask(call["mask_function"])

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        if not isinstance(mask, StreamMask) or rest.get("position_bias") is not None:
            raise UsageError(
                f"{type(module).__name__} makes masks or biases of its own, which a packed stream cannot follow",
                "Use padded rows and `route`.",
            )
        window = self._window(plain, mask, qkv)
        if window is not None:
            return self._flashed(module, qkv, window, rest.get("scaling"))[None], None
        if self._blocks is None:
            self._blocks = Blocks(self.lengths, self.prefixes, qkv[0].device)
        return self._blocks.attend(plain, module, qkv, mask, rest), None

    def _window(self, plain: Callable[..., Any], mask: StreamMask, qkv: QKV) -> Any:
        """What each token sees before and after it, where a kernel for whole streams can do all there is to do."""
        if is_own(plain) or not flash.fits(qkv[0], qkv[2]):
            return None
        longest = max(n + p for n, p in zip(self.lengths, self.prefixes.lengths, strict=True))
        if longest not in mask.cache:
            mask.cache[longest] = flash.window_of(mask.function, longest, qkv[0].device)
        return mask.cache[longest]

    def _flashed(self, module: nn.Module, qkv: QKV, window: flash.Window, scaling: float | None) -> Tensor:
        """(T, heads, dim)"""
        if self._rows is None:
            self._rows = flash.Rows.of(self.lengths, self.prefixes.lengths, qkv[0].device)
        units = range(len(self.lengths))
        found = self.prefixes.of(module, units, *qkv[1:]) if self.prefixes.longest else None
        q, k, v = (x.transpose(1, 2)[0] for x in qkv)
        return flash.flash(q, k, v, self._rows, window, scaling, found)


def checked_places(places: Sequence[int] | None, lengths: Sequence[int]) -> list[int]:
    """Where virtual tokens go in each row or segment; its beginning where nobody says. Raises: UsageError."""
    if places is None:
        return [0] * len(lengths)
    for place, length in zip(places, lengths, strict=True):
        if not 0 <= place <= length:
            raise UsageError(f"place {place} lies outside of a row of {length} tokens", "Count the row's own tokens.")
    return list(places)


def _outside(index: Tensor, start: int, width: int) -> Tensor:
    return (index < start) | (index >= start + width)
