"""One padded call: virtual tokens stand directly before each row's first real one, prefix keys before all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.errors import UsageError

from .call import Call
from .portions import Portions
from .prefixes import Prefixes
from .route import Blend
from .stack import Stack

__all__ = ["PaddedCall", "columns"]


class PaddedCall(Call):
    """B rows of L columns, widened by the longest run of virtual tokens.

    `virtual` and `places` hold, for each row, the number of virtual tokens and before which of its own they stand.
    With `writes`, the state that the token before them hands on is that of the last virtual one.
    """

    def __init__(
        self, owner: object, blends: Sequence[Blend], stack: Stack, virtual: Sequence[int], prefixes: Prefixes,
        values: Callable[[Blend], Tensor | None], by_cache: bool = False, continued: bool = False,
        places: Sequence[int] | None = None, writes: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(owner, Portions(blends))
        self.blends, self.stack, self.prefixes, self._values = list(blends), stack, prefixes, values
        self.by_cache = by_cache and prefixes.longest > 0
        self.virtual = torch.tensor(virtual)
        self.places = torch.tensor([0] * len(blends) if places is None else list(places))
        self.writes = writes
        self.widest = max(virtual, default=0)
        self.uneven = len(set(virtual)) > 1
        self.attends = (prefixes.longest > 0 and not by_cache) or self.uneven
        self.source: Tensor | None = None  # (B, W): original column, -1 padding, -2-j virtual token j
        self.lead = torch.zeros(len(blends), dtype=torch.long)
        self.continued = continued
        self._filled = True

    def unfold(self, value: Tensor, width: int | None) -> Tensor:
        rows = len(self.blends)
        if value.numel() % (rows * (width or 1)) or (value.shape[0] != rows and value.ndim > 2):
            raise UsageError(f"an activation {tuple(value.shape)} does not hold {rows} rows", "Choose other targets.")
        return value.reshape(rows, -1, width) if width else value.reshape(rows, -1)

    # ---- the call's arguments

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        """The stack's arguments with virtual tokens, positions and masks in place."""
        ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
        inputs = ids if ids is not None else embeds
        if inputs is None or not (self.widest or self.prefixes.longest):
            return given
        if self.continued and not columns(given.get(self.stack.cache)):
            return given  # a recurrent state, which has taken the virtual tokens in
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UsageError("prefixes and virtual tokens need a 2-D attention mask", "Give (rows, tokens).")
        rows, length = inputs.shape[:2]
        past, extra = self._past(given.get(self.stack.cache))
        real = past - extra
        self.virtual, self.places = self.virtual.to(inputs.device), self.places.to(inputs.device)
        whole = inputs.new_ones(rows, real + length, dtype=torch.long) if mask is None else mask.long()
        self._lay_out(whole, inputs.device)
        given = self._positioned(given, ids, whole, real, length)
        if self.widest:
            given["attention_mask"] = self._widened(whole, 1, 0)
            if not past:
                given = self._with_virtual(given, ids, embeds)
        if self.by_cache:
            self._prefilled(given, whole, past)
        return given

    def _past(self, cache: Any) -> tuple[int, int]:
        """Cached columns, and how many of them are virtual or prefix."""
        past = columns(cache) if self.stack.part != "encoder" else 0
        if past and type(cache).__name__ == "StaticCache":
            raise UsageError("a static cache has no room for prefixes and virtual tokens", "Use the default cache.")
        return past, (self.widest + (self.prefixes.longest if self.by_cache else 0)) if past else 0

    def _lay_out(self, mask: Tensor, device: torch.device) -> None:
        first, width = mask.argmax(1), self.widest
        if bool(((self.places < 0) | (self.places > mask.sum(1))).any()):
            raise UsageError(f"places {self.places.tolist()} lie outside of their rows", "Count the rows' own tokens.")
        if self.stack.part == "encoder":
            return self._lay_out_encoder(first, mask.shape[1])
        self.lead = first + width - self.virtual
        if not width:
            return
        column = torch.arange(width + mask.shape[1], device=device)[None]
        start, end = (self.lead + self.places)[:, None], (first + self.places + width)[:, None]
        source = torch.where(column < end, column - (width - self.virtual)[:, None], column - width)
        source = torch.where(column < (width - self.virtual)[:, None], -1, source)
        self.source = torch.where((column >= start) & (column < end), start - column - 2, source)

    def _lay_out_encoder(self, first: Tensor, length: int) -> None:
        """Nothing is ever appended to an encoder's rows: new padding goes behind them, where it moves no position."""
        self.lead = first
        if self.widest:
            column = torch.arange(self.widest + length, device=first.device)[None]
            first = first + self.places
            start, end = first[:, None], (first + self.virtual)[:, None]
            source = torch.where(column < start, column, column - self.virtual[:, None])
            source = torch.where(column >= length + self.virtual[:, None], -1, source)
            self.source = torch.where((column >= start) & (column < end), start - column - 2, source)

    def _widened(self, values: Tensor, virtual: Any, padding: Any) -> Tensor:
        """(B, L) values in the widened call: `virtual` at virtual tokens, `padding` at new padding."""
        assert self.source is not None
        source = self.source[:, : self.widest + values.shape[1]]
        wide = torch.where(source == -1, padding, values.gather(1, source.clamp(min=0)))
        return torch.where(source < -1, virtual, wide)

    def _positioned(
        self, given: dict[str, Any], ids: Tensor | None, mask: Tensor, real: int, length: int
    ) -> dict[str, Any]:
        if not self.stack.takes_positions:
            return given
        moved = (self.virtual + torch.tensor(self.prefixes.lengths, device=mask.device))[:, None]
        positions = given.get("position_ids")
        if positions is None:
            plain = self.stack.plain_positions(ids, mask, real)
            positions = torch.where(moved > 0, self.stack.real_positions(mask, real), plain)
        positions = positions.expand(len(self.blends), length)
        behind = mask[:, -length:].bool()
        if bool(((positions.diff(dim=1) < 0) & behind[:, 1:] & behind[:, :-1]).any()):
            raise UsageError(
                "packed rows have no place for prefixes and virtual tokens", "Use padded rows, or a stream."
            )
        positions = positions + moved
        if self.widest and not real and self.source is not None:
            # Tokens before the virtual ones are not moved by them, and virtual token j follows those by j.
            virtual, places = self.virtual[:, None], self.places[:, None]
            first = positions.gather(1, mask.argmax(1, keepdim=True))
            positions = torch.where(mask.cumsum(1) > places, positions, positions - virtual)
            wide = self._widened(positions, 0, self.stack.first)
            own = first - virtual + places - 2 - self.source
            positions = torch.where(self.source < -1, own, wide)
        return {**given, "position_ids": positions}

    def _with_virtual(self, given: dict[str, Any], ids: Tensor | None, embeds: Tensor | None) -> dict[str, Any]:
        if ids is not None:
            given["input_ids"], self._filled = self._widened(ids, self.stack.filler, self.stack.filler), False
        elif embeds is not None:
            assert self.source is not None
            index = self.source.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[2])
            given["inputs_embeds"] = self._fill(embeds.gather(1, index))
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = self._widened(given["token_type_ids"], 0, 0)
        return given

    def _prefilled(self, given: dict[str, Any], mask: Tensor, past: int) -> None:
        """For bases without the attention interface: the prefix goes ahead in the cache, right-aligned."""
        from transformers import DynamicCache

        device = mask.device
        lengths = torch.tensor(self.prefixes.lengths, device=device)[:, None]
        front = torch.arange(self.prefixes.longest, device=device)[None] >= self.prefixes.longest - lengths
        now = given.get("attention_mask")
        given["attention_mask"] = torch.cat([front.to(mask.dtype), mask if now is None else now], 1)
        if past:
            return
        cache = given[self.stack.cache] = given.get(self.stack.cache) or DynamicCache()
        for layer, (k, v) in enumerate(self.prefixes.all_layers(len(self.blends))):
            cache.update(k, v, layer)

    # ---- inside the stack

    def embed(self, embedded: Tensor) -> Tensor | None:
        """Put virtual tokens into the embeddings of the widened ids, once a call."""
        if self._filled or self.source is None:
            return None
        self._filled = True
        return self._fill(embedded)

    def _fill(self, embedded: Tensor) -> Tensor:
        assert self.source is not None
        rows = []
        for row, blend, source in zip(embedded.unbind(0), self.blends, self.source, strict=True):
            values, at = self._values(blend), (source < -1).nonzero()[:, 0]
            rows.append(row if values is None else row.index_copy(0, at, values.to(row.dtype)))
        return torch.stack(rows)

    def narrow(self, states: Tensor) -> Tensor:
        """(B, W, ...) states without the columns that this call added."""
        if self.source is None or states.shape[1] != self.source.shape[1]:
            return states
        kept = (self.source >= 0).nonzero()[:, 1].view(states.shape[0], -1)
        if self.writes and self.stack.part != "encoder":
            end = (self.lead + self.places + self.virtual - 1)[:, None]
            before = kept == (self.lead + self.places - 1)[:, None]
            kept = torch.where(before & ((self.places > 0) & (self.virtual > 0))[:, None], end, kept)
        index = kept.view(*kept.shape, *([1] * (states.ndim - 2))).expand(-1, -1, *states.shape[2:])
        return states.gather(1, index)

    def own_tokens(self, embedded: Tensor) -> list[tuple[int, Tensor]]:
        """For each row, its number and the columns of its own tokens, with the padding behind them."""
        if self.source is None:
            return [(row, torch.arange(embedded.shape[1])) for row in range(len(self.blends))]
        return [(row, (source >= 0).nonzero()[:, 0]) for row, source in enumerate(self.source)]

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
        front = front & torch.broadcast_to(call["mask_function"](row, head, q, k), front.shape)
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

    def attend(
        self, plain: Callable[..., Any], module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Any, **rest: Any
    ) -> tuple[Tensor, Any]:
        q, k, v = qkv
        width, columns = self.prefixes.longest, k.shape[2]
        found = self.prefixes.stacked(module, range(len(self.blends)), k, v) if width else None
        if found is None:  # cross-attention, or a stack that takes no prefix
            if width and isinstance(mask, Tensor) and mask.shape[-1] > columns:
                mask = mask[..., width:]
            return plain(module, q, k, v, mask, **rest)
        if mask is None:  # a base that never masks, such as a vision encoder
            seen = self._front(q.shape[0], q.device)[:, None, None].expand(-1, 1, q.shape[2], width)
            mask = F.pad(seen, (0, columns), value=True)
            if plain.__name__ == "eager_attention_forward":
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        if rest.get("position_bias") is not None:
            rest["position_bias"] = self._bias(module, q.shape[2], columns)
        k, v = torch.cat([found[0], k], 2), torch.cat([found[1], v], 2)
        return plain(module, q, k, v, mask[..., : columns + width], **rest)

    def _bias(self, module: Any, queries: int, columns: int) -> Tensor:
        """(B, heads, q, P + k) relative position bias, each row's prefix directly before its first column."""
        own: Any = module
        if not getattr(module, "has_relative_attention_bias", False):
            own = next(m for m in self.stack.module.modules() if getattr(m, "has_relative_attention_bias", False))
        width = self.prefixes.longest
        kinds: dict[int, Tensor] = {}
        for n in set(self.prefixes.lengths):
            bias = own.compute_bias(
                queries, columns + n, device=self.virtual.device, past_seen_tokens=columns - queries + n
            )
            kinds[n] = F.pad(bias, (width - n, 0))
        return torch.cat([kinds[n] for n in self.prefixes.lengths])


def columns(cache: Any) -> int:
    """Tokens that a cache holds keys for; recurrent states hold none."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return 0
