"""Rows that a model takes: made by rules from the arguments of its forward, and tried on the plain model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["TOKENS", "Maker", "Row", "find_maker", "plain_ids"]

Row = dict[str, Tensor]
"""Inputs of one row, each with a first dimension of one; images and sounds of it may be several."""

TOKENS = frozenset(
    {"input_ids", "token_type_ids", "mm_token_type_ids", "bbox", "input_shape_ids", "input_pronunciation_ids"}
)
"""Inputs that have a column for each token."""


@dataclass
class Maker:
    """`media` are inputs besides the ids, made anew for each row; `placeholders` are ids that stand for them."""

    model: Any
    use: str
    media: Callable[[torch.Generator], Row] = field(default=lambda generator: {})
    placeholders: tuple[int, ...] = ()
    text: bool = True
    extra: tuple[str, ...] = ()

    def row(self, length: int, seed: int) -> Row:
        """A row of `length` tokens of text, with the placeholders of one image or sound in the middle."""
        return self.row_of(length, seed, 1)

    def row_of(self, length: int, seed: int, count: int) -> Row:
        """A row with `count` images or sounds."""
        generator = torch.Generator().manual_seed(100 + seed)
        row: Row = {}
        if self.text:
            usable = torch.tensor(plain_ids(self.model.config))
            ids = usable[torch.randint(len(usable), (length,), generator=generator)].tolist()
            if self.use == "classify":
                ids[-1] = end_of(self.model.config, ids[-1])
            ids = [*ids[:2], *self.placeholders * count, *ids[2:]]
            row["input_ids"] = torch.tensor([ids])
        several = [self.media(generator) for _ in range(count)]
        row |= {name: torch.cat([one[name] for one in several]) for name in (several[0] if several else ())}
        taken = inspect.signature(self.model.forward).parameters
        if (
            getattr(self.model.config, "is_encoder_decoder", False)
            and "decoder_input_ids" in taken
            and self.use != "classify"
        ):
            usable = torch.tensor(plain_ids(self.model.config))
            row["decoder_input_ids"] = usable[torch.randint(len(usable), (1, 4), generator=generator)]
        if "bbox" in taken and self.text:
            row["bbox"] = torch.zeros(1, row["input_ids"].shape[1], 4, dtype=torch.long)
        if "mm_token_type_ids" in taken and self.text and self.placeholders:
            holders = torch.tensor(sorted(set(self.placeholders[len(self.placeholders) // 2 :][:1])))
            row["mm_token_type_ids"] = torch.isin(row["input_ids"], holders).long()
        return row


def plain_ids(config: Any) -> list[int]:
    """Ids that mean nothing special to the model."""
    special = set(_special(config))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 64
    return [i for i in range(3, min(int(count), 100)) if i not in special]


def _special(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            yield from _special(value)
        elif name.endswith(("token_id", "token_index", "token_ids", "_id", "_idx")):
            yield from (v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int))


def end_of(config: Any, otherwise: int) -> int:
    """The end of the text, which the heads of encoder-decoders look for."""
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, (list, tuple)) and end else end
    return end if isinstance(end, int) and getattr(config, "is_encoder_decoder", False) else otherwise


def find_maker(model: Any, use: str) -> Maker | str:
    """The first maker whose rows the plain model runs, two in a batch; else what the likeliest one's run said."""
    from .media import makers

    errors = []
    for maker in makers(model, use):
        why = tried(model, maker)
        if not why:
            return maker
        errors.append(why)
    return errors[0] if errors else "no input is known that the model takes"


def tried(model: Any, maker: Maker) -> str:
    """ "" where the model runs two rows and gives finite numbers that differ from row to row."""
    from .bases import cast, collate, first_line, logits_of, pad_id

    try:
        rows = [maker.row(5, 0), maker.row(5, 1)]
        batch = collate(rows, "right", 0, pad_id(model.config))
        with torch.no_grad():
            logits = logits_of(model(**cast(batch.inputs, model)))
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    if len(logits) != 2:
        return f"the output has shape {tuple(logits.shape)} for two rows"
    if not bool(logits.isfinite().all()):
        return "the plain model gives numbers that are not finite"
    if torch.equal(logits[0], logits[1]):
        return "the plain model gives each row the same"
    return _left(model, maker)


def _left(model: Any, maker: Maker) -> str:
    """Some give NaN under left padding in float64 alone: BLOOM, whose softmax is float32."""
    from .bases import cast, collate, logits_of, pad_id

    rows = [maker.row(4, 0), maker.row(6, 1)]
    if (
        next(p for p in model.parameters() if p.is_floating_point()).dtype != torch.float64
        or "input_ids" not in rows[0]
    ):
        return ""
    try:
        with torch.no_grad():
            out = logits_of(model(**cast(collate(rows, "left", 0, pad_id(model.config)).inputs, model)))
    except Exception:  # what the base cannot do is a law's affair
        return ""
    return "" if bool(out.isfinite().all()) else "the plain model gives numbers that are not finite in float64"
