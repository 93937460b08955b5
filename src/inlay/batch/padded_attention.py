"""Attention of padded rows: prefix keys before each row's own, and padding that is new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.sites.attention import QKV, is_own

from .layout import Layout

__all__ = ["PaddedAttention"]


class PaddedAttention(Layout):
    """What a padded layout does in attention. `source` (B, W) says where each column comes from (-1: new padding),
    `lead` (B,) is each row's first column that is no padding; with `by_cache` prefixes are in the cache.
    """

    by_cache: bool
    source: Tensor | None
    lead: Tensor
    virtual: Tensor
    _own: tuple[Tensor, int] | None

    def padding(self, columns: int) -> Tensor | None:
        """Which of so many columns (B, columns) hold no token; None where all do, or that cannot be told."""
        if self._own is None:
            return None
        own = self._own[0][:, -self._own[1] :] > 0
        if self.source is not None and self.source.shape[1] == columns:
            own = torch.where(self.source < 0, self.source < -1, own.gather(1, self.source.clamp(min=0)))
        return None if own.shape[1] != columns or bool(own.all()) else ~own

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        base = self._kept_busy(plain(**{**call, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}))
        if not self.prefixes.longest or self.by_cache:
            return base
        rows, queries, width, device = base.shape[0], call["q_length"], self.prefixes.longest, base.device
        behind = torch.arange(width, device=device)[None] - width  # key j of a row's prefix stands at -P..-1
        front = self._front(rows, device)[:, None, None].expand(rows, 1, queries, width)
        # The reference's windows and chunks pass over a prefix as over any other keys, counted from its first.
        shift = torch.tensor(self.prefixes.lengths, device=device).view(rows, 1, 1, 1)
        q = (torch.arange(queries, device=device) + call.get("q_offset", 0)).view(1, 1, queries, 1) + shift
        k = (behind + self.lead.to(device)[:, None]).view(rows, 1, 1, width) + shift
        row, head = torch.arange(rows, device=device).view(rows, 1, 1, 1), torch.zeros_like(shift[:1])
        try:
            front = front & torch.broadcast_to(call["mask_function"](row, head, q, k), front.shape)
        except IndexError:
            what = "this base looks its masks up in tables of a row's tokens, in which prefix keys have no place"
            raise UsageError(what, "Choose LoRA.") from None
        if base.dtype != torch.bool:
            front = torch.zeros_like(front, dtype=base.dtype).masked_fill(~front, torch.finfo(base.dtype).min)
        return torch.cat([front.expand(rows, base.shape[1], queries, width), base], -1)

    def _kept_busy(self, mask: Tensor) -> Tensor:
        """Let new padding see itself: a softmax over nothing is NaN in some implementations, and NaN spreads."""
        if self.source is None or mask.shape[-2] != self.source.shape[1] or mask.shape[-1] < mask.shape[-2]:
            return mask
        padding = torch.diag_embed(self.source == -1)[:, None].to(mask.device)
        padding = F.pad(padding, (mask.shape[-1] - mask.shape[-2], 0))  # behind keys and values from a cache
        return mask | padding if mask.dtype == torch.bool else mask.masked_fill(padding, 0)

    def _front(self, rows: int, device: torch.device) -> Tensor:
        """(B, P): which of the prefix columns hold a key of the row."""
        width, lengths = self.prefixes.longest, torch.tensor(self.prefixes.lengths, device=device)
        return torch.arange(width, device=device)[None] >= width - lengths[:, None]

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        q, k, v = qkv
        width, columns = self.prefixes.longest, k.shape[2]
        found = self.prefixes.of(module, range(len(self.blends)), k, v) if width else None
        if found is None:  # cross-attention, or a stack that takes no prefix
            if width and isinstance(mask, Tensor) and mask.shape[-1] > columns:
                mask = mask[..., width:]
            return plain(module, q, k, v, mask, **rest)
        if isinstance(mask, Tensor) and (mask.shape[-1] < columns + width or mask.shape[-1] == columns + 2 * width):
            raise UsageError(
                f"{type(module).__name__} makes masks of its own, in which prefix keys have no place", "Choose LoRA."
            )
        if mask is None:  # a base that never masks, such as a vision encoder
            seen = self._front(q.shape[0], q.device)[:, None, None].expand(-1, 1, q.shape[2], width)
            mask = F.pad(seen, (0, columns), value=True)
            if is_own(plain):
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        if rest.get("position_bias") is not None:
            rest["position_bias"] = self._bias(module, q.shape[2], columns)
        k, v = torch.cat([found[0], k], 2), torch.cat([found[1], v], 2)
        return plain(module, q, k, v, mask[..., : columns + width], **rest)

    def _bias(self, module: Any, queries: int, columns: int) -> Tensor:
        """(B, heads, q, P + k) relative position bias, each row's prefix directly before its first column."""
        own: Any = module
        if not getattr(module, "has_relative_attention_bias", False):
            biased = (m for m in self.backbone.module.modules() if getattr(m, "has_relative_attention_bias", False))
            own = next(biased, None)
        if not hasattr(own, "compute_bias"):
            what = f"{type(module).__name__} makes biases of its own, in which prefix keys have no place"
            raise UsageError(what, "Choose LoRA.")
        width = self.prefixes.longest
        kinds: dict[int, Tensor] = {}
        for n in set(self.prefixes.lengths):
            bias = own.compute_bias(
                queries, columns + n, device=self.virtual.device, past_seen_tokens=columns - queries + n
            )
            kinds[n] = F.pad(bias, (width - n, 0))
        return torch.cat([kinds[n] for n in self.prefixes.lengths])
