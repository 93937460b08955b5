"""How much attention virtual tokens and prefixes get, in each layer and head, over rows of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bank.bank import Bank
from inlay.data.encode import Choices, Example
from inlay.errors import UsageError
from inlay.sites.attention import QKV, handled_by, tapped_by
from inlay.sites.observe import attention_sites, uses_interface

__all__ = ["attention_on_tokens", "attention_weights"]

ROWS = 16
"""Rows whose attention is looked at, each in a forward of its own."""
SCORES = "Look at the scores instead."
CLOSE = 0.02
"""By how much what the weights give may differ from what the base computes, as a share of the largest number there."""


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """softmax(scaling q k^T + mask), (B, heads, q, k), float32, of q (B, heads, q, dim), k (B, shared heads, k, dim)
    and a mask that is True, or 0, where a key is seen. Vaswani et al. 2017 (arXiv:1706.03762)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1)


@dataclass
class _Shares:
    """Sums over rows of what each virtual token got, (heads, tokens) by module, and of what each key would get if all
    that are seen got the same."""

    own: Sequence[nn.Module]
    columns: Sequence[int] = ()
    queries: Sequence[int] = ()
    found: dict[nn.Module, Tensor] = field(default_factory=dict)
    even: float = 0.0
    calls: int = 0

    def tap(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        return partial(self._attend, plain)

    # A handler, for forwards that the bank leaves attention alone in.

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        return plain(module, *qkv, mask, **rest)

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        return plain(**{**call, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    def _attend(
        self, plain: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **rest: Any
    ) -> Any:
        out = plain(module, q, k, v, mask, **rest)
        if module not in self.own or k.shape[2] <= max(self.columns):
            return out
        weights = attention_weights(q, k, mask, rest.get("scaling"))
        values = v.repeat_interleave(q.shape[1] // v.shape[1], 1).float()
        made, given = (weights @ values).transpose(1, 2), out[0].float().reshape(-1)
        if float((made.reshape(-1) - given).abs().max()) > CLOSE * float(given.abs().max()):
            raise UsageError("the base computes attention otherwise than by queries and keys alone", SCORES)
        seen = weights[0, :, self.queries]
        share = seen[..., self.columns].mean(1).double().cpu()
        self.found[module] = self.found.get(module, torch.zeros_like(share)) + share
        self.even += float((1 / (seen > 0).sum(-1).clamp(min=1)).mean())
        self.calls += 1
        return out


@torch.no_grad()
def attention_on_tokens(bank: Bank, name: str, items: Sequence[Choices | Example]) -> dict[str, Any]:
    """The share of attention that each virtual token (or key of a prefix) of the adapter `name` gets, the mean over the
    tokens behind it of at most `ROWS` rows: by token the mean over all heads, and the layer and head where it is
    largest; by layer and head that of all virtual tokens together; `even` is what each key would get if all that are
    seen got the same.

    Raises: UsageError where that cannot be seen in this base.
    """
    adapter, sites = bank.adapters[name], attention_sites(bank.base)
    if not uses_interface(bank.base) or len(bank.base.stacks) > 1:
        raise UsageError("it is seen in bases of one stack that go through transformers' interface alone", SCORES)
    model: Any = bank.model
    shares, rows = _Shares([site.module for site in sites]), items[:ROWS]
    for item in rows:
        ids = item.prompt if isinstance(item, Choices) else item.ids
        place, virtual, prefix = item.virtual_at, adapter.virtual_length, adapter.prefix_length
        shares.columns = [*range(prefix), *range(prefix + place, prefix + place + virtual)]
        first = place + virtual if virtual else 0
        shares.queries = [*range(min(first, len(ids) + virtual - 1), len(ids) + virtual)]
        given = torch.tensor([ids], device=model.device)
        with bank.route([name], places=[place]), handled_by(shares), tapped_by(shares.tap):
            model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False)
    if not shares.found:
        raise UsageError("no layer's attention sees them", SCORES)
    layers = [site.layer for site in sites if site.module in shares.found]
    whole = torch.stack([shares.found[site.module] / len(rows) for site in sites if site.module in shares.found])
    return {**_told(whole, layers), "even": shares.even / shares.calls, "rows": len(rows)}


def _told(whole: Tensor, layers: Sequence[int | None]) -> dict[str, Any]:
    """From shares (layers, heads, tokens), as JSON."""
    tokens = []
    for n in range(whole.shape[-1]):
        own = whole[..., n]
        layer, head = divmod(int(own.argmax()), own.shape[1])
        most = {"layer": layers[layer], "head": head, "share": float(own.max())}
        tokens.append({"share": float(own.mean()), "most": most})
    by_head = [{"layer": layer, "heads": own.sum(-1).tolist()} for layer, own in zip(layers, whole, strict=True)]
    return {"tokens": tokens, "layers": by_head, "all": float(whole.sum(-1).mean())}
