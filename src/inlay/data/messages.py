"""Reads conversations, in the layouts that data sets use, into the messages that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inlay.errors import DataError

from .fields import kind_of

__all__ = ["Message", "Talk", "checked_options", "messages_of", "tools_of"]

ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""Roles of other data sets by the names that chat templates know."""
LOSS = ("weight", "train", "loss")
"""Fields that say whether a message is learned: weight 0 or 1, train and loss true or false."""
OURS = ("tokenize", "chat_template", "add_generation_prompt", "tools", "messages", "conversation", "return_tensors")
THOUGHT = "</think>"
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Message:
    """One turn: its role, its words, the fields besides that a chat template may use, and whether it may bear loss."""

    role: str
    content: str
    more: dict[str, Any] = field(default_factory=dict)
    learned: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.more}

    @property
    def calls(self) -> list[str]:
        """The names of the functions that the message calls."""
        found = (call.get("function", call) for call in self.more.get("tool_calls") or [] if isinstance(call, dict))
        return [str(one.get("name")) for one in found if isinstance(one, dict)]

    @property
    def thoughts(self) -> list[str]:
        """The reasoning of an answer, in fields of its own or between <think> and </think>."""
        own = [self.more.get(name) for name in THOUGHTS]
        own.append(self.content.rpartition(THOUGHT)[0].rpartition("<think>")[2] if self.role == "assistant" else None)
        return [one for one in own if isinstance(one, str) and one.strip()]

    @property
    def spoken(self) -> str:
        """The words behind the reasoning."""
        return self.content.rpartition(THOUGHT)[2] if self.role == "assistant" else self.content


@dataclass(frozen=True)
class Talk:
    """A conversation: its messages, the tools they may call, and options for the chat template."""

    messages: tuple[Message, ...]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, turns: Sequence[Any], where: str) -> Talk:
        """A conversation of (role, words) pairs or of messages."""
        listed = [{"role": one[0], "content": one[1]} if isinstance(one, tuple) else one for one in turns]
        return cls(tuple(messages_of(listed, where, "messages")))

    def first(self, count: int) -> Talk:
        return Talk(self.messages[:count], self.tools, self.options)

    @property
    def asked(self) -> Talk:
        """The conversation up to its last answer."""
        answered = bool(self.messages) and self.messages[-1].role == "assistant"
        return self.first(len(self.messages) - 1) if answered else self


def messages_of(value: Any, where: str, column: str) -> list[Message]:
    """The messages in a row's value, in any of the usual layouts. Raises: DataError naming what cannot be used."""
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{where}: column {column!r} holds no messages", "Give a list of them.")
    return [_message(turn, where, number) for number, turn in enumerate(value, 1)]


def _message(turn: Any, where: str, number: int) -> Message:
    if isinstance(turn, Message):
        return turn
    said = f"{where}: message {number}"
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{where} holds a message without role and content", 'Give {"role", "content"}.')
    more = {k: v for k, v in turn.items() if v is not None and k not in ("role", "from", "content", "value", *LOSS)}
    content = turn.get("content", turn.get("value"))
    words = _words(content, said, bool(more.get("tool_calls")) or any(more.get(name) for name in THOUGHTS))
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], said)
    if role == "function_call" and (call := _parsed(words)) and "name" in call:
        more["tool_calls"], words = _calls([call], said), ""
    return Message(ROLES.get(role, role), words, more, _learned(turn, said))


def _words(content: Any, said: str, more: bool) -> str:
    """A message's words; parts of text are joined as they are, as chat templates that know parts do."""
    if isinstance(content, str):
        return content
    if content is None and more:
        return ""
    if not isinstance(content, (list, tuple)):
        if content is None:
            raise DataError(f"{said} is without role and content", 'Give {"role", "content"}.')
        raise DataError(f"{said} has {kind_of(content)} as content", "Give words, or a list of text parts.")
    found = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        words = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(words, str) or kind not in ("text", "str", "input_text", "output_text"):
            raise DataError(f"{said} holds a part of type {kind!r}", "This base reads text alone: give text parts.")
        found.append(words)
    return "".join(found)


def _calls(value: Any, said: str) -> list[Any]:
    """Tool calls; arguments that are written as JSON become the object they stand for, which chat templates expect."""
    value = _loaded(value)
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise DataError(
            f"{said} has tool_calls that are no list of calls", 'Give [{"function": {"name", "arguments"}}].'
        )
    found = []
    for call in value:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(
                f"{said} has a tool call without a function's name", 'Give {"function": {"name", "arguments"}}.'
            )
        arguments = inner.get("arguments")
        parsed = _parsed(arguments) if isinstance(arguments, str) else None
        inner = {**inner, "arguments": parsed if parsed is not None else ({} if arguments is None else arguments)}
        outer = {name: one for name, one in call.items() if one is not None and "function" in call}
        found.append({"type": "function", **outer, "function": inner})
    return found


def _learned(turn: Mapping[str, Any], said: str) -> bool:
    for name in LOSS:
        value = turn.get(name)
        if value is not None and value not in (0, 1):
            raise DataError(f"{said} has the {name} {value!r}", "A message is learned (1) or not (0).")
        if value is not None and not value:
            return False
    return True


def tools_of(value: Any, where: str, column: str = "tools") -> list[Any] | None:
    """The functions that a conversation may call: a list of descriptions, or JSON of one. Raises: DataError."""
    loaded = _loaded(value) if not isinstance(value, str) or value.strip() else None
    if loaded is None or loaded == []:
        return None
    if not isinstance(loaded, list) or not all(isinstance(one, dict) for one in loaded):
        raise DataError(f"{where}: column {column!r} holds no list of tools", "Give a list of JSON schemas.")
    return [_pruned(one) for one in loaded]


def checked_options(value: Any, where: str) -> dict[str, Any]:
    """The options for the chat template that a row brings. Raises: DataError."""
    loaded = _loaded(value) if value is not None else {}
    if not isinstance(loaded, dict) or any(name in OURS for name in loaded):
        raise DataError(
            f"{where}: column 'chat_template_kwargs' holds no settings for a chat template", "Give an object."
        )
    return {name: one for name, one in loaded.items() if one is not None}


def _loaded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _parsed(words: str) -> dict[str, Any] | None:
    found = _loaded(words)
    return found if isinstance(found, dict) else None


def _pruned(value: Any) -> Any:
    """Without the nulls that tables of one schema fill gaps with."""
    if isinstance(value, dict):
        return {name: _pruned(inner) for name, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value
