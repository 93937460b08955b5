"""Answers of base and adapter to the same prompts, for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from inlay.bank.bank import Bank
from inlay.data.encode import Encoder
from inlay.data.table import Row
from inlay.data.targets import HeadEncoder, Targeted
from inlay.errors import DroppedRow
from inlay.evaluation.head_predict import predicted_by_head
from inlay.runtime.memory import TokenBudget

__all__ = ["samples"]

NEW_TOKENS = {"label": 5}
MOST = 24


@torch.no_grad()
def samples(
    bank: Bank, name: str, encoder: Encoder, rows: Sequence[Row], on_message: Callable[[str], None],
    limit: int | None = None,
) -> list[dict[str, str]]:  # fmt: skip
    """For each row its prompt, its answer, and the answers of the base and of the adapter `name` (greedy).

    Prompts are cut so that new tokens have positions too, where the base has `limit` of them. Rows without a prompt,
    or whose answer is too long, are left out.
    """
    if isinstance(encoder, HeadEncoder):
        return _said(bank, name, encoder, rows)
    if encoder.template.kind == "text":
        return []  # there is no prompt to go on from
    new, asking = NEW_TOKENS.get(encoder.template.kind, MOST), encoder
    if limit is not None:
        new = min(new, limit // 2)
        fits = min(encoder.max_length, limit - new)
        asking = Encoder(encoder.tokenizer, encoder.template, fits, encoder.place, None, encoder.table_size)
    try:
        found = [_sample(bank, name, encoder, asking, row, new) for row in rows]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # a base that scores but cannot generate is still of use
        why = (str(error) or type(error).__name__).splitlines()[0]
        on_message(f"no samples: this base cannot generate here ({why})")
        return []
    return [one for one in found if one is not None]


def _said(bank: Bank, name: str, encoder: HeadEncoder, rows: Sequence[Row]) -> list[dict[str, str]]:
    """What the head of an adapter says; that of the base was drawn at random."""
    found = []
    said = predicted_by_head(bank, encoder, rows, name, TokenBudget(4096))
    for item, one in zip(encoder.targeted(rows), said, strict=True):
        if isinstance(item, Targeted):
            prompt = encoder.tokenizer.decode(list(item.ids), skip_special_tokens=True)
            found.append({"prompt": prompt, "answer": encoder.answer(item), "base": "", "adapter": one.answer})
    return found


def _sample(bank: Bank, name: str, encoder: Encoder, asking: Encoder, row: Row, new: int) -> dict[str, str] | None:
    model: Any = bank.model
    tokenizer = encoder.tokenizer
    try:
        asked, place = asking.prompt(row)
        example = encoder.example(row)
    except DroppedRow:
        return None
    ids = torch.tensor([asked, asked], device=model.device)
    answer = [token for token, bears in zip(example.ids, example.loss_mask, strict=True) if bears]
    with bank.route([None, name], places=[0, place]):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=new, do_sample=False,
        )  # fmt: skip
    start = 0 if model.config.is_encoder_decoder else len(asked)
    base, adapter = (tokenizer.decode(row[start:], skip_special_tokens=True).strip() for row in out)
    prompt = tokenizer.decode(asked, skip_special_tokens=True)
    return {
        "prompt": prompt, "answer": tokenizer.decode(answer, skip_special_tokens=True).strip(), "base": base,
        "adapter": adapter,
    }  # fmt: skip
