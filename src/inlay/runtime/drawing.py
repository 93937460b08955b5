"""Draws the next token of many answers at once, each by its own request's settings and from its own seed."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inlay.errors import InlayError, UsageError
from inlay.kernels.sampling import likeliest, penalize, pick, token_weights

from .sampling import Sampling

__all__ = ["Drawing", "Drawn", "TokenLogprobs", "drawings", "sample"]


class Drawing:
    """What the next token of one answer depends on beside the logits: settings, seed, place, and earlier tokens.

    `seed` is the request's, or the one that was drawn for it; `position` counts the answer's tokens so far.
    """

    def __init__(
        self, sampling: Sampling, seed: int, answer: int, ends: Collection[int], vocabulary: int, name: str
    ) -> None:
        self.sampling, self.seed, self.answer, self.vocabulary, self.name = sampling, seed, answer, vocabulary, name
        self.position = 0
        self.seen: _Seen | None = None
        self.matcher = None if sampling.grammar is None else sampling.grammar.matcher()
        self.ends = np.array(sorted(ends), dtype=np.int64)
        self.biased = np.array(list(sampling.logit_bias), dtype=np.int64)
        self.bias = np.array(list(sampling.logit_bias.values()), dtype=np.float64)

    @property
    def may_end(self) -> bool:
        return self.position >= self.sampling.min_new_tokens

    @property
    def edits(self) -> bool:
        """Whether the model's logits are changed before a token is drawn at this place."""
        early = not (self.may_end or len(self.ends) == 0)
        return self.seen is not None or self.matcher is not None or len(self.biased) > 0 or early

    @property
    def rank(self) -> int:
        """Where a row stands among those of one call, so that rows with equal work are together and need no copy."""
        if self.sampling.temperature == 0:
            return 2
        return 0 if self.sampling.top_k > 0 or self.sampling.top_p < 1 else 1

    def uniform(self) -> float:
        """A number in [0, 1) that depends on the seed, the answer and the place alone."""
        drawn = hashlib.blake2b(f"{self.seed}/{self.answer}/{self.position}".encode(), digest_size=8).digest()
        return (int.from_bytes(drawn, "little") >> 11) * 2.0**-53

    def append(self, token: int) -> None:
        self.position += 1
        if self.seen is not None:
            self.seen.add(token)
        if self.matcher is not None:
            self.matcher.take(token)


def drawings(
    sampling: Sampling, prompt: Sequence[int], eos: Collection[int], vocabulary: int, name: str = "the request"
) -> list[Drawing]:
    """The `sampling.n` answers of one prompt, by its ids, before their first tokens.

    `eos` are the tokens that end an answer of the model; `vocabulary` is the width of its logits; `name` names the
    request in errors. Raises: UsageError where the settings name a token that is not there.
    """
    sampling.check_vocabulary(vocabulary)
    ends = [token for token in sampling.ends(eos) if token < vocabulary]
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    made = [Drawing(sampling, seed, answer, ends, vocabulary, name) for answer in range(sampling.n)]
    if sampling.penalizes:
        read = np.unique(np.array(prompt if sampling.repetition_penalty != 1 else [], dtype=np.int64))
        for one in made:
            one.seen = _Seen(read[(read >= 0) & (read < vocabulary)])
    return made


class _Seen:
    """The tokens of a prompt and an answer, each once, and how often the answer holds them."""

    def __init__(self, prompt: Any) -> None:
        self._size = len(prompt)
        self._ids = np.concatenate([prompt, np.zeros(64, np.int64)])
        self._counts = np.zeros(len(self._ids), np.int64)
        self._at = {token: place for place, token in enumerate(prompt.tolist())}

    def add(self, token: int) -> None:
        place = self._at.setdefault(token, self._size)
        if place == self._size:
            if place == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._ids[place], self._counts[place] = token, 0
            self._size += 1
        self._counts[place] += 1

    @property
    def ids(self) -> Any:
        return self._ids[: self._size]

    @property
    def counts(self) -> Any:
        return self._counts[: self._size]


@dataclass(frozen=True)
class TokenLogprobs:
    """The logarithm of the probability of the chosen token, and the likeliest tokens with theirs, the likeliest first:
    the model's own, before any setting has changed its logits."""

    chosen: float
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Drawn:
    """The next token of each row; a row that is in `errors` has none, and `ids` (rows,) and `tokens` hold 0 there.

    `logprobs` has None where a request asks for none.
    """

    ids: Tensor
    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: dict[int, InlayError]


@torch.no_grad()
def sample(logits: Tensor, rows: Sequence[Drawing]) -> Drawn:
    """Draw the next token of each of `rows` from its logits (rows, vocabulary), of any float dtype, and note it there.

    Half precision is drawn from in float32. What changes logits acts in transformers' order: logit_bias, the penalties
    (repetition, frequency, presence), the grammar, min_new_tokens, temperature, top_k, top_p, min_p. A row whose logits
    allow no token gets an error of its own; the others are drawn all the same.

    Raises: UsageError where the logits do not fit the rows.
    """
    width = max((row.vocabulary for row in rows), default=0)
    if logits.ndim != 2 or len(logits) != len(rows) or logits.shape[1] < width:
        raise UsageError(
            f"logits of the shape {tuple(logits.shape)} do not fit {len(rows)} rows and a vocabulary of {width}",
            "Give those of one place a row.",
        )
    if not rows:
        return Drawn(torch.zeros(0, dtype=torch.int64, device=logits.device), [], [], {})
    changed = [at for at, row in enumerate(rows) if row.edits or row.sampling.temperature > 0]
    changed.sort(key=lambda at: rows[at].rank)
    top, ids = logits.max(-1) if len(changed) < len(rows) else (logits.amax(-1), None)
    errors = {at: _no_token(rows[at], value) for at, value in enumerate(top.tolist()) if not isfinite(value)}
    if changed:
        drawn, wrong = _changed(logits, [rows[at] for at in changed], changed)
        ids = torch.empty_like(drawn) if ids is None else ids
        ids[_places(changed, ids)] = drawn
        errors = {changed[at]: _forbidden(rows[changed[at]], value) for at, value in wrong.items()} | errors
    assert ids is not None
    ids[list(errors)] = 0
    tokens = ids.tolist()
    asked = [None if at in errors else row.sampling.logprobs for at, row in enumerate(rows)]
    for at, row in enumerate(rows):
        if at not in errors:
            row.append(tokens[at])
    return Drawn(ids, tokens, _logprobs(logits, ids, asked), errors)


def _changed(logits: Tensor, rows: Sequence[Drawing], places: Sequence[int]) -> tuple[Tensor, dict[int, float]]:
    """Tokens (rows,) of `rows`, at `places` of the logits, that are drawn at random or from changed logits; and for
    rows where no token is left to choose, the largest logit that is left. The rows stand by their `rank`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    same = list(places) == list(range(len(logits)))
    scores = logits.to(dtype, copy=True).contiguous() if same else logits[_places(places, logits)].to(dtype)
    _edit(scores, rows)
    some = [row.sampling for row in rows if row.sampling.temperature > 0]
    at_random, greedy = scores[: len(some)], scores[len(some) :]
    if some:
        at_random.div_(torch.tensor([[one.temperature] for one in some], dtype=dtype, device=scores.device))
    wrong = {at: value for at, value in enumerate(scores.amax(-1).tolist()) if not isfinite(value)}
    if wrong:
        scores[list(wrong)] = 0
    ids = [greedy.argmax(-1)]
    if some:
        limits = [one.top_k for one in some], [one.top_p for one in some], [one.min_p for one in some]
        ids.insert(0, pick(token_weights(at_random, *limits), [row.uniform() for row in rows[: len(some)]]))
    return torch.cat(ids), wrong


def _edit(scores: Tensor, rows: Sequence[Drawing]) -> None:
    """Apply what changes single logits of `scores` (rows, vocabulary), in place."""
    width, flat = scores.shape[1], scores.view(-1)
    if biased := [(at, one) for at, one in enumerate(rows) if len(one.biased)]:
        where = np.concatenate([one.biased + at * width for at, one in biased])
        flat[_on(where, scores)] += _on(np.concatenate([one.bias for _, one in biased]), scores).to(scores.dtype)
    if seen := [(at, one, one.seen) for at, one in enumerate(rows) if one.seen is not None]:
        where = np.concatenate([known.ids + at * width for at, _, known in seen])
        counts = np.concatenate([known.counts for _, _, known in seen])
        settings = [one.sampling for _, one, _ in seen]
        each = [[s.repetition_penalty, s.presence_penalty, s.frequency_penalty] for s in settings]
        penalties = np.repeat(np.array(each).T, [len(known.ids) for _, _, known in seen], axis=1)
        penalize(scores, _on(where, scores), _on(counts, scores), _on(penalties, scores))
    for at, matcher in [(at, one.matcher) for at, one in enumerate(rows) if one.matcher is not None]:
        allowed = matcher.allowed()[:width]
        scores[at, : len(allowed)].masked_fill_(_on(~allowed, scores), -torch.inf)
        scores[at, len(allowed) :] = -torch.inf
    if early := [one.ends + at * width for at, one in enumerate(rows) if not one.may_end]:
        flat[_on(np.concatenate(early), scores)] = -torch.inf


def _on(values: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)


def _places(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


def _logprobs(logits: Tensor, ids: Tensor, asked: Sequence[int | None]) -> list[TokenLogprobs | None]:
    wanted = [row for row, count in enumerate(asked) if count is not None]
    if not wanted:
        return [None] * len(asked)
    where = _places(wanted, logits)
    chosen, best, tokens = likeliest(logits[where], ids[where], max(asked[row] or 0 for row in wanted))
    given: list[TokenLogprobs | None] = [None] * len(asked)
    for row, own, scores, names in zip(wanted, chosen.tolist(), best.tolist(), tokens.tolist(), strict=True):
        first = zip(names[: asked[row]], scores[: asked[row]], strict=True)
        given[row] = TokenLogprobs(own, tuple(sorted(first, key=lambda pair: (-pair[1], pair[0]))))
    return given


def _no_token(row: Drawing, top: float) -> InlayError:
    what = "NaN" if isnan(top) else "infinite" if top > 0 else "all -inf"
    return InlayError(
        f"{row.name}: the model's logits are {what} at token {row.position + 1} of the answer",
        "Try float32, or another adapter: the weights have diverged, or the dtype overflows.",
    )


def _forbidden(row: Drawing, top: float) -> InlayError:
    at = f"at token {row.position + 1} of the answer"
    if top < 0:
        also = "" if row.matcher is None else "the grammar, "
        return InlayError(f"{row.name}: {also}logit_bias or min_new_tokens forbid every token {at}", "Forbid fewer.")
    return InlayError(
        f"{row.name}: temperature {row.sampling.temperature:g} and repetition_penalty "
        f"{row.sampling.repetition_penalty:g} take the logits beyond their range {at}",
        "Choose values nearer to 1.",
    )
