"""Answers of base and adapter to the same prompts, for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from inlay.bank.bank import Bank
from inlay.data.encode import Encoder
from inlay.data.table import Row
from inlay.data.targets import HeadEncoder, Targeted
from inlay.errors import DroppedRow, InlayError
from inlay.evaluation.head_predict import predicted_by_head
from inlay.runtime.generating import generate
from inlay.runtime.memory import TokenBudget
from inlay.runtime.requests import Request
from inlay.runtime.sampling import Sampling

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
    asked = [one for row in rows if (one := _asked(encoder, asking, row)) is not None]
    try:
        return _written(bank, name, encoder.tokenizer, asked, new)
    except (InlayError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # a base that scores but cannot generate is still of use
        why = (str(error) or type(error).__name__).splitlines()[0]
        on_message(f"no samples: this base cannot generate here ({why})")
        return []


def _said(bank: Bank, name: str, encoder: HeadEncoder, rows: Sequence[Row]) -> list[dict[str, str]]:
    """What the head of an adapter says; that of the base was drawn at random."""
    found = []
    said = predicted_by_head(bank, encoder, rows, name, TokenBudget(4096))
    for item, one in zip(encoder.targeted(rows), said, strict=True):
        if isinstance(item, Targeted):
            prompt = encoder.tokenizer.decode(list(item.ids), skip_special_tokens=True)
            found.append({"prompt": prompt, "answer": encoder.answer(item), "base": "", "adapter": one.answer})
    return found


Asked = tuple[Sequence[int], int, Sequence[int]]
"""A prompt's ids, the place of virtual tokens among them, and the answer's ids."""


def _asked(encoder: Encoder, asking: Encoder, row: Row) -> Asked | None:
    try:
        prompt, place = asking.prompt(row)
        example = encoder.example(row)
    except DroppedRow:
        return None
    answer = [token for token, bears in zip(example.ids, example.loss_mask, strict=True) if bears]
    return prompt, place, answer


def _written(bank: Bank, name: str, tokenizer: Any, asked: Sequence[Asked], new: int) -> list[dict[str, str]]:
    """What base and adapter write, all at once."""
    sampling = Sampling(max_new_tokens=new)
    requests = [
        Request(route, prompt, sampling, at) for prompt, place, _ in asked for route, at in ((None, 0), (name, place))
    ]  # fmt: skip
    written: list[list[int]] = [[] for _ in requests]
    for token in generate(bank, requests):
        if token.error is not None:
            raise token.error
        written[token.request].append(token.id)
    words = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
    return [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "answer": tokenizer.decode(answer, skip_special_tokens=True).strip(), "base": base, "adapter": adapter,
        }
        for (prompt, _, answer), base, adapter in zip(asked, words[::2], words[1::2], strict=True)
    ]  # fmt: skip
