"""How one request's answers are drawn, and when they end. The names are those of vLLM and transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Protocol

from inlay.errors import UsageError

__all__ = ["Grammar", "Matcher", "Sampling"]

LEAST_TEMPERATURE = 1e-6
"""Logits divided by less may leave float32's range."""


class Matcher(Protocol):
    """What the tokens of one answer may be, as it is written."""

    def allowed(self) -> Any:
        """Which tokens may come next: bool (vocabulary,), of numpy. It raises nothing; none is an error of the row."""

    def take(self, token: int) -> None:
        """The answer goes on with a token."""


class Grammar(Protocol):
    """What the tokens of answers may be."""

    def matcher(self) -> Matcher:
        """A new one, for one answer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one request.

    max_new_tokens, min_new_tokens: tokens of an answer at most, and before it may end.
    temperature: 0 takes the likeliest token, and the next three have no effect then.
    top_k: how many of the likeliest tokens are drawn from; 0 or -1 for all.
    top_p: the share of the probability that is drawn from, the likeliest tokens first.
    min_p: the least probability of a token, as a share of the likeliest one's.
    repetition_penalty: divides the positive logits of tokens that the prompt or the answer holds, multiplies negative
        ones; 1 for none.
    presence_penalty, frequency_penalty: taken from the logits of tokens that the answer holds, once, and as often as it
        holds them (OpenAI's); 0 for none.
    logit_bias: added to the logits of tokens, by their ids; -inf forbids one.
    logprobs: how many of the likeliest tokens to report at each place, beside the one that was chosen; None for no
        report. The logarithms are the model's own, before any setting has changed its logits.
    stop: strings that end the answer and are left out of it; one may be given alone.
    stop_token_ids: tokens that end the answer, beside the model's own, which `ignore_eos` turns off.
    n: answers of the prompt.
    seed: makes the answers the same each time; None draws one.
    grammar: what tokens may come next, given those before; None for any.

    Raises: UsageError naming the field, its value and what would be right.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.min_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}",
                "Choose a min_new_tokens that is no larger.",
            )

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there before have other logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def ends(self, eos: Iterable[int]) -> frozenset[int]:
        """The tokens that end an answer, where the model's own are `eos`."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos))

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises: UsageError where a token's id is none of the `vocabulary` that the base gives logits for."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            if beyond := [token for token in ids if token >= vocabulary]:
                raise UsageError(
                    f"{name} names the token {beyond[0]}, and the base has {vocabulary}",
                    f"Choose ids from 0 to {vocabulary - 1}.",
                )


# ---- the checks of the fields: each takes a field's name and value, and gives the value as the class holds it

Check = Callable[[str, Any], Any]


def _refused(name: str, value: Any, remedy: str) -> UsageError:
    words = repr(value)
    return UsageError(f"{name} is {words if len(words) <= 80 else words[:77] + '...'}", remedy)


def _whole(least: int, most: int = 2**31 - 1) -> Check:
    words = f"a whole number of {least} or more" if least > -(2**31) else "a whole number of 64 bits"

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
            raise _refused(name, value, f"Choose {words}.")
        return int(value)

    return check


def _number(words: str, right: Callable[[float], bool]) -> Check:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real) or not right(float(value)):
            raise _refused(name, value, f"Choose {words}.")
        return float(value)

    return check


def _optional(inner: Check, meaning: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if value is None:
            return None
        try:
            return inner(name, value)
        except UsageError as error:
            raise UsageError(error.what, f"{error.remedy[:-1]}, or None {meaning}.") from None

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refused(name, value, "Choose True or False.")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, Collection) or not all(isinstance(one, str) and one for one in given):
        raise _refused(name, value, "Give strings of one character or more.")
    return tuple(dict.fromkeys(given))


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Collection):
        raise _refused(name, value, "Give a list of token ids.")
    return tuple(dict.fromkeys(_whole(0)(f"a token of {name}", one) for one in value))


def _biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _refused(name, value, "Give a mapping of token ids to numbers.")
    token, bias = _whole(0), _number("a number, or -inf to forbid the token", lambda x: x < math.inf)
    return {token(f"a token of {name}", one): bias(f"{name} of token {one}", given) for one, given in value.items()}


_penalty = _number("a number from -2 to 2", lambda x: -2 <= x <= 2)

CHECKS: dict[str, Check] = {
    "max_new_tokens": _whole(1),
    "min_new_tokens": _whole(0),
    "temperature": _number(
        f"0 for the likeliest token, or a number of {LEAST_TEMPERATURE:g} or more",
        lambda x: x == 0 or LEAST_TEMPERATURE <= x < math.inf,
    ),
    "top_k": _whole(-1),
    "top_p": _number("a number above 0, up to 1", lambda x: 0 < x <= 1),
    "min_p": _number("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": _number("a number above 0", lambda x: 0 < x < math.inf),
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
    "logit_bias": _biases,
    "logprobs": _optional(_whole(0), "for no report"),
    "stop": _strings,
    "stop_token_ids": _ids,
    "ignore_eos": _flag,
    "n": _whole(1),
    "seed": _optional(_whole(-(2**63), 2**63 - 1), "to draw one"),
}
