"""What commands that use adapters share: the base, adapters beside it, and how rows are put to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from inlay.errors import UsageError

if TYPE_CHECKING:
    from inlay.bank.bank import Bank
    from inlay.data.encode import Encoder
    from inlay.data.table import Table
    from inlay.formats.carried import Carried

__all__ = ["Loading", "Opened", "dropped", "open_bank", "reading_of"]


class Loading(Protocol):
    """Settings that say which base is loaded, and how."""

    @property
    def base(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str | None: ...
    @property
    def quantize(self) -> str | None: ...


@dataclass(frozen=True)
class Opened:
    """A base with adapters in its bank, the encoder of their rows, and the positions that the base has for a row's own
    tokens (None where nothing bounds them).
    """

    bank: Bank
    encoder: Encoder
    positions: int | None


def reading_of(
    table: Table | None, folders: Sequence[Path], template: str | None = None,
    verbalizer: Mapping[str, Sequence[str]] | None = None, columns: Mapping[str, str] | None = None,
    answered: bool = True,
) -> Carried:  # fmt: skip
    """How rows are read: as said here, else as the adapters were trained to, else as the table's columns suggest.
    Where they are not `answered`, no column of answers is needed.

    Raises: UsageError where nothing says it; DataError where the table lacks a column.
    """
    from dataclasses import replace

    from inlay.data.template import Columns, check_columns, choose_template
    from inlay.formats.carried import Carried, carried

    found = carried(folders)
    if table is None:
        if found is None:
            raise UsageError("the adapter does not say what it was trained to read", "Give --template.")
        return found
    if template is not None or verbalizer is not None or columns or found is None:
        words = verbalizer
        if words is None and found is not None and found.template.kind == "label":
            words = found.template.verbalizer
        chosen = choose_template(table, Columns(**(columns or {})), template, words)
        found = Carried(chosen) if found is None else replace(found, template=chosen)
    check_columns(found.template, table, answered)
    return found


def open_bank(given: Loading, folders: Mapping[str, Path], reading: Carried, new_tokens: int = 0) -> Opened:
    """Load the base, in the dtype that the adapters were trained in unless another is said, and them beside it.

    Rows are cut so that there are positions for `new_tokens` more.
    """
    from inlay.bank.bank import attach
    from inlay.bases.load import load_base
    from inlay.data.encode import Encoder
    from inlay.formats.notes import read_notes
    from inlay.sites.positions import positions_of, table_size

    dtype = given.dtype
    if dtype == "auto":
        trained = {read_notes(folder).dtype for folder in folders.values()} - {None}
        dtype = trained.pop() or dtype if len(trained) == 1 else dtype
    base = load_base(given.base, dtype, given.device, given.quantize)
    bank = attach(base.model)
    for name, folder in folders.items():
        bank.load(name, folder)
    methods = [adapter.method for adapter in bank.adapters.values()]
    virtual = max((method.virtual_length + method.prefix_length for method in methods), default=0)
    positions = positions_of(base.model)
    own = None if positions is None else positions - virtual
    limit = None if own is None else own - new_tokens
    rows = table_size(base.model)
    encoder = Encoder(base.tokenizer, reading.template, reading.max_length, reading.place, limit, rows)
    return Opened(bank, encoder, own)


def dropped(counts: Mapping[str, int]) -> list[str]:
    """What became of rows that were not used, in words."""
    left_out = {reason.removeprefix("dropped: "): n for reason, n in counts.items() if reason.startswith("dropped")}
    return [
        f"{count:,} of {counts['rows']:,} rows are left out: {reason}" for reason, count in left_out.items() if count
    ]
