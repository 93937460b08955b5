"""What is asked for, and what comes back: a prompt with its adapters and settings, and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inlay.batch.route import RowSpec
from inlay.errors import InlayError, UsageError
from inlay.sites.positions import table_size

from .drawing import TokenLogprobs
from .sampling import Sampling

__all__ = ["Request", "Token", "end_tokens", "vocabulary_of"]


@dataclass(frozen=True)
class Request:
    """A prompt's `ids`, the adapters that answer it, and how; virtual tokens stand before token `place` of it.

    `name` is what errors call it. Requests of one `scope` may share what they have read of common beginnings.
    """

    route: RowSpec
    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    place: int = 0
    name: str = "the request"
    scope: str = ""


@dataclass(frozen=True)
class Token:
    """The next token of an answer; `text` is what is sure with it: often none, and several tokens' at once.

    `finish_reason` is None while the answer goes on; "stop", "length", or "error", where `error` says why and there is
    no token (`id` is -1). `request` and `answer` count from 0; `cached` tokens of the prompt were read before.
    """

    request: int
    answer: int
    id: int
    text: str = ""
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
    error: InlayError | None = None
    cached: int = 0


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end an answer, as the model's own settings say."""
    settings = getattr(model, "generation_config", None) or model.config
    found = getattr(settings, "eos_token_id", None)
    return frozenset() if found is None else frozenset(found if isinstance(found, (list, tuple)) else [found])


def vocabulary_of(model: Any) -> int:
    """How many tokens a base gives logits for."""
    head = model.get_output_embeddings()
    size = getattr(getattr(head, "weight", None), "shape", (None,))[0] or table_size(model)
    if size is None:
        raise UsageError(f"{type(model).__name__} has no table of tokens", "Choose a base that writes text.")
    return int(size)
