"""Answers that are JSON of a schema: at each place only the tokens that the schema allows may be drawn.

By llguidance (Microsoft), which knows from a tokenizer and a grammar which tokens may come next.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from inlay.errors import UsageError

__all__ = ["JsonGrammar", "Schemas"]

log = logging.getLogger("inlay.serve")

COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write each value: where space may stand anywhere, a model may write nothing but space."""


class Schemas:
    """The grammars that `response_format` asks for, over one tokenizer; `ends` are the tokens that end an answer, and
    `vocabulary` is how many tokens the base gives logits for.

    Making the first takes about a second.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int], vocabulary: int) -> None:
        self._tokenizer, self._ends, self._vocabulary = tokenizer, sorted(ends), vocabulary
        self._made: Any = None
        self._lock = threading.Lock()

    def read(self, asked: dict[str, Any] | None) -> JsonGrammar | None:
        """None where any text may come. Raises: UsageError naming what is not known, or not a schema."""
        kind = "text" if asked is None else asked.get("type")
        if asked is None or kind == "text":
            return None
        if kind == "json_object":
            return self._grammar({"type": "object"})
        if kind != "json_schema":
            raise UsageError(
                f"response_format has the type {str(kind)[:40]!r}", "Choose text, json_object, json_schema."
            )
        inner = asked.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if not isinstance(schema, (dict, bool)):
            what = "response_format holds no schema"
            raise UsageError(what, 'Write {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}.')
        return self._grammar(schema)

    def _grammar(self, schema: Any) -> JsonGrammar:
        from llguidance import LLMatcher

        tokens = self._tokens()
        try:
            made = LLMatcher(tokens, LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=COMPACT))
            wrong = made.get_error() if made.is_error() else ""
        except (ValueError, TypeError, RecursionError) as error:
            made, wrong = None, str(error) or "it is nested too deeply"
        if wrong:
            line = next((line.strip() for line in wrong.splitlines() if line.strip()), "")
            raise UsageError(f"the schema cannot be used ({line[:200]})", "Mend it.")
        return JsonGrammar(made, self._vocabulary)

    def _tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._made is None:
                try:
                    self._made = from_tokenizer(self._tokenizer, eos_token=self._ends or None)
                except ValueError as error:
                    raise UsageError(f"this base's tokenizer takes no schema ({error})", "Ask for text.") from None
            return self._made


class JsonGrammar:
    """What the tokens of an answer may be; `matcher()` follows one answer. The grammar is made once: that may take a
    second, which no engine has."""

    def __init__(self, made: Any, vocabulary: int) -> None:
        self._made, self._vocabulary = made, vocabulary

    def matcher(self) -> JsonMatcher:
        return JsonMatcher(self._made.deep_copy(), self._vocabulary)


class JsonMatcher:
    """One answer so far. Where the library fails, it allows no token, and the answer ends with an error."""

    def __init__(self, inner: Any, vocabulary: int) -> None:
        self._inner, self._vocabulary = inner, vocabulary
        self._broken = False

    def allowed(self) -> Any:
        """Which tokens may come next: bool (vocabulary,)."""
        mask = np.zeros(self._vocabulary, dtype=bool)
        bits = self._tried(self._inner.compute_bitmask)
        if not self._broken:
            found = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")[: self._vocabulary]
            mask[: len(found)] = found
        return mask

    def take(self, token: int) -> None:
        """Go on with a token."""
        self._tried(lambda: self._inner.consume_token(token))

    def _tried(self, do: Callable[[], Any]) -> Any:
        try:
            found = do()
            self._broken = self._broken or self._inner.is_error()
        except BaseException as error:  # a panic of the library is no Exception, and ends this answer alone
            log.error("a schema's grammar failed (%s)", type(error).__name__)
            self._broken, found = True, b""
        return found
