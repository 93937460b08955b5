"""Which vectors of an activation the shares of a batch have, while text is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from inlay.kernels.picked import picks
from inlay.kernels.rows import Rows
from inlay.methods.contract import BottleneckForm, LinearForm

from .acting import Scope

__all__ = ["count_of", "picked_at", "rows_of"]


def picked_at(scope: Scope) -> bool:
    """Whether all products are those of tables, so that a captured step can do them for other adapters too."""
    return getattr(scope.layout, "tables", None) is not None and picks(scope.layout.device)


def count_of(scope: Scope, number: int, vectors: int) -> int:
    partition = scope.layout.partition
    return partition.shares[number].units * (vectors // partition.total)


def rows_of(
    scope: Scope, numbers: Sequence[int], vectors: int, forms: Mapping[int, LinearForm | BottleneckForm]
) -> Rows:
    """The rows of shares, one share's behind the other's."""
    form = forms[numbers[0]]
    device = next(value.device for value in vars(form).values() if isinstance(value, Tensor))
    return Rows.of((span for number in numbers for span in scope.spans(number, vectors)), vectors, device)
