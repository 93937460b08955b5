"""Which words of the base's own table virtual tokens and prefixes are near, and whether that is nearer than chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.methods.virtual import token_table
from inlay.sites.attention import QKV, handled_by
from inlay.sites.observe import uses_interface
from inlay.sites.site import Site, plain_call
from inlay.sites.structure import Structure
from inlay.sites.tiny import quietly

__all__ = ["CHANCE", "Near", "nearest", "shown", "similarity", "values_of_words", "words_table"]

DRAWN = 256
"""Vectors that are no words, by which chance is measured."""
CHANCE = 0.01
"""What is near to a word has a `Near.chance` of at most this."""
AT_ONCE = 2048
"""Words that a layer reads at once."""


@dataclass(frozen=True)
class Near:
    """The nearest words' numbers and cosines, the nearest first; the mean cosine of vectors that are no words with the
    word nearest to them (`usual`), by how many standard deviations the first cosine is above it (`z`), and the share of
    such vectors that are as near to a word (`chance`)."""

    words: tuple[int, ...]
    cosines: tuple[float, ...]
    usual: float
    z: float
    chance: float


def nearest(vectors: Tensor, table: Tensor, count: int = 5, seed: int = 0) -> list[Near]:
    """The `count` words of `table` (words, d) that are nearest to each of `vectors` (n, d), by the cosine.

    Chance is measured on vectors whose every entry is that of a word drawn for this entry alone: each dimension is
    spread as over words, and nothing ties the dimensions together. Their largest cosines have a mean and a standard
    deviation, from which z; a share of (1 + those as near) / (1 + all), as in a permutation test (Phipson and Smyth
    2010).
    """
    table = table.float()
    unit = F.normalize(table, dim=1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(table), (DRAWN, table.shape[1]), generator=generator).to(table.device)
    none = _cosines(table.gather(0, drawn), unit).amax(1).double()
    mean, spread = none.mean(), none.std().clamp(min=1e-9)
    own, words = _cosines(vectors.float(), unit).topk(min(count, len(table)), dim=1)
    return [
        Near(
            tuple(w.tolist()), tuple(c.tolist()), float(mean), float((c[0] - mean) / spread),
            (1 + int((none >= c[0]).sum())) / (1 + DRAWN),
        )
        for c, w in zip(own, words, strict=True)
    ]  # fmt: skip


def _cosines(vectors: Tensor, unit: Tensor) -> Tensor:
    return F.normalize(vectors, dim=1) @ unit.mT


def similarity(vectors: Tensor) -> float | None:
    """The mean cosine between different ones of `vectors` (n, d); None for a single one."""
    n = len(vectors)
    if n < 2:
        return None
    cosines = _cosines(vectors.double(), F.normalize(vectors.double(), dim=1))
    return float((cosines.sum() - cosines.trace()) / (n * (n - 1)))


@torch.no_grad()
def words_table(base: Structure, title: str) -> Tensor:
    """What the base looks up for each of its words, (words, hidden), scaled as it does. Raises: UsageError."""
    site = token_table(base, title.lower())
    device = next(site.module.parameters()).device
    parts = torch.arange(site.in_features, device=device).split(AT_ONCE)
    return torch.cat([plain_call(site.module, {}, ids).float() for ids in parts])


class _Enough(Exception):
    """The layer has been reached, and what is behind it need not be computed."""


class _Values:
    """A handler of attention that keeps what one module reads as values, and stops the forward there."""

    def __init__(self, site: Site) -> None:
        self.site, self.found = site, torch.empty(0)

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        if module is self.site.module:
            self.found = qkv[2][:, : self.site.heads].clone()
            raise _Enough
        return plain(module, *qkv, mask, **rest)

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        return plain(**call)


@torch.no_grad()
def values_of_words(base: Structure, site: Site, words: int) -> Tensor:
    """The values (words, heads value_dim) that attention `site`, the first one of the base, has for each of the
    first `words` of its table: they depend on the word alone, neither on its place nor on others.

    The caller sees to it that nothing acts beside the base. Raises: UsageError where the base does not hand them out.
    """
    if not uses_interface(base):
        raise UsageError("the base does not hand out the values of its attention", "Look at the scores instead.")
    stack: Any = base.stacks[-1]
    device, found = next(base.model.parameters()).device, list[Tensor]()
    for ids in torch.arange(words, device=device)[:, None].split(AT_ONCE):
        seen = _Values(site)
        try:
            with quietly(stack), handled_by(seen):
                stack(input_ids=ids)
        except _Enough:
            found.append(seen.found.transpose(1, 2).flatten(1).float())
            continue
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            raise UsageError(f"the base cannot read words alone ({why})", "Look at the scores instead.") from None
        raise UsageError("the base does not hand out the values of its first attention", "Look at the scores instead.")
    return torch.cat(found)


def shown(tokenizer: Any, words: Sequence[int]) -> list[str]:
    """Words as the tokenizer writes them; their numbers where there is none."""
    if tokenizer is None:
        return [str(word) for word in words]
    return [tokenizer.decode([word]) for word in words]
