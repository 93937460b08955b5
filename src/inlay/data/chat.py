"""Conversations as a model's chat template renders them, with what each token is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inlay.errors import DataError, UsageError

__all__ = ["Chat", "Rendered", "common", "turns_of"]

Turn = tuple[str, str]
"""A role and its words."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation, whether each is learned, and whose turn it belongs to."""

    ids: list[int]
    learned: list[bool]
    roles: list[str]


class Chat:
    """Renders with the tokenizer's own chat template, or with `jinja` in its place.

    Raises: UsageError where there is none, or `jinja` is no template.
    """

    def __init__(self, tokenizer: Any, jinja: str | None = None) -> None:
        if jinja is None and not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "the base's tokenizer has no chat template",
                "Give prompt and completion columns, or --template file.jinja.",
            )
        self.tokenizer, self.jinja = tokenizer, jinja
        self.ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        if jinja is not None:
            _check_jinja(jinja)

    def text(self, turns: Sequence[Turn], opened: bool = False, where: str = "the conversation") -> str:
        """The conversation's words; `opened` adds what an answer begins with."""
        messages = [{"role": role, "content": content} for role, content in turns]
        more: dict[str, Any] = {} if self.jinja is None else {"chat_template": self.jinja}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened, **more)
        except Exception as error:  # a template raises whatever it likes
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{where}: the chat template refuses it ({why})", "Change the roles.") from None

    def ids(self, turns: Sequence[Turn], opened: bool = False, where: str = "the conversation") -> list[int]:
        return list(self.tokenizer(self.text(turns, opened, where), add_special_tokens=False)["input_ids"])

    def render(self, turns: Sequence[Turn], where: str, checked: bool = False) -> Rendered:
        """Answers are what a rendering has beyond that of the turns before it.

        Raises: DataError naming the row where the template hides an answer, renders it otherwise once others follow,
        or (where it is to be `checked`) leaves it without an end to learn.
        """
        ids = self.ids(turns, where=where)
        learned, roles = [False] * len(ids), [""] * len(ids)
        start = 0
        for number, (role, content) in enumerate(turns):
            if role == "assistant":
                head, end = self._answer(ids, turns, number, where)
                learned[head:end] = [True] * (end - head)
                if checked:
                    self._check(ids[head:end], content, number, where)
            else:
                end = common(ids, self._partial(turns[: number + 1], where))
            roles[start:end] = [role] * max(0, end - start)
            start = max(start, end)
        return Rendered(ids, learned, [role or turns[-1][0] for role in roles])

    def behind_system(self, turns: Sequence[Turn], ids: Sequence[int]) -> int:
        """How many first tokens belong to a system turn."""
        if not turns or turns[0][0] != "system":
            return 0
        return common(ids, self._partial(turns[:1], "the system turn"))

    def _partial(self, turns: Sequence[Turn], where: str) -> list[int]:
        """A conversation that ends in no answer; nothing where the template refuses to end there."""
        try:
            return self.ids(turns, where=where)
        except DataError:
            return []

    def _answer(self, ids: list[int], turns: Sequence[Turn], number: int, where: str) -> tuple[int, int]:
        before = self.ids(turns[:number], True, where)
        after = self.ids(turns[: number + 1], where=where)
        head = common(ids, before)
        if head >= len(before) - 1 and common(ids, after) >= len(after) - 1:
            return head, min(len(after), len(ids))
        # Templates that take thoughts out of earlier answers: the answer goes to the end of its turn.
        end = next((n + 1 for n in range(head, len(ids)) if ids[n] in self.ends), 0)
        said = self.tokenizer.decode(ids[head:end], skip_special_tokens=True)
        if end and _last_line(turns[number][1]) in said:
            return head, end
        raise DataError(
            f"{where}: the chat template renders turn {number + 1} otherwise once others follow",
            "Give one row for each answer, as prompt and completion.",
        )

    def _check(self, answer: list[int], content: str, number: int, where: str) -> None:
        said = self.tokenizer.decode(answer, skip_special_tokens=True)
        if content.strip() and _last_line(content) not in said:
            raise DataError(
                f"{where}: the chat template hides the answer of turn {number + 1} ({_last_line(content)[:40]!r})",
                "Use another template: --template file.jinja.",
            )
        if not any(token in self.ends for token in answer):
            raise DataError(
                f"{where}: the chat template leaves no end token behind the answer of turn {number + 1}",
                "A model that never learns to stop goes on for ever: end answers with {{ eos_token }}.",
            )


def turns_of(value: Any, where: str, column: str) -> list[Turn]:
    """(role, content) of each message, in either of the usual layouts. Raises: DataError."""
    names = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: column {column!r} holds no messages", "Give a list of them.")
    found = []
    for turn in value:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{where} holds a message without role and content", 'Give {"role", "content"}.')
        found.append((names.get(role, role), content))
    return found


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens a and b share."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _last_line(words: str) -> str:
    """What remains of an answer when thoughts before it are taken out."""
    lines = [line.strip() for line in words.strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _check_jinja(text: str) -> None:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
            text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except TemplateSyntaxError as error:
        raise UsageError(
            f"the chat template cannot be read (line {error.lineno}: {error.message})", "Mend it."
        ) from None
