"""What a method may know of the tokens that it is computed for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Tokens"]


class Tokens(Protocol):
    """The n tokens that a method is computed for.

    `position` counts each token in its own row from 0, and is -1 for virtual tokens and padding; `length` is the length
    of its row's prompt, or of the row where nobody says; both are int64 (n,).
    """

    @property
    def position(self) -> Tensor: ...
    @property
    def length(self) -> Tensor: ...
    def dropout(self, x: Tensor, p: float) -> Tensor:
        """x (n, width) with a share p dropped, by masks that belong to the token wherever it stands in a batch; x
        itself outside of training."""
        ...

    def normal(self, like: Tensor) -> Tensor | None:
        """Standard normal numbers of the shape and dtype of `like` (n, width), which belong to the token as masks do;
        None outside of training."""
        ...

    def prompt_mean(self, x: Tensor) -> Tensor:
        """For each token, the mean of x (n, width) over the prompt of its row, or over all the row where no prompt is
        known; in steps that go on from a cache, that of the prompt that filled it.

        Raises: UsageError where a row's prompt is not there as a whole.
        """
        ...

    def behind(self, sequence: Sequence[int]) -> Tensor:
        """Whether each token stands at or behind the start of the last `sequence` of ids in its row, bool (n,); in
        steps that go on from a cache, in the prompt that filled it. Raises: UsageError where that cannot be told."""
        ...

    def chance(self, like: Tensor, of_step: bool = False) -> Tensor | None:
        """Uniform numbers in [0, 1), float32 (n, 1), on the device of `like` (n, width): one for each row at this site,
        or with `of_step` one for each step, at all sites of the adapter. None outside of training."""
        ...
