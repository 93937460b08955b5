"""Answers in OpenAI's shape: whole ones, and pieces of a stream."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

from inlay.runtime.drawing import TokenLogprobs
from inlay.runtime.requests import Token

from .prompts import Prompt

__all__ = ["AnswerText", "ChatShape", "CompletionShape", "Head", "Shape", "TokenWords", "usage_of"]

LEAST = -9999.0
"""Stands for the logarithm of 0, as at OpenAI."""


@dataclass
class AnswerText:
    """One answer so far. `prompt` is the number of its prompt among those of the request."""

    prompt: int
    index: int
    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, token: Token) -> None:
        self.text.append(token.text)
        self.ids.append(token.id)
        self.finish_reason = token.finish_reason
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)


def usage_of(prompts: Sequence[Prompt], made: int, cached: int) -> dict[str, Any]:
    read = sum(len(prompt.ids) for prompt in prompts)
    details = {"cached_tokens": cached}
    return {
        "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made, "prompt_tokens_details": details,
    }  # fmt: skip


class TokenWords:
    """The words of single tokens, for reports of logprobs."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._tokenizer.decode(
                [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return self._known[token]

    def of_completion(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], start: int = 0
    ) -> dict[str, Any]:
        """Tokens, their logprobs, the likeliest ones and the characters where they begin, from `start` on."""
        words = [self(token) for token in ids]
        ends = list(itertools.accumulate(map(len, words), initial=start))
        best = [None if one is None else self._best(token, one) for token, one in zip(ids, logprobs, strict=True)]
        return {
            "tokens": words,
            "token_logprobs": [None if one is None else max(one.chosen, LEAST) for one in logprobs],
            "top_logprobs": best,
            "text_offset": ends[:-1],
        }

    def of_chat(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        content = [
            {**self._entry(token, one.chosen), "top_logprobs": [self._entry(*pair) for pair in one.best]}
            for token, one in zip(ids, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _best(self, token: int, found: TokenLogprobs) -> dict[str, float]:
        """The likeliest by their words; of several with the same words the likeliest."""
        best: dict[str, float] = {}
        for other, value in (*found.best, (token, found.chosen)):
            words = self(other)
            best[words] = max(value, best.get(words, LEAST))
        return best

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        words = self(token)
        known = None if "\N{REPLACEMENT CHARACTER}" in words else list(words.encode("utf8"))
        return {"token": words, "logprob": max(value, LEAST), "bytes": known}


class Shape(Protocol):
    """How answers of one request look."""

    head: Head

    def whole(self, answers: Sequence[AnswerText], usage: dict[str, Any]) -> dict[str, Any]: ...
    def opened(self, answer: AnswerText) -> list[dict[str, Any]]: ...
    def piece(self, answer: AnswerText, token: Token) -> list[dict[str, Any]]: ...
    def closing(self, usage: dict[str, Any]) -> dict[str, Any]: ...


@dataclass
class Head:
    """What all answers and pieces of one request begin with. `counts` says that pieces have a field for usage; `arm` is
    the one of an experiment that answers.
    """

    kind: str
    model: str
    counts: bool = False
    id: str = ""
    made: int = 0
    arm: str | None = None

    def __post_init__(self) -> None:
        prefix = {"text_completion": "cmpl-", "classify": "classify-"}.get(self.kind, "chatcmpl-")
        self.id, self.made = prefix + secrets.token_hex(12), int(time.time())

    def fields(self, choices: list[dict[str, Any]], piece: bool = False) -> dict[str, Any]:
        kind = self.kind + (".chunk" if piece and self.kind.startswith("chat") else "")
        made = {"id": self.id, "object": kind, "created": self.made, "model": self.model, "choices": choices}
        made |= {} if self.arm is None else {"system_fingerprint": self.arm}
        return made | ({"usage": None} if piece and self.counts else {})

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self.fields([], True) | {"usage": usage}

    def headers(self) -> dict[str, str]:
        """Which arm answers, with %XX for what headers do not hold."""
        return {} if self.arm is None else {"x-inlay-arm": quote(self.arm)}


class CompletionShape:
    """Of /v1/completions. With `echo` each answer begins with its prompt's words, from `echoed`, and with what
    `prompt_logprobs` says of its tokens, where it was asked for.
    """

    def __init__(
        self, model: str, words: TokenWords, counts: bool, prompts: Sequence[Prompt], echoed: Sequence[str] | None,
        prompt_logprobs: Sequence[Sequence[TokenLogprobs | None]] | None = None, reports: bool = False,
    ) -> None:  # fmt: skip
        self.head, self.words, self.prompts, self.echoed = (
            Head("text_completion", model, counts),
            words,
            prompts,
            echoed,
        )
        self.prompt_logprobs, self.reports = prompt_logprobs, reports
        self.lengths: dict[int, int] = {}

    def whole(self, answers: Sequence[AnswerText], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(answer) for answer in answers]
        return self.head.fields(choices) | {"usage": usage}

    def _choice(self, answer: AnswerText) -> dict[str, Any]:
        echo = "" if self.echoed is None else self.echoed[answer.prompt]
        ids, logprobs = list(answer.ids), list[TokenLogprobs | None](answer.logprobs)
        if self.prompt_logprobs is not None:
            ids = [*self.prompts[answer.prompt].ids, *ids]
            logprobs = [*self.prompt_logprobs[answer.prompt], *logprobs]
        report = self.words.of_completion(ids, logprobs) if self.reports else None
        return _completed(answer, echo + "".join(answer.text), report, answer.finish_reason)

    def opened(self, answer: AnswerText) -> list[dict[str, Any]]:
        if self.echoed is None:
            return []
        return [self.head.fields([_completed(answer, self.echoed[answer.prompt], None, None)], True)]

    def piece(self, answer: AnswerText, token: Token) -> list[dict[str, Any]]:
        report = None
        if token.logprobs is not None:
            at = self.lengths.get(answer.index, 0)
            report = self.words.of_completion([token.id], [token.logprobs], at)
            self.lengths[answer.index] = at + len(self.words(token.id))
        if not token.text and report is None and token.finish_reason is None:
            return []
        return [self.head.fields([_completed(answer, token.text, report, token.finish_reason)], True)]

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self.head.closing(usage)


class ChatShape:
    """Of /v1/chat/completions."""

    def __init__(self, model: str, words: TokenWords, counts: bool, reports: bool) -> None:
        self.head, self.words, self.reports = Head("chat.completion", model, counts), words, reports

    def whole(self, answers: Sequence[AnswerText], usage: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for answer in answers:
            message = {"role": "assistant", "content": "".join(answer.text), "refusal": None}
            report = self.words.of_chat(answer.ids, answer.logprobs) if self.reports else None
            made = {"index": answer.index, "message": message, "logprobs": report}
            choices.append({**made, "finish_reason": answer.finish_reason})
        return self.head.fields(choices) | {"usage": usage}

    def opened(self, answer: AnswerText) -> list[dict[str, Any]]:
        return [self._piece(answer, {"role": "assistant", "content": ""}, None, None)]

    def piece(self, answer: AnswerText, token: Token) -> list[dict[str, Any]]:
        report = None if token.logprobs is None else self.words.of_chat([token.id], [token.logprobs])
        made = []
        if token.text or report is not None:
            made.append(self._piece(answer, {"content": token.text}, report, None))
        if token.finish_reason is not None:
            made.append(self._piece(answer, {}, None, token.finish_reason))
        return made

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self.head.closing(usage)

    def _piece(self, answer: AnswerText, delta: Any, report: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": answer.index, "delta": delta, "logprobs": report, "finish_reason": reason}
        return self.head.fields([choice], True)


def _completed(answer: AnswerText, text: str, report: Any, reason: str | None) -> dict[str, Any]:
    return {"index": answer.index, "text": text, "logprobs": report, "finish_reason": reason}
