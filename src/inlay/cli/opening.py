"""What commands that use adapters share: the base, and adapters beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from inlay.runs.settings import (
    DATA,
    Base,
    Columns,
    Device,
    Dtype,
    MaxLength,
    Quantize,
    Split,
    Template,
    TokensAtOnce,
    Verbalizer,
    as_paths,
)
from inlay.values import Checked, Count, Help, Seed

if TYPE_CHECKING:
    from inlay.bank.bank import Bank
    from inlay.data.encode import Encoder
    from inlay.data.prompting import Prompting

__all__ = ["Loading", "Opened", "Reading", "as_folders", "dropped", "open_bank"]


def as_folders(value: Any) -> Any:
    """One folder as a list of one; none as none."""
    return as_paths(value) if value else []


@dataclass(frozen=True, kw_only=True)
class Reading(Checked):
    """How adapters are opened and rows are read, of a command that looks at adapters on rows."""

    base: Base = "smollm2"
    limit: Annotated[Count | None, Help("rows to use, drawn by the seed", DATA)] = None
    seed: Annotated[Seed, Help("which rows --limit draws", DATA)] = 0
    template: Annotated[Template, Help("without it, the one that travels with the adapter", DATA)] = None
    verbalizer: Verbalizer = None
    columns: Columns = field(default_factory=dict)
    split: Split = "paragraph"
    max_length: Annotated[MaxLength | None, Help("tokens in a row; as in training where unset", DATA)] = None
    tokens_at_once: TokensAtOnce = 4096
    dtype: Dtype = "auto"
    device: Device = None
    quantize: Quantize = None


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
    tokens (None where nothing bounds them). `fresh` is whether the base's own head was drawn at random.
    """

    bank: Bank
    encoder: Encoder
    positions: int | None
    fresh: bool = False


def open_bank(given: Loading, folders: Mapping[str, Path], prompting: Prompting, new_tokens: int = 0) -> Opened:
    """Load the base, in the dtype that the adapters were trained in unless another is said, and them beside it.

    Rows are cut so that there are positions for `new_tokens` more.
    """
    from inlay.bank.bank import attach
    from inlay.bases.load import load_base
    from inlay.data.targets import encoder_of
    from inlay.formats.notes import read_notes
    from inlay.runs.tasking import head_of
    from inlay.runtime.forward import check_reads
    from inlay.sites.positions import positions_of, table_size

    dtype = given.dtype
    if dtype == "auto":
        trained = {read_notes(folder).dtype for folder in folders.values()} - {None}
        dtype = trained.pop() or dtype if len(trained) == 1 else dtype
    head = head_of(prompting.template)
    base = load_base(given.base, dtype, given.device, given.quantize, head)
    bank = attach(base.model)
    if head is None:
        check_reads(bank, prompting.template.kind)
    for name, folder in folders.items():
        bank.load(name, folder)
    methods = [adapter.method for adapter in bank.adapters.values()]
    virtual = max((method.virtual_length + method.prefix_length for method in methods), default=0)
    positions = positions_of(base.model)
    own = None if positions is None else positions - virtual
    limit = None if own is None else own - new_tokens
    rows = table_size(base.model)
    encoder = encoder_of(prompting.template)(
        base.tokenizer, prompting.template, prompting.max_length, prompting.virtual_at, limit, rows
    )
    return Opened(bank, encoder, own, bool(base.fresh))


def dropped(counts: Mapping[str, int]) -> list[str]:
    """What became of rows that were not used, in words."""
    left_out = {reason.removeprefix("dropped: "): n for reason, n in counts.items() if reason.startswith("dropped")}
    return [
        f"{count:,} of {counts['rows']:,} rows are left out: {reason}" for reason, count in left_out.items() if count
    ]
