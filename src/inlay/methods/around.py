"""What a method does around the forwards of its training: what it sees before the first step, in which dtype it is
held, what it adds to the loss, and what it does after each step. Most do nothing there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from inlay.sites.site import Site
from inlay.sites.structure import Structure

__all__ = ["Around", "Probe", "Values"]

Values = Mapping[str, Mapping[str, Tensor]]
"""Path of a site ("" for what all sites share) -> name of a parameter -> its value."""


class Probe(Protocol):
    """What a method remembers of the rows that the plain base runs on before the method begins, at one site."""

    @property
    def gradients(self) -> bool:
        """Whether it wants gradients of the rows' loss."""
        ...

    def see(self, x: Tensor, answers: Tensor, gradient: Tensor | None) -> None:
        """The real tokens of one batch: what the site reads, x (n, in); which of them bear loss (n,), bool; and the
        gradient of the batch's mean loss for what the site gives (n, out), where it is wanted."""
        ...


class Around:
    """The part of `Method` that the training loop knows of. `values` are those of the adapter, which it may change in
    place; `state` holds tensors by name that belong to the adapter's training, and checkpoints keep them."""

    changes_values: ClassVar[bool] = False
    """Whether `after_step` changes values."""

    uncast: ClassVar[tuple[str, ...]] = ()
    """Parameters that stay float32 where the base computes in fewer bits, which would lose their small changes."""

    @property
    def exact(self) -> tuple[str, ...]:
        """The `uncast` of these settings."""
        return self.uncast

    # ---- before the first step

    def begin_at_base(
        self, values: Values, sites: Sequence[Site], base: Structure, generator: torch.Generator
    ) -> tuple[Self, Values]:
        """The method with what it has chosen by the base, and its fresh parameters `values`, where some of them start
        as what the base computes: called once, by `bank.add`, while nothing acts beside the base."""
        return self, values

    @property
    def start_rows(self) -> int:
        """How many rows the method wants to see before it begins; 0 where it needs none."""
        return 0

    def probe(self, site: Site) -> Probe:
        """What is to see the rows at `site`, where there are `start_rows`."""
        raise NotImplementedError

    def begin(
        self, sites: Sequence[Site], probes: Mapping[str, Probe], generator: torch.Generator
    ) -> tuple[Self, dict[str, dict[str, Tensor]]]:
        """The method with what it has chosen by the probes, which then wants no rows, and its parameters by site."""
        raise NotImplementedError

    def check_steps(self, total: int) -> None:
        """Raises: UsageError where the method cannot be trained in so many steps."""

    # ---- in each step

    def penalty(self, values: Values) -> Tensor | None:
        """What is added to a step's mean loss, a function of the parameters alone; None where nothing is. What a run
        reports as its loss is without it."""
        return None

    def after_step(self, values: Values, gradients: Values, step: int, total: int, state: dict[str, Tensor]) -> None:
        """Act after the optimizer's step number `step` (from 1) of `total`, whose `gradients` are those it took."""
