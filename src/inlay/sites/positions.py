"""How many tokens of a row a base has positions for, by its configuration and its table of learned positions."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["positions_of", "table_size"]

NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "max_seq_length",
    "max_target_positions",
)  # fmt: skip
"""What configurations call it; the first that is there counts."""
TABLE = ("position", "wpe")
"""In the names of tables that positions are looked up in."""


def positions_of(model: nn.Module) -> int | None:
    """Tokens that a row may have at most; None where nothing bounds them (relative positions, recurrent layers).

    A table of learned positions may keep its first rows for itself: those up to its padding index, or as many as its
    own `offset` says.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = next((v for name in NAMES if isinstance(v := getattr(text, name, None), int) and v > 0), None)
    if found is None:
        return None
    return min(
        (own for path, module in model.named_modules() for own in _table_rows(path, module, found)), default=found
    )


def table_size(model: nn.Module) -> int | None:
    """Rows of the table that token ids are looked up in: ids from there on are none; None where there is no table."""
    try:
        table: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    except (NotImplementedError, AttributeError):
        return None
    weight = getattr(table, "weight", None)
    return None if weight is None or weight.ndim != 2 else int(weight.shape[0])


def _table_rows(path: str, module: nn.Module, said: int) -> list[int]:
    """Positions that a learned table of about the `said` size has for tokens; none for modules of other kinds or sizes,
    such as an image's table of places.
    """
    name = path.rpartition(".")[2].lower()
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Embedding) or weight is None or not any(part in name for part in TABLE):
        return []
    padding, offset = module.padding_idx, getattr(module, "offset", None)
    own = offset if isinstance(offset, int) else padding + 1 if padding is not None else 0
    return [int(weight.shape[0]) - own] if int(weight.shape[0]) in (said, said + own) else []
