"""What a padded call must say so that a row's own tokens, and the end of its prompt, can be told."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inlay.errors import UsageError

__all__ = ["check_prompt_whole", "check_unpacked", "columns", "make_room", "rows_mask"]


def rows_mask(mask: Any, past: int, tokens: int, given: Any = None) -> Tensor | None:
    """Which columns (rows, past + tokens) hold tokens, by the attention mask of a call of `tokens` behind `past`
    others; None where there is none.

    A mask (rows, 1, tokens, columns) that lets each token see all before it, but for padding, says the same: generate
    makes such for a static cache. `given` is the mask that the caller gave the model around, which may make another of
    it. Raises: UsageError where it says more, or something else.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1:3] == (1, tokens)
    if fits and mask.shape[3] >= past + tokens:
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, : past + tokens]
        own = seen[:, -1]
        column = torch.arange(past + tokens, device=mask.device)
        causal = own[:, None] & (column[None, None] <= past + column[:tokens, None])
        # Padding sees nothing, or all where a softmax over nothing is avoided; a token of another text sees its own.
        empty = seen.any(-1) == seen.all(-1)
        if bool((torch.where(own[:, past:], (seen == causal).all(-1), empty)).all()) and bool(own[:, -1].all()):
            return own.long()
    kinds = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    shape = next((tuple(kind.shape) for kind in kinds if isinstance(kind, Tensor)), type(mask).__name__)
    if isinstance(given, Tensor) and given.ndim == 2:
        raise UsageError(
            f"this model makes a mask {shape} of the attention mask (rows, tokens), which says more than what is "
            "padding: prefixes, virtual tokens and positions have no place in it",
            "Choose a method without them, such as LoRA.",
        )
    raise UsageError(
        f"prefixes, virtual tokens and positions need the attention mask (rows, tokens); it is {shape}, and says more",
        "Give (rows, tokens), use the default cache, or choose a method without them, such as LoRA.",
    )


def check_unpacked(given: Mapping[str, Any], own: Tensor | None = None) -> None:
    """Raises: UsageError where a row holds several texts: where transformers was told their lengths, or positions go
    back from one to its neighbour of which both are tokens, `own` (rows, tokens)."""
    positions, packed = given.get("position_ids"), given.get("cu_seq_lens_q") is not None
    if not packed and own is not None and isinstance(positions, Tensor) and positions.ndim == 2:
        own = own.bool()
        packed = bool(((positions.diff(dim=1) < 0) & own[:, 1:] & own[:, :-1]).any())
    if packed:
        raise UsageError(
            "packed rows, such as of padding-free training or generate_batch, have no place for prefixes and virtual "
            "tokens, and no positions of a row's tokens",
            "Use padded rows and generate, bank.stream, or a method without them, such as LoRA.",
        )


def columns(cache: Any) -> int:
    """Tokens that a cache holds keys for; recurrent states hold none."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return 0


def make_room(cache: Any, tokens: int, virtual: int) -> None:
    """Let a cache of fixed size that nothing was written to yet hold `virtual` tokens more than it was made for.

    Raises: UsageError where it cannot hold `tokens`, the virtual ones among them.
    """
    layers = [own for own in getattr(cache, "layers", ()) if hasattr(own, "max_cache_len")]
    layers = [own for own in layers if not getattr(own, "is_sliding", False)]
    for layer in layers:
        if not layer.is_initialized:  # generate sizes it for a row's own tokens
            layer.max_cache_len += virtual
    room = min((layer.max_cache_len for layer in layers), default=tokens)
    if tokens > room:
        raise UsageError(
            f"the static cache has room for {room} tokens, and {tokens} come with {virtual} virtual ones",
            "Use the default cache, or give one of a larger max_cache_len.",
        )


def check_prompt_whole(continued: bool, tokens: int) -> None:
    """Where nobody says how long the prompts are, they are what the first call holds, and others follow token by token.

    `continued` is whether a call of so many `tokens` goes on from a cache. Raises: UsageError where a prompt comes in
    several calls.
    """
    if (continued and tokens > 1) or (not continued and _in_chunks()):
        raise UsageError(
            "the end of a prompt cannot be told: it comes in pieces (prefill_chunk_size, or several tokens on a cache)",
            "Say the number of each row's tokens, bank.route(rows, prompts=[...]), or give each prompt as a whole.",
        )


def _in_chunks() -> bool:
    """Whether transformers' generate hands a prompt over in chunks: it tells the model nothing of that."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_prefill" and "generation_config" in frame.f_locals:
            return getattr(frame.f_locals["generation_config"], "prefill_chunk_size", None) is not None
        frame = frame.f_back
    return False
