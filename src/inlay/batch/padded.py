"""One padded forward: virtual tokens stand directly before each row's first real one, prefix keys before all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.sites.attention import QKV, is_own
from inlay.sites.backbone import Backbone

from .layout import Layout, Unit
from .partition import Partition
from .prefixes import Prefixes
from .route import Blend
from .sources import decoder_source, encoder_source

__all__ = ["PaddedLayout", "columns"]


class PaddedLayout(Layout):
    """B rows of L columns, widened by the longest run of virtual tokens.

    `virtual` and `places` hold, for each row, the number of virtual tokens and before which of its own they stand. With
    `last_virtual_predicts`, the state that the token before them hands on is that of the last virtual one. With
    `first_virtual_pools`, a row's first token hands on the state of the virtual one that stands first, as in HF PEFT.
    `prompts` are the lengths of the rows' prompts, where they are known.
    """

    def __init__(
        self, blends: Sequence[Blend], backbone: Backbone, virtual: Sequence[int], prefixes: Prefixes,
        values: Callable[[Blend], Tensor | None], by_cache: bool = False, continued: bool = False,
        places: Sequence[int] | None = None, last_virtual_predicts: bool = True, prompts: Sequence[int] | None = None,
        first_virtual_pools: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(blends, Partition(blends), backbone, prefixes, values)
        self.by_cache = by_cache and prefixes.longest > 0
        self.virtual = torch.tensor(virtual)
        self.places = torch.tensor([0] * len(blends) if places is None else list(places))
        self.last_virtual_predicts, self.first_virtual_pools = last_virtual_predicts, first_virtual_pools
        self.widest = max(virtual, default=0)
        self.uneven = len(set(virtual)) > 1
        self.attends = (prefixes.longest > 0 and not by_cache) or self.uneven
        self.source: Tensor | None = None  # (B, W): original column, -1 padding, -2-j virtual token j
        self.lead = torch.zeros(len(blends), dtype=torch.long)
        self.continued = continued
        self.prompts = None if prompts is None else torch.tensor(list(prompts))
        self._filled = True
        self._own: tuple[Tensor, int] | None = None  # the mask of own tokens (B, past + L), and L

    def to_units(self, value: Tensor, width: int | None) -> Tensor:
        rows = len(self.blends)
        if value.numel() % (rows * (width or 1)) or (value.shape[0] != rows and value.ndim > 2):
            raise UsageError(f"an activation {tuple(value.shape)} does not hold {rows} rows", "Choose other targets.")
        return value.reshape(-1, width) if width else value.reshape(-1)

    def samples(self, members: Sequence[int], vectors: int) -> list[Unit]:
        return [(row, int(self.lead[row]), vectors) for row in members]

    def positions(self) -> tuple[Tensor, Tensor] | None:
        if self._own is None:
            return None
        whole, length = self._own
        position = torch.where(whole > 0, whole.cumsum(1) - 1, -1)[:, -length:]
        lengths = whole.sum(1) if self.prompts is None else self.prompts.to(whole.device)
        if self.source is not None and self.source.shape[1] == self.widest + length:
            position = self._widened(position, -1, -1)
        return position.flatten(), lengths[:, None].expand_as(position).flatten()

    def prompt_lengths(self) -> tuple[int, ...] | None:
        if self._own is None:
            return None
        return tuple((self._own[0].sum(1) if self.prompts is None else self.prompts).tolist())

    # ---- the backbone's arguments

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
        inputs = ids if ids is not None else embeds
        self._note_own(inputs, mask, given)
        if inputs is None or not (self.widest or self.prefixes.longest):
            return given
        if self.continued and not columns(given.get(self.backbone.cache)):
            return given  # a recurrent state, which has taken the virtual tokens in
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UsageError("prefixes and virtual tokens need a 2-D attention mask", "Give (rows, tokens).")
        rows, length = inputs.shape[:2]
        past, extra = self._past(given.get(self.backbone.cache))
        real = past - extra
        self.virtual, self.places = self.virtual.to(inputs.device), self.places.to(inputs.device)
        whole = inputs.new_ones(rows, real + length, dtype=torch.long) if mask is None else mask.long()
        self._lay_out(whole)
        given = self._positioned(given, ids, whole, real, length)
        if self.widest:
            given["attention_mask"] = self._widened(whole, 1, 0)
            if not past:
                given = self._with_virtual(given, ids, embeds)
        if self.by_cache:
            self._prefilled(given, whole, past)
        return given

    def _note_own(self, inputs: Tensor | None, mask: Any, given: Mapping[str, Any]) -> None:
        """Remember which columns are the rows' own tokens: `positions` may be asked for them."""
        if inputs is None:
            return
        rows, length = inputs.shape[:2]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._own = mask.long(), length
        else:
            past, extra = self._past(given.get(self.backbone.cache))
            self._own = inputs.new_ones(rows, past - extra + length, dtype=torch.long), length

    def _past(self, cache: Any) -> tuple[int, int]:
        """Cached columns, and how many of them are virtual or prefix."""
        past = columns(cache) if self.backbone.part != "encoder" else 0
        if past and (self.widest or self.prefixes.longest) and type(cache).__name__ == "StaticCache":
            raise UsageError("a static cache has no room for prefixes and virtual tokens", "Use the default cache.")
        return past, (self.widest + (self.prefixes.longest if self.by_cache else 0)) if past else 0

    def _lay_out(self, mask: Tensor) -> None:
        first, width, length = mask.argmax(1), self.widest, mask.shape[1]
        if bool(((self.places < 0) | (self.places > mask.sum(1))).any()):
            raise UsageError(f"places {self.places.tolist()} lie outside of their rows", "Count the rows' own tokens.")
        encoder = self.backbone.part == "encoder"
        self.lead = first if encoder else first + width - self.virtual
        if width:
            source = encoder_source if encoder else decoder_source
            self.source = source(first, self.places, self.virtual, width, length)

    def _widened(self, values: Tensor, virtual: Any, padding: Any) -> Tensor:
        """(B, L) values in the widened call: `virtual` at virtual tokens, `padding` at new padding."""
        assert self.source is not None
        source = self.source[:, : self.widest + values.shape[1]]
        wide = torch.where(source == -1, padding, values.gather(1, source.clamp(min=0)))
        return torch.where(source < -1, virtual, wide)

    def _positioned(
        self, given: dict[str, Any], ids: Tensor | None, mask: Tensor, real: int, length: int
    ) -> dict[str, Any]:
        if not self.backbone.takes_positions:
            return given
        moved = (self.virtual + torch.tensor(self.prefixes.lengths, device=mask.device))[:, None]
        positions = given.get("position_ids")
        if positions is None:
            plain = self.backbone.plain_positions(ids, mask, real)
            positions = torch.where(moved > 0, self.backbone.real_positions(mask, real), plain)
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
            wide = self._widened(positions, 0, self.backbone.first)
            own = first - virtual + places - 2 - self.source
            positions = torch.where(self.source < -1, own, wide)
        return {**given, "position_ids": positions}

    def _with_virtual(self, given: dict[str, Any], ids: Tensor | None, embeds: Tensor | None) -> dict[str, Any]:
        if ids is not None:
            given["input_ids"], self._filled = self._widened(ids, self.backbone.filler, self.backbone.filler), False
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
        cache = given[self.backbone.cache] = given.get(self.backbone.cache) or DynamicCache()
        for layer, (k, v) in enumerate(self.prefixes.all_layers(len(self.blends))):
            cache.update(k, v, layer)

    # ---- inside the backbone

    def embed(self, embedded: Tensor) -> Tensor | None:
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
        if self.source is None or states.shape[1] != self.source.shape[1]:
            return states
        kept = (self.source >= 0).nonzero()[:, 1].view(states.shape[0], -1)
        if self.last_virtual_predicts and self.backbone.part != "encoder":
            end = (self.lead + self.places + self.virtual - 1)[:, None]
            before = kept == (self.lead + self.places - 1)[:, None]
            kept = torch.where(before & ((self.places > 0) & (self.virtual > 0))[:, None], end, kept)
        if self.first_virtual_pools:
            opening = kept == (self.lead + self.virtual)[:, None]
            opening &= ((self.places == 0) & (self.virtual > 0))[:, None]
            kept = torch.where(opening, self.lead[:, None], kept)
        index = kept.view(*kept.shape, *([1] * (states.ndim - 2))).expand(-1, -1, *states.shape[2:])
        return states.gather(1, index)

    def own_tokens(self, embedded: Tensor) -> list[tuple[int, Tensor]]:
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

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        q, k, v = qkv
        width, columns = self.prefixes.longest, k.shape[2]
        found = self.prefixes.of(module, range(len(self.blends)), k, v) if width else None
        if found is None:  # cross-attention, or a stack that takes no prefix
            if width and isinstance(mask, Tensor) and mask.shape[-1] > columns:
                mask = mask[..., width:]
            return plain(module, q, k, v, mask, **rest)
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
            own = next(m for m in self.backbone.module.modules() if getattr(m, "has_relative_attention_bias", False))
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
