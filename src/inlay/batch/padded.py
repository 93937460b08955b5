"""One padded forward: virtual tokens stand directly before each row's first real one, prefix keys before all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.backbone import Backbone

from .layout import Unit
from .padded_attention import PaddedAttention
from .partition import Partition
from .positions import own_positions
from .prefixes import Prefixes
from .prompts import check_prompt_whole, check_unpacked, columns, make_room, rows_mask
from .route import Blend
from .sources import decoder_source, encoder_source, has_virtual, with_virtual

__all__ = ["PaddedLayout"]


class PaddedLayout(PaddedAttention):
    """B rows of L columns, widened by the longest run of virtual tokens.

    `virtual` and `places` hold, for each row, the number of virtual tokens and before which of its own they stand. With
    `last_virtual_predicts`, the state that the token before them hands on is that of the last virtual one. With
    `first_virtual_pools`, a row's first token hands on the state of the virtual one that stands first, as in HF PEFT.
    `prompts` are the lengths of the rows' prompts, where they are known, and `prompts_said` whether the route says
    them: else they are what the first call of a cache held.
    """

    def __init__(
        self, blends: Sequence[Blend], backbone: Backbone, virtual: Sequence[int], prefixes: Prefixes,
        values: Callable[[Blend], Tensor | None], by_cache: bool = False, continued: bool = False,
        places: Sequence[int] | None = None, last_virtual_predicts: bool = True, prompts: Sequence[int] | None = None,
        first_virtual_pools: bool = False, prompts_said: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(blends, Partition(blends), backbone, prefixes, values)
        self.by_cache = by_cache and prefixes.longest > 0
        self.virtual = torch.tensor(virtual)
        self.places = torch.tensor([0] * len(blends) if places is None else list(places))
        self.last_virtual_predicts, self.first_virtual_pools = last_virtual_predicts, first_virtual_pools
        self._reads = self.virtual + torch.tensor(prefixes.lengths) + torch.tensor(prefixes.counted) > 0
        self.widest = max(virtual, default=0)
        self.uneven = len(set(virtual)) > 1
        self.attends = (prefixes.longest > 0 and not by_cache) or self.uneven
        self.source: Tensor | None = None  # (B, W): original column, -1 padding, -2-j virtual token j
        self.lead = torch.zeros(len(blends), dtype=torch.long)
        self.continued = continued
        self.prompts = None if prompts is None else torch.tensor(list(prompts))
        self._prompts_said, self._filled = prompts_said, True
        self._given: Mapping[str, Any] = {}
        self.outer_mask: Any = None  # what the model around the backbone was given
        self._mask: Any = None  # one that is not (rows, columns), until it is read
        self._own: tuple[Tensor, int] | None = None  # the mask of own tokens (B, past + L), and L

    @property
    def columns(self) -> int:
        """Tokens of a row in this forward, virtual ones and padding among them; 0 where that is not known."""
        if self._own is None:
            return 0
        wide = self.widest + self._own[1]
        return wide if self.source is not None and self.source.shape[1] == wide else self._own[1]

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
        check_unpacked(self._given)
        if self._mask is not None:
            whole = rows_mask(self._mask, whole.shape[1] - length, length, self.outer_mask)
            assert whole is not None
            self._own, self._mask = (whole, length), None
        check_unpacked(self._given, whole[:, -length:])
        if not self._prompts_said:
            check_prompt_whole(self.continued, length)
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
        if inputs is None and self.by_cache:
            what = f"{type(self.backbone.module).__name__} takes no input_ids, before which a prefix could be cached"
            raise UsageError(what, "Choose LoRA.")
        if inputs is None or not (self.widest or self.prefixes.longest):
            return given if inputs is None else self._counted(given, ids, mask, inputs.shape[1])
        if self.continued and not columns(given.get(self.backbone.cache)):
            return given  # a recurrent state, which has taken the virtual tokens in
        rows, length = inputs.shape[:2]
        past, extra = self._past(given.get(self.backbone.cache))
        real = past - extra
        check_unpacked(self._given)
        if mask is not None:
            given["attention_mask"] = mask = rows_mask(mask, real, length, self.outer_mask)
        if self.widest and not self.by_cache:
            make_room(given.get(self.backbone.cache), past + length + (0 if past else self.widest), self.widest)
        self.virtual, self.places = self.virtual.to(inputs.device), self.places.to(inputs.device)
        whole = inputs.new_ones(rows, real + length, dtype=torch.long) if mask is None else mask.long()
        self._lay_out(whole)
        empty = (self.virtual > 0) & (whole.sum(1) == 0)
        if not past and given.get(self.backbone.cache) is not None and bool(empty.any()):
            raise UsageError(
                "a row's first columns are padding alone: its virtual tokens have no place among them in the cache",
                "Prefill at least up to each row's first token.",
            )
        given = self._positioned(given, ids, whole, real, extra)
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
        self._given = {name: given.get(name) for name in ("position_ids", "cu_seq_lens_q")}
        outer = self.outer_mask  # a model of images makes other masks of it
        if isinstance(outer, Tensor) and outer.ndim == 2 and not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = outer
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._own = mask.long(), length
        else:
            past, extra = self._past(given.get(self.backbone.cache))
            self._own = inputs.new_ones(rows, past - extra + length, dtype=torch.long), length
            self._mask = mask  # read where somebody asks

    def _past(self, cache: Any) -> tuple[int, int]:
        """Cached columns, and how many of them are virtual or prefix."""
        past = columns(cache) if self.backbone.part != "encoder" else 0
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
        """(B, L, ...) values in the widened call: `virtual` at virtual tokens, `padding` at new padding."""
        assert self.source is not None
        source = self.source[:, : self.widest + values.shape[1]]
        source = source.view(*source.shape, *([1] * (values.ndim - 2))).expand(-1, -1, *values.shape[2:])
        wide = torch.where(source == -1, padding, values.gather(1, source.clamp(min=0)))
        return torch.where(source < -1, virtual, wide).to(values.dtype)

    def _positioned(
        self, given: dict[str, Any], ids: Tensor | None, mask: Tensor, real: int, extra: int
    ) -> dict[str, Any]:
        if not self.backbone.takes_positions:
            return given
        moved = (self.virtual + torch.tensor(self.prefixes.shifts, device=mask.device))[:, None]
        positions = own_positions(self.backbone, given.get("position_ids"), ids, mask, real, extra, self._reads)
        if positions.ndim == 3:  # one plane for time, height and width each
            return {**given, "position_ids": self._planes(positions, given, mask, moved, real)}
        return {**given, "position_ids": self._moved(positions, mask, moved, real)}

    def _counted(self, given: dict[str, Any], ids: Tensor | None, mask: Any, length: int) -> dict[str, Any]:
        """The call where nothing is put before any row."""
        padded = self.backbone.takes_positions and isinstance(mask, Tensor) and mask.ndim == 2
        if not (padded and any(self.prefixes.counted) and mask.shape[1] >= length):
            return given
        positions, past = given.get("position_ids"), mask.shape[1] - length
        positions = own_positions(self.backbone, positions, ids, mask.long(), past, 0, self._reads)
        return {**given, "position_ids": positions}

    def _planes(self, positions: Tensor, given: dict[str, Any], mask: Tensor, moved: Tensor, real: int) -> Tensor:
        """Positions (planes, B, L) of rows that may hold images; the first plane never goes back inside of a row."""
        if self.widest and bool((self.places > 0).any()):
            raise UsageError("virtual tokens stand before a row's first token in this base", "Leave places out.")
        if self.widest and real and given.get("attention_mask") is None:
            raise UsageError(
                "without a mask, this base counts the virtual tokens of its cache as a row's own",
                "Give attention_mask.",
            )
        first = self._moved(positions[0], mask, moved, real)
        rest = [self._moved(plane, mask, moved, real, in_order=False) for plane in positions[1:]]
        return torch.stack([first, *rest])

    def _moved(self, positions: Tensor, mask: Tensor, moved: Tensor, real: int, in_order: bool = True) -> Tensor:
        """Positions (B, L) behind prefixes and virtual tokens, with those of the virtual ones in place."""
        length = positions.shape[-1]
        positions = positions.expand(len(self.blends), length)
        behind = mask[:, -length:].bool()
        check_unpacked({"position_ids": positions}, behind if in_order else None)
        positions = positions + moved
        if self.widest and not real and self.source is not None:
            # Tokens before the virtual ones are not moved by them, and virtual token j follows those by j.
            virtual, places = self.virtual[:, None], self.places[:, None]
            first = positions.gather(1, mask.argmax(1, keepdim=True))
            positions = torch.where(mask.cumsum(1) > places, positions, positions - virtual)
            wide = self._widened(positions, 0, self.backbone.first)
            own = first - virtual + places - 2 - self.source
            positions = torch.where(self.source < -1, own, wide)
        return positions

    def _with_virtual(self, given: dict[str, Any], ids: Tensor | None, embeds: Tensor | None) -> dict[str, Any]:
        if ids is not None:
            given["input_ids"], self._filled = self._widened(ids, self.backbone.filler, self.backbone.filler), False
        elif embeds is not None:
            assert self.source is not None
            index = self.source.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[2])
            given["inputs_embeds"] = self._fill(embeds.gather(1, index))
        inputs = ids if ids is not None else embeds
        own = None if inputs is None else inputs.shape[:2]
        for name in {*given} - {"input_ids", "inputs_embeds", "attention_mask", "position_ids", self.backbone.cache}:
            value = given[name]  # such as token types, places on a page, which tokens are images'
            if isinstance(value, Tensor) and not value.is_floating_point() and value.shape[:2] == own:
                given[name] = self._widened(value, 0, 0)
        return given

    def _prefilled(self, given: dict[str, Any], mask: Tensor, past: int) -> None:
        """For bases without the attention interface: the prefix goes ahead in the cache, right-aligned."""
        from transformers import DynamicCache, EncoderDecoderCache

        device = mask.device
        lengths = torch.tensor(self.prefixes.lengths, device=device)[:, None]
        front = torch.arange(self.prefixes.longest, device=device)[None] >= self.prefixes.longest - lengths
        now = given.get("attention_mask")
        given["attention_mask"] = torch.cat([front.to(mask.dtype), mask if now is None else now], 1)
        if past:
            return
        cache = given.get(self.backbone.cache)
        crosses = self.backbone.part == "decoder" or given.get("encoder_hidden_states") is not None
        if cache is None and crosses:
            cache = given[self.backbone.cache] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        elif cache is None:
            cache = given[self.backbone.cache] = DynamicCache()
        for layer, (k, v) in enumerate(self.prefixes.all_layers(len(self.blends), self._dtype(given))):
            getattr(cache, "self_attention_cache", cache).update(k, v, layer)

    def _dtype(self, given: Mapping[str, Any]) -> torch.dtype:
        """That of the base's own keys and values."""
        floating = (p.dtype for p in self.backbone.module.parameters() if p.is_floating_point())
        embeds = given.get("inputs_embeds")
        return embeds.dtype if isinstance(embeds, Tensor) else next(floating, torch.get_default_dtype())

    # ---- inside the backbone

    def embed(self, embedded: Tensor) -> Tensor | None:
        if self._filled or self.source is None:
            return None
        self._filled = True
        return self._fill(embedded)

    def _fill(self, embedded: Tensor) -> Tensor:
        assert self.source is not None
        return with_virtual(embedded, self.source, [self._values(blend) for blend in self.blends])

    def narrow(self, states: Tensor) -> Tensor:
        if self.source is None or not has_virtual(states, self.source.shape[1], self._own, self.uneven):
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
