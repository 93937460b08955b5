"""How the tokens of one forward of a backbone lie in its activations: padded rows or a packed stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.sites.attention import QKV
from inlay.sites.backbone import Backbone

from .partition import Partition
from .prefixes import Prefixes
from .route import Blend

__all__ = ["Layout", "Unit"]

Unit = tuple[int, int, int]
"""A row or segment: its number, its first vector that is no padding, and how many vectors it has."""


class Layout(ABC):
    """A padded or packed forward of one backbone.

    `blends` has an entry for each row or segment; `partition` says which units belong to which adapters; `attends` is
    whether attention is taken over, because prefixes or segments need it.
    """

    attends = False
    continued = False
    """Whether all rows go on from what was read before, so that sites may do what they did at the last step."""
    device = torch.device("cpu")
    """Where its tokens are."""
    ids: Tensor | None = None
    """The token ids of the prepared forward, where it was given some; (rows, columns), or (1, tokens) of a stream."""

    def __init__(
        self,
        blends: Sequence[Blend],
        partition: Partition,
        backbone: Backbone,
        prefixes: Prefixes,
        values: Callable[[Blend], Tensor | None],
    ) -> None:
        self.blends, self.partition, self.backbone, self.prefixes = list(blends), partition, backbone, prefixes
        self._values = values

    def prepared(self, given: dict[str, Any]) -> dict[str, Any]:
        """What `prepare` gives, whose ids are remembered."""
        made = self.prepare(given)
        self.ids = made.get("input_ids")
        self.device = next((v.device for v in made.values() if isinstance(v, Tensor)), self.device)
        return made

    def in_order(self, value: Tensor) -> bool:
        """Whether `to_units` of an activation is but another shape of it."""
        return True

    @abstractmethod
    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        """The backbone's arguments with virtual tokens, positions and masks in place."""

    @abstractmethod
    def embed(self, embedded: Tensor) -> Tensor | None:
        """The embeddings with virtual tokens in place, once a forward; None where there is nothing to do."""

    @abstractmethod
    def narrow(self, states: Tensor) -> Tensor:
        """States (B, tokens, ...) without the virtual tokens."""

    @abstractmethod
    def to_units(self, value: Tensor, width: int | None) -> Tensor:
        """An activation of `width` features as (units * n, width), or ids (width None) as (units * n,), where n is the
        number of vectors of each unit.

        Raises: UsageError where its tokens have lost their order, as behind a mixture's router.
        """

    def from_units(self, value: Tensor, like: Tensor) -> Tensor:
        """The inverse of `to_units`, in the shape of `like`."""
        return value.reshape(like.shape)

    @abstractmethod
    def samples(self, members: Sequence[int], vectors: int) -> list[Unit]:
        """For rows or segments `members`: its number, its first vector that is no padding, and its vectors, where a
        unit has `vectors`."""

    @abstractmethod
    def positions(self) -> tuple[Tensor, Tensor] | None:
        """For each token of each unit, its position among its row's own tokens (-1 for virtual ones and padding), and
        the length of its row's prompt; int64 (tokens,) in the order of `to_units`. None for rows of images or sound,
        which are not padded."""

    def prompt_lengths(self) -> tuple[int, ...] | None:
        """The lengths of the rows' prompts, for the steps that go on from a cache."""
        return None

    @abstractmethod
    def own_tokens(self, embedded: Tensor) -> list[tuple[int, Tensor]]:
        """For each row or segment, where the embeddings (rows, columns, width) of its own tokens are."""

    def mask(self, plain: Callable[..., Any], call: dict[str, Any]) -> Any:
        """What the base's layers get as attention mask; `plain` makes the one they would get without us."""
        return plain(**call)

    def attend(self, plain: Callable[..., Any], module: nn.Module, qkv: QKV, mask: Any, **rest: Any) -> Any:
        """Attention of `module`: ((B, q, heads, dim), weights or None)."""
        return plain(module, *qkv, mask, **rest)
