"""What base and adapter write for the same prompts, for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from inlay.bank.bank import Bank
from inlay.data.encode import Encoder
from inlay.data.table import Row

__all__ = ["samples"]

NEW_TOKENS = 24


@torch.no_grad()
def samples(bank: Bank, encoder: Encoder, rows: Sequence[Row], say: Callable[[str], None]) -> list[dict[str, str]]:
    """For each row its prompt, the answer it holds, and what the base and the adapter make of it (greedy)."""
    if encoder.template.kind == "text":
        return []  # there is no prompt to go on from
    try:
        return [_sample(bank, encoder, row) for row in rows]
    except (RuntimeError, ValueError, TypeError) as error:  # a base that scores but cannot generate is still of use
        say(f"no samples: this base cannot generate here ({str(error).splitlines()[0]})")
        return []


def _sample(bank: Bank, encoder: Encoder, row: Row) -> dict[str, str]:
    model: Any = bank.model
    tokenizer = encoder.tokenizer
    asked, place = encoder.prompt(row)
    ids = torch.tensor([asked, asked], device=model.device)
    told = {"max_new_tokens": 5 if encoder.template.kind == "label" else NEW_TOKENS, "do_sample": False}
    example = encoder.example(row)
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
