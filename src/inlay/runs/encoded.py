"""The rows of a run as tokens, with virtual tokens at one place: what is trained on and what is scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from inlay.data.encode import Encoder
from inlay.data.prepare import Prepared, prepare
from inlay.data.table import Rows
from inlay.data.targets import HeadEncoder, prepare_targets
from inlay.evaluation.score import Items, NoneLeft, items_of

from .dataset import Dataset

__all__ = ["EncodedRows", "encoded_rows"]


@dataclass(frozen=True)
class EncodedRows:
    """What the `encoder` makes of the rows: `prepared` to be trained on, `choosing` and `final` to be scored.

    Encoders of other places make the same tokens and loss masks, and other `virtual_at`.
    """

    encoder: Encoder
    prepared: Prepared
    choosing: Items
    final: Items


def encoded_rows(
    encoder: Encoder, dataset: Dataset, on_progress: Callable[[int, int], None], on_message: Callable[[str], None]
) -> EncodedRows:
    """Encode all rows of a run; where no held-out row is of use, that is said, and there are none to score.

    Raises: DataError where no row can be learned from; as the encoder does.
    """
    if isinstance(encoder, HeadEncoder):
        prepared = prepare_targets(encoder, dataset.rows, on_progress)
    else:
        prepared = prepare(encoder, dataset.rows, on_progress)
    choosing, final = (_items(encoder, rows, on_message) for rows in (dataset.choosing, dataset.final))
    return EncodedRows(encoder, prepared, choosing, final)


def _items(encoder: Encoder, rows: Rows, on_message: Callable[[str], None]) -> Items:
    try:
        return items_of(encoder, rows)
    except NoneLeft as error:
        on_message(f"held-out rows: {error.what}")
        return Items((), (), Counter(rows=len(rows)))
