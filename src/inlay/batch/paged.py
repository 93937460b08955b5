"""A packed forward whose segments go on from what a store holds of their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.sites.attention import QKV
from inlay.sites.backbone import Backbone

from .blocks import StreamMask
from .packed import PackedLayout
from .paged_attention import Reading, Runs, Singles, Stored, Writing
from .past import BLOCK, Past, Store
from .prefixes import Prefixes
from .route import Blend
from .step_numbers import StepNumbers

__all__ = ["Going", "PastLayout"]


@dataclass(frozen=True, eq=False)
class Going:
    """The pasts of a stream's segments, in a store that has room for what is new. `values` is what forwards of the same
    rows, in the same order, need not compute again, the first `known` of them from others; `tables` hold adapters for
    rows in any company. Rows of one new token each may be told by `numbers` what their pasts say: those are where they
    were at the next step."""

    store: Store
    pasts: Sequence[Past]
    values: dict[Any, Any]
    tables: dict[Any, Any]
    known: int = 0
    numbers: StepNumbers | None = None


class PastLayout(PackedLayout):
    """Segments of `lengths` new tokens. Segments of one token each come first in the stream, or stand alone in it.

    A row's prefix goes into the store ahead of its first token; virtual tokens stand among those of the chunk that
    holds their place.
    """

    def __init__(
        self, blends: Sequence[Blend], lengths: Sequence[int], backbone: Backbone, virtual: Sequence[int],
        prefixes: Prefixes, values: Callable[[Blend], Tensor | None], going: Going, last_virtual_predicts: bool = True,
    ) -> None:  # fmt: skip
        self.going, self.pasts = going, going.pasts
        begins = [past.own == 0 and not past.virtual for past in self.pasts]
        new = [v if begin else 0 for v, begin in zip(virtual, begins, strict=True)]
        places = [past.place if v else 0 for past, v in zip(self.pasts, new, strict=True)]
        for place, length in zip(places, lengths, strict=True):
            if place > length:
                raise UsageError("virtual tokens stand behind a row's first chunk", "Read its prompt in one.")
        super().__init__(
            blends, lengths, backbone, new, prefixes, values, places, last_virtual_predicts,
            [past.prompt for past in self.pasts],
        )  # fmt: skip
        self.fresh = [past.keys == 0 for past in self.pasts]
        self.singles = next((n for n, length in enumerate(self.lengths) if length != 1), len(self.lengths))
        self.singles = min(self.singles, next((n for n, fresh in enumerate(self.fresh) if fresh), self.singles))
        self.continued = self.singles == len(self.lengths)
        self._turns: dict[nn.Module, int] = {}
        self._laid: _Laid | None = None

    @property
    def tables(self) -> dict[Any, Any]:
        return self.going.tables

    @property
    def memories(self) -> list[dict[Any, Any]]:
        """What methods remember of each segment's row."""
        return [past.memory for past in self.pasts]

    def positions(self) -> tuple[Tensor, Tensor]:
        position, lengths = super().positions()
        before = [torch.full((n,), past.own) for n, past in zip(self.lengths, self.pasts, strict=True)]
        moved = position + torch.cat(before).to(position.device)
        return torch.where(position < 0, position, moved), lengths

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        numbers = self.going.numbers
        if numbers is not None:
            own = {"position_ids": numbers.positions + self.backbone.first} if self.backbone.takes_positions else {}
            return {**given, "attention_mask": torch.ones_like(numbers.ids), "use_cache": False, **own}
        given = super().prepare(given)
        if "position_ids" in given:
            before = [torch.full((n,), p.virtual + p.own) for n, p in zip(self.lengths, self.pasts, strict=True)]
            given["position_ids"] = given["position_ids"] + torch.cat(before).to(given["position_ids"].device)[None]
        return given

    # ---- attention

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        if not isinstance(mask, StreamMask) or rest.get("position_bias") is not None:
            raise UsageError(
                f"{type(module).__name__} makes masks or biases of its own, which a packed stream cannot follow",
                "Use padded rows and `route`.",
            )
        turn = self._turns.get(module, 0)
        self._turns[module] = turn + 1
        laid = self._laid or self._lay_out(qkv[0].device)
        q, k, v = qkv
        layer = self.going.store.layer((module, turn), k, v)
        self._write_prefixes(module, laid, layer, k, v)
        laid.writing.write(layer, k, v)
        pieces = []
        if laid.singles is not None:
            one = slice(0, self.singles)
            pieces.append(laid.singles.attend(plain, module, turn, (q[:, :, one], k, v), mask, rest)[None])
        if laid.runs is not None and laid.stored is not None:
            rest_of = slice(self.singles, None)
            laid.stored.turn = turn
            own = q[:, :, rest_of], k[:, :, rest_of], v[:, :, rest_of]
            pieces.append(laid.runs.attend(plain, module, own, mask, rest))
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)), None

    def _lay_out(self, device: torch.device) -> _Laid:
        store, pasts, n, numbers = self.going.store, self.pasts, self.singles, self.going.numbers
        if numbers is not None:
            self._laid = _Laid(Writing(numbers.spots), Singles(store, Reading.told(numbers)), None, None, [], None)
            return self._laid
        for past, prefix, fresh in zip(pasts, self.prefixes.lengths, self.fresh, strict=True):
            if fresh:
                past.prefix = prefix
        places = [_spots(past, past.keys, length) for past, length in zip(pasts, self.lengths, strict=True)]
        stored = Stored(store, pasts[n:], device) if n < len(pasts) else None
        runs = None if stored is None else Runs(self.lengths[n:], stored, device)  # pyright: ignore
        singles = Singles(store, Reading.of(pasts[:n], [1] * n, device)) if n else None
        fresh = [unit for unit, new in enumerate(self.fresh) if new and self.prefixes.lengths[unit]]
        ahead = [_spots(pasts[unit], 0, self.prefixes.lengths[unit]) for unit in fresh]
        self._laid = _Laid(
            Writing(torch.cat(places).to(device)), singles, stored, runs,
            fresh, Writing(torch.cat(ahead).to(device)) if ahead else None,
        )  # fmt: skip
        return self._laid

    def _write_prefixes(
        self, module: nn.Module, laid: _Laid, layer: tuple[Tensor, Tensor], k: Tensor, v: Tensor
    ) -> None:
        """The prefixes of rows that begin; a layer that takes none has nothing before its row's keys."""
        if laid.ahead is None:
            return
        found = self.prefixes.of(module, laid.fresh, k, v)
        if found is None:
            raise UsageError(f"{type(module).__name__} takes no prefix, as others here do", "Use padded rows.")
        widest = found[0].shape[2]
        own = [
            torch.cat([x[n, :, widest - self.prefixes.lengths[unit] :] for n, unit in enumerate(laid.fresh)], 1)[None]
            for x in found
        ]
        laid.ahead.write(layer, own[0].to(k.dtype), own[1].to(v.dtype))

    # ---- behind a forward

    def advance(self) -> None:
        """The rows have read what was new."""
        for past, length, virtual in zip(self.pasts, self.lengths, self.virtual, strict=True):
            past.virtual += virtual
            past.own += length - virtual


@dataclass(eq=False)
class _Laid:
    """Where the keys of a forward go and come from: rows of one new token, longer runs, and prefixes of rows that begin
    (`fresh`)."""

    writing: Writing
    singles: Singles | None
    stored: Stored | None
    runs: Runs | None
    fresh: list[int]
    ahead: Writing | None


def _spots(past: Past, first: int, count: int) -> Tensor:
    """The places of keys `first` and on in a row's blocks, as one number each."""
    places = range(first, first + count)
    return torch.tensor([past.blocks[n // BLOCK] * BLOCK + n % BLOCK for n in places])
