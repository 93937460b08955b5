"""What clients send: OpenAI's fields, vLLM's besides, and Inlay's. What would be ignored in silence is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from inlay.errors import UsageError
from inlay.runtime.sampling import Sampling

from .problems import Problem

__all__ = ["Chat", "Classify", "Completion", "Feedback", "Load", "Model", "SetArms", "Unload", "Writing"]

Model = str | dict[str, float]
"""An adapter's name, the base's own, or a mix {name: weight}, also as JSON in a string."""
Token = Annotated[int, Field(ge=0)]
MOST_LOGPROBS = 20


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=True)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Writing(Body):
    """The fields that completions of both kinds have."""

    model: Model
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Token] = []
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None  # this and those below change no answer
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(self, tokens: int, logprobs: int | None) -> Sampling:
        """How answers of at most `tokens` tokens are drawn. Raises: Problem."""
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise Problem(400, f"logprobs of {logprobs} tokens are asked for. Choose 0 to {MOST_LOGPROBS}.")
        try:
            return Sampling(
                max_new_tokens=tokens, min_new_tokens=min(self.min_tokens, tokens),
                temperature=_or(self.temperature, 1.0), top_k=self.top_k, top_p=_or(self.top_p, 1.0), min_p=self.min_p,
                repetition_penalty=self.repetition_penalty, presence_penalty=_or(self.presence_penalty, 0.0),
                frequency_penalty=_or(self.frequency_penalty, 0.0), logit_bias=_biases(self.logit_bias),
                logprobs=logprobs, stop=_strings(self.stop), stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos, n=_or(self.n, 1), seed=self.seed,
            )  # fmt: skip
        except UsageError as error:
            raise Problem(400, str(error)) from None

    @property
    def asks_usage(self) -> bool:
        """Whether a stream is to end with what it took."""
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Writing):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    echo: bool | None = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        """Raises: Problem for what this server does not do."""
        if self.suffix:
            raise Problem(400, "this server writes behind a prompt, not into it. Leave suffix out.", param="suffix")
        if self.best_of not in (None, _or(self.n, 1)):
            raise Problem(400, "this server gives all answers that it writes. Leave best_of out.", param="best_of")
        if self.echo and self.stream and self.logprobs is not None:
            raise Problem(400, "a prompt's logprobs do not come as a stream. Leave stream or echo out.", param="stream")

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt. Raises: Problem where there is none."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given:
            raise Problem(400, "there is no prompt. Give a text, token ids, or a list of them.", param="prompt")
        return list(given)


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Chat(Writing):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    def check(self) -> None:
        """Raises: Problem for what this server does not do."""
        if self.tools and self.tool_choice != "none":
            raise Problem(400, "this server calls no tools. Leave tools out, or say tool_choice none.", param="tools")
        if self.top_logprobs is not None and not self.logprobs:
            raise Problem(400, "top_logprobs needs logprobs: true.", param="top_logprobs")

    def turns(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them."""
        made = [message.model_dump(exclude_none=True) for message in self.messages]
        for one in made:
            one["role"] = "system" if one["role"] == "developer" else one["role"]
        return made


class Classify(Body):
    """POST /v1/classify: texts, or rows {column: value} where the adapter's template has several columns."""

    model: Model
    input: str | dict[str, str] | list[str | dict[str, str]]

    def rows(self) -> list[str | dict[str, str]]:
        return self.input if isinstance(self.input, list) else [self.input]


class Load(Body):
    """POST /v1/load_lora_adapter, in vLLM's form. One that is there is replaced."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool | None = None


class Unload(Body):
    """POST /v1/unload_lora_adapter, in vLLM's form."""

    lora_name: str
    lora_int_id: int | None = None


class SetArms(Body):
    """PUT /v1/experiments/NAME: {"arms": {model: weight}}."""

    arms: dict[str, float]


class Feedback(Body):
    """POST /v1/feedback: what somebody thinks of an answer, as a value from 0 to 1 or a thumb."""

    id: Annotated[str, Field(min_length=1, max_length=100)]
    value: Annotated[float | None, Field(ge=0, le=1)] = None
    thumbs: Literal["up", "down"] | None = None
    comment: Annotated[str | None, Field(max_length=2000)] = None

    def rated(self) -> float:
        """Raises: Problem where there is no value, or two."""
        if (self.value is None) == (self.thumbs is None):
            raise Problem(400, 'give either value (0 to 1) or thumbs ("up", "down")', param="value")
        return float(self.thumbs == "up") if self.value is None else self.value


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _strings(stop: str | list[str] | None) -> tuple[str, ...]:
    return () if not stop else (stop,) if isinstance(stop, str) else tuple(stop)


def _biases(given: dict[str, float] | None) -> dict[int, float]:
    """Raises: Problem where a key is no token's id."""
    found = {}
    for token, bias in (given or {}).items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise Problem(400, f"logit_bias names {token!r}. Give token ids.", param="logit_bias")
        found[int(token)] = bias
    return found
