"""One packed call: a single row of tokens, cut into segments that never see each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError

from .call import Call
from .portions import Portions
from .prefixes import Prefixes
from .route import Blend
from .stack import Stack
from .taking import Own, Put, Take, laid_out

__all__ = ["PackedCall", "checked_places"]

SHORT = 128
"""Keys below which a CPU's softmax in bfloat16 takes up to four times as long as one in float32 and two casts."""


@dataclass
class _Block:
    """Segments of like length, attended together: `index` (b, n) tokens of the stream, `real` (b, n) which are not
    padding. Padding repeats its own segment's first token, so that no value ever crosses to another segment.
    """

    units: list[int]
    index: Tensor
    real: Tensor


class _StreamMask:
    """What the base's layers hand around in place of a mask: the rule, to be evaluated inside each segment."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.held: dict[tuple[int, torch.dtype], Tensor] = {}


class PackedCall(Call):
    """Segments of `lengths` tokens, each with its blend, its virtual tokens before token `places[i]`, its prefix keys.

    With `writes`, the state that a segment's token before its virtual ones hands on is that of the last virtual one.
    """

    attends = True

    def __init__(
        self, owner: object, blends: Sequence[Blend], lengths: Sequence[int], stack: Stack, virtual: Sequence[int],
        prefixes: Prefixes, values: Callable[[Blend], Tensor | None], places: Sequence[int] | None = None,
        writes: bool = True,
    ) -> None:  # fmt: skip
        self.places = checked_places(places, lengths)
        self.writes = writes
        self.lengths = [length + v for length, v in zip(lengths, virtual, strict=True)]
        super().__init__(owner, Portions(blends, self.lengths))
        self.blends, self.stack, self.prefixes, self._values = list(blends), stack, prefixes, values
        self.virtual = list(virtual)
        self.starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        spans = zip(self.lengths, self.places, virtual, strict=True)
        self._real = torch.cat([_outside(torch.arange(n), at, v) for n, at, v in spans])
        self._blocks = [self._block(units) for units in _like_lengths(self.lengths)]
        self.home = self._homes()
        self._filled = not any(virtual)

    def unfold(self, value: Tensor, width: int | None) -> Tensor:
        tokens = self.portions.total
        if self._by_head(value):
            value = value.transpose(1, 2)
        if tokens not in value.shape[:2] or (value.ndim > 2 and value.shape[1] != tokens):
            raise UsageError(
                f"an activation {tuple(value.shape)} does not hold {tokens} tokens", "Choose other targets."
            )
        return value.reshape(tokens, -1, width).squeeze(1) if width else value.reshape(tokens)

    def fold(self, value: Tensor, like: Tensor) -> Tensor:
        if not self._by_head(like):
            return value.reshape(like.shape)
        return value.view(1, like.shape[2], like.shape[1], like.shape[3]).transpose(1, 2)

    def _by_head(self, value: Tensor) -> bool:
        """Whether heads come before tokens, as where a norm acts on a query's heads; tokens have the larger stride."""
        if value.ndim != 4 or value.shape[2] != self.portions.total:
            return False
        return value.shape[1] == 1 or value.stride(1) < value.stride(2)

    # ---- the call's arguments

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        """The stack's arguments for the stream with virtual tokens in place."""
        ids = given.get("input_ids")
        tokens = int(self._real.sum())
        if ids is None or ids.shape != (1, tokens):
            raise UsageError(f"the stream's segments hold {tokens} tokens", "Give input_ids of shape (1, tokens).")
        device = ids.device
        self._real = self._real.to(device)
        self.home = self.home.to(device)
        for block in self._blocks:
            block.index, block.real = block.index.to(device), block.real.to(device)
        if not self._filled:
            wide = torch.full((1, len(self._real)), self.stack.filler, dtype=ids.dtype, device=device)
            ids = wide.masked_scatter(self._real[None], ids)
        # A mask of ones keeps the base from looking for segments of its own.
        given = {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if self.stack.takes_positions:
            shifts = self.prefixes.lengths
            spans = [torch.arange(n) + shift for n, shift in zip(self.lengths, shifts, strict=True)]
            given["position_ids"] = (torch.cat(spans) + self.stack.first).to(device)[None]
        return given

    def embed(self, embedded: Tensor) -> Tensor | None:
        """Put virtual tokens into the embeddings of the widened stream, once a call."""
        if self._filled:
            return None
        self._filled = True
        given = [self._values(blend) for blend in self.blends]
        values = torch.cat([value for value in given if value is not None])
        at = (~self._real).nonzero()[:, 0]
        return embedded.index_copy(1, at, values[None].to(embedded.dtype))

    def narrow(self, states: Tensor) -> Tensor:
        """(1, T', ...) states without the virtual tokens."""
        if not any(self.virtual):
            return states
        kept = self._real.nonzero()[:, 0]
        for start, at, virtual in zip(self.starts, self.places, self.virtual, strict=True):
            if self.writes and at and virtual:
                kept[kept == start + at - 1] = start + at + virtual - 1
        return states[:, kept]

    def own_tokens(self, embedded: Tensor) -> list[tuple[int, Tensor]]:
        """For each segment, the row that it is in (0) and the indices of its own tokens."""
        sizes = [n - v for n, v in zip(self.lengths, self.virtual, strict=True)]
        return [(0, index) for index in self._real.nonzero()[:, 0].split(sizes)]

    # ---- attention

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        return _StreamMask(call["mask_function"])

    def attend(
        self, plain: Callable[..., Any], module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], mask: Any, **rest: Any
    ) -> tuple[Tensor, Any]:
        if not isinstance(mask, _StreamMask) or rest.get("position_bias") is not None:
            raise NotImplementedError("this base makes its masks or biases in a way that a packed stream cannot follow")
        tokens = [x.transpose(1, 2)[0] for x in qkv]
        pieces = []
        for number, block in enumerate(self._blocks):
            flat = block.index.reshape(-1)
            home = None if len(self._blocks) > 1 else self.home
            q, k, v = (self._taken(x, block, flat, home).transpose(1, 2) for x in tokens)
            found = self.prefixes.stacked(module, block.units, k, v) if self.prefixes.longest else None
            if found is not None:
                k, v = torch.cat([found[0], k], 2), torch.cat([found[1], v], 2)
            bias = self._bias(mask, number, block, k.shape[2], q.dtype)
            pieces.append(_attended(plain, module, q, k, v, bias, rest).flatten(0, 1))
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        index = torch.cat([block.index.reshape(-1) for block in self._blocks])
        padding = (~torch.cat([block.real.reshape(-1) for block in self._blocks])).nonzero()[:, 0]
        return Put.apply(joined, index, self.home, padding)[None], None  # pyright: ignore

    def _taken(self, x: Tensor, block: _Block, flat: Tensor, home: Tensor | None) -> Tensor:
        """(b, n, heads, dim) of x (T, heads, dim)."""
        if home is not None:
            taken = Take.apply(x, flat, home)
        else:  # several blocks share x, so each has a gradient for its own tokens alone
            taken = Own.apply(x, flat, block.real.reshape(-1).nonzero()[:, 0])
        return taken.unflatten(0, block.index.shape)  # pyright: ignore

    def _bias(self, mask: _StreamMask, number: int, block: _Block, keys: int, dtype: torch.dtype) -> Tensor:
        """(b, 1, n, P + n) additive mask of a block, made once for all layers that share the rule and the width."""
        spot = (number * 1_000_003 + keys, dtype)
        if spot not in mask.held:
            size, device = block.index.shape[1], block.index.device
            width = keys - size
            q = torch.arange(size, device=device).view(1, 1, size, 1)
            k = torch.arange(-width, size, device=device).view(1, 1, 1, keys)
            zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
            lengths = torch.tensor([self.prefixes.lengths[u] for u in block.units], device=device)
            front = torch.arange(-width, 0, device=device)[None] >= -lengths[:, None]
            there = torch.cat([front, block.real], 1)[:, None, None]
            shift = lengths.view(-1, 1, 1, 1)
            before = mask.function(zero, zero, q + shift, k[..., :width] + shift)
            inside = mask.function(zero, zero, q, k[..., width:])
            rows = len(block.units)
            parts = [before.expand(rows, 1, size, width), inside.expand(rows, 1, size, size)]
            seen = torch.cat(parts, -1) & there
            # A padded query keeps a key of its own, so that no row of the softmax is empty.
            mask.held[spot] = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return mask.held[spot]

    def _block(self, units: list[int]) -> _Block:
        starts, lengths = (torch.tensor([own[u] for u in units]) for own in (self.starts, self.lengths))
        return _Block(units, *laid_out(starts, lengths))

    def _homes(self) -> Tensor:
        """(T,) the place of each token in the blocks laid end to end."""
        flat = torch.cat([block.index.reshape(-1) for block in self._blocks])
        real = torch.cat([block.real.reshape(-1) for block in self._blocks]).nonzero()[:, 0]
        return torch.empty(len(real), dtype=torch.long).scatter_(0, flat[real], real)


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


def _like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Segments in groups whose padding to the longest stays small."""
    order = sorted(range(len(lengths)), key=lambda u: -lengths[u])
    groups: list[list[int]] = []
    for unit in order:
        if groups and lengths[unit] * 1.5 + 16 >= lengths[groups[-1][0]]:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return [sorted(group) for group in groups]


def _attended(
    plain: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rest: dict[str, Any]
) -> Tensor:
    """(b, n, heads, dim) attention of one block with an additive mask."""
    if plain.__name__ == "eager_attention_forward":  # the model's own: soft caps, sinks and whatever else it does
        return plain(module, q, k, v, bias, **rest)[0]
    rows, heads, size, dim = q.shape
    shared, keys = k.shape[1], k.shape[2]
    scaling = rest.get("scaling")
    q = q * (dim**-0.5 if scaling is None else scaling)
    # Query heads that share keys are more queries of one product: keys are not repeated.
    scores = q.reshape(rows, shared, -1, dim) @ k.transpose(2, 3)
    scores = scores.view(rows, shared, heads // shared, size, keys) + bias[:, :, None]
    if scores.dtype == torch.bfloat16 and keys < SHORT and not scores.is_cuda:
        weights = scores.float().softmax(-1).to(q.dtype)
    else:
        weights = scores.softmax(-1)
    weights = weights.view(rows, shared, -1, keys)
    return (weights @ v).view(rows, heads, size, v.shape[3]).transpose(1, 2)
