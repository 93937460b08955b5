"""What can never be answered, whoever asks: found when it is asked, before it takes anybody's room."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from inlay.bank.bank import Bank
from inlay.errors import UsageError
from inlay.runtime.requests import end_tokens, vocabulary_of
from inlay.runtime.stops import Answer
from inlay.runtime.token_bytes import token_bytes
from inlay.sites.positions import positions_of, table_size

from .tickets import Ask

__all__ = ["Limits"]


class Limits:
    """What one base, with `store` bytes for keys and values and `most` answers at once, can answer; `texts` is whether
    there is a tokenizer."""

    def __init__(self, bank: Bank, texts: bool, store: int, most: int) -> None:
        model: Any = bank.model
        self.most, self.texts = most, texts
        self.tokens = store // token_bytes(bank) if bank.packs else None
        self.positions = None if getattr(model.config, "is_encoder_decoder", False) else positions_of(model)
        self.vocabulary, self.table = vocabulary_of(model), table_size(model)
        self._eos = end_tokens(model)

    def check(self, ask: Ask) -> None:
        """Raises: UsageError naming what is too much, and how much there is."""
        prompt, sampling = len(ask.ids), ask.sampling
        if not prompt:
            raise UsageError("the prompt has no tokens", "Give some words.")
        wrong = next((token for token in ask.ids if not self._is_token(token)), None)
        if wrong is not None:
            raise UsageError(f"{wrong!r} in the prompt is no token", f"Tokens are 0 to {self._tokens_there() - 1}.")
        if not 0 <= ask.place <= prompt:
            what = f"virtual tokens cannot stand before token {ask.place} of a prompt of {prompt}"
            raise UsageError(what, f"Choose a place from 0 to {prompt}.")
        if sampling.n > self.most:
            raise UsageError(f"n is {sampling.n}, and {self.most} answers are written at once", "Ask for fewer.")
        sampling.check_vocabulary(self.vocabulary)
        if not self.texts:
            Answer(sampling, self._eos)
        whole = prompt + sampling.max_new_tokens
        if self.positions is not None and whole > self.positions:
            raise UsageError(
                f"the base has {self.positions} positions for a row; the prompt takes {prompt}, and "
                f"{sampling.max_new_tokens} new tokens are asked for",
                "Give a shorter prompt, or write fewer tokens.",
            )
        if self.tokens is not None and whole > self.tokens:
            raise UsageError(
                f"a row of {whole} tokens does not fit into a key-value store of {self.tokens}",
                "Give the store more memory, or the row fewer tokens.",
            )

    def _tokens_there(self) -> int:
        return self.vocabulary if self.table is None else self.table

    def _is_token(self, token: Any) -> bool:
        return isinstance(token, Integral) and not isinstance(token, bool) and 0 <= int(token) < self._tokens_there()
