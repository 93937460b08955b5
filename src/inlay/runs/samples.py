"""What base and adapter write for the same prompts, for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from inlay.bank.bank import Bank
from inlay.data.encode import Encoder
from inlay.data.table import Row
from inlay.errors import DroppedRow

__all__ = ["samples"]

NEW_TOKENS = {"label": 5}
MOST = 24


@torch.no_grad()
def samples(
    bank: Bank, encoder: Encoder, rows: Sequence[Row], say: Callable[[str], None], limit: int | None = None
) -> list[dict[str, str]]:
    """For each row its prompt, the answer it holds, and what the base and the adapter make of it (greedy).

    Prompts are cut so that what is written has positions too, where the base has `limit` of them. Rows without a
    prompt, or whose answer is too long, are left out.
    """
    if encoder.template.kind == "text":
        return []  # there is no prompt to go on from
    new, asking = NEW_TOKENS.get(encoder.template.kind, MOST), encoder
    if limit is not None:
        new = min(new, limit // 2)
        fits = min(encoder.max_length, limit - new)
        asking = Encoder(encoder.tokenizer, encoder.template, fits, encoder.place, None, encoder.table_size)
    try:
        found = [_sample(bank, encoder, asking, row, new) for row in rows]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # a base that scores but cannot generate is still of use
        say(f"no samples: this base cannot generate here ({(str(error) or type(error).__name__).splitlines()[0]})")
        return []
    return [one for one in found if one is not None]


def _sample(bank: Bank, encoder: Encoder, asking: Encoder, row: Row, new: int) -> dict[str, str] | None:
    model: Any = bank.model
    tokenizer = encoder.tokenizer
    try:
        asked, place = asking.prompt(row)
        example = encoder.example(row)
    except DroppedRow:
        return None
    ids = torch.tensor([asked, asked], device=model.device)
    told = {"max_new_tokens": new, "do_sample": False}
    answer = [token for token, learned in zip(example.ids, example.learned, strict=True) if learned]
    with bank.route([None, "adapter"], places=[0, place]):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **told
        )
    start = 0 if model.config.is_encoder_decoder else len(asked)
    base, adapter = (tokenizer.decode(row[start:], skip_special_tokens=True).strip() for row in out)
    prompt = tokenizer.decode(asked, skip_special_tokens=True)
    return {
        "prompt": prompt, "answer": tokenizer.decode(answer, skip_special_tokens=True).strip(), "base": base,
        "adapter": adapter,
    }  # fmt: skip
