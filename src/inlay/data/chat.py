"""Renders conversations by a model's chat template, and finds answers, turns and the system turn in the text."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from inlay.errors import DataError, UsageError

from .messages import Message, Talk
from .special import Controls, controls_of
from .tokens import common

__all__ = ["Chat", "Rendered"]

PROBE = "\ufdd2"
"""Stands for an answer's words: a noncharacter, which no template looks for or takes away."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as `text`. `answers` are (start, end) characters of the answers that bear loss, `system` is where
    the system turn ends (0 without one), and `turns`, where asked for, are the end and the role of each turn. Control
    tokens that stand in messages are marked (see `special`).
    """

    text: str
    answers: list[tuple[int, int]]
    system: int = 0
    turns: tuple[tuple[int, str], ...] = ()


class Chat:
    """Renders with the tokenizer's own chat template, or with `jinja` in its place.

    Raises: UsageError where there is none, or `jinja` is no template.
    """

    def __init__(self, tokenizer: Any, jinja: str | None = None, controls: Controls | None = None) -> None:
        if jinja is None and not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "the base's tokenizer has no chat template",
                "Give prompt and completion columns, or --template file.jinja.",
            )
        self.tokenizer, self.jinja = tokenizer, jinja
        self.controls = controls or controls_of(tokenizer)
        self.ends = Controls([*self.controls.names, *tokenizer.get_added_vocab()])
        if jinja is not None:
            _check_jinja(jinja)

    def text(self, talk: Talk, opened: bool = False, where: str = "the conversation") -> str:
        """The conversation as text; `opened` adds the generation prompt. Raises: DataError naming `where`."""
        plain = self.controls.all_plain
        more: dict[str, Any] = {} if self.jinja is None else {"chat_template": self.jinja}
        messages = [plain(message.to_dict()) for message in talk.messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opened, tools=plain(talk.tools), **more,
                **plain(talk.options),
            )  # fmt: skip
        except Exception as error:  # a template raises whatever it likes
            if (written := _written(talk)) != talk:
                return self.text(written, opened, where)
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{where}: the chat template refuses it ({why})", "Change the roles.") from None

    def render(self, talk: Talk, where: str, system: bool = False, turns: bool = False) -> Rendered:
        """Render a conversation and find its answers: an answer is what the text has beyond that of the turns before
        it. `system` and `turns` say whether the ends of the system turn and of all turns are wanted.

        Raises: DataError naming the row where the template leaves out what a message says, renders an answer
        otherwise once others follow, or leaves it without an end to learn.
        """
        text = self.text(talk, where=where)
        self._check_tools(talk, text, where)
        answers, ends = [], []
        for number, message in enumerate(talk.messages):
            if message.role == "assistant" and message.learned:
                answers.append(self._answer(text, talk, number, where))
                ends.append((answers[-1][1], message.role))
            else:
                self._check_shown(message, number, text, where)
                if turns:
                    ends.append((self._end(text, talk.first(number + 1)), message.role))
        first = self._end(text, talk.first(1)) if system and talk.messages[0].role == "system" else 0
        return Rendered(text, answers, first, tuple(ends))

    def behind_system(self, talk: Talk, text: str) -> int:
        """How many first characters belong to a system turn."""
        return self._end(text, talk.first(1)) if talk.messages and talk.messages[0].role == "system" else 0

    def _end(self, text: str, talk: Talk) -> int:
        """How far a conversation that ends in no answer goes; 0 where the template refuses to end there."""
        try:
            return common(text, self.text(talk))
        except DataError:
            return 0

    def _answer(self, text: str, talk: Talk, number: int, where: str) -> tuple[int, int]:
        message, last = talk.messages[number], number == len(talk.messages) - 1
        before = self._opened(talk.first(number), where)
        alone = text if last else self.text(talk.first(number + 1), where=where)
        head = common(text, before)
        if not number and (
            head < len(before) or not before
        ):  # words of the template itself stand before a first answer
            head = max(0, text.find(self.controls.plain(message.content.strip())))
            before = text[:head]
        elif head < len(before):
            head = self._parted(text, talk, number, where)
        whole = head == len(before) and text.startswith(alone)
        # Templates that take thoughts out of earlier answers: the answer goes to the end of its turn.
        end = len(alone) if whole else next((m.end() for m in self.controls.meant.finditer(text, head)), 0)
        self._check_answer(message, number, (text[head:end], alone), whole, where)
        return head, end

    def _parted(self, text: str, talk: Talk, number: int, where: str) -> int:
        """Where an answer begins that does not begin as the generation prompt does: many templates open a prompt with
        <think>, and leave that out of earlier answers. Raises: DataError for other differences.
        """
        turns, last = talk.messages, number == len(talk.messages) - 1
        prior, before = self.text(talk.first(number), where=where), self._opened(talk.first(number), where)
        if not before.startswith(prior) or common(text, before) < len(prior):
            since = "it is answered" if last else "others follow"
            raise DataError(
                f"{where}: the chat template renders what stands before turn {number + 1} otherwise once {since}",
                "Give one row for each answer, as lists of messages called prompt and completion.",
            )
        if last:
            raise DataError(
                f"{where}: the chat template opens a prompt's answer with {before[len(prior) :]!r}, and renders turn "
                f"{number + 1} otherwise",
                "Give its thoughts as reasoning_content, or another template: --template file.jinja.",
            )
        other = replace(talk, messages=(*turns[:number], Message("assistant", PROBE), *turns[number + 1 :]))
        return min(common(text, before), common(text, self.text(other, where=where)))

    def lead(self, talk: Talk, where: str) -> str:
        """What the template writes between the generation prompt behind `talk` and the words of an answer."""
        opened = self.text(talk, True, where)
        text = self.text(replace(talk, messages=(*talk.messages, Message("assistant", PROBE))), where=where)
        return text[len(opened) : max(text.find(PROBE), 0)] if text.startswith(opened) else ""

    def _opened(self, talk: Talk, where: str) -> str:
        try:
            return self.text(talk, True, where)
        except DataError:
            if talk.messages:
                raise
            return ""  # a conversation that an answer opens

    def _check_answer(self, message: Message, number: int, said: tuple[str, str], whole: bool, where: str) -> None:
        answer, alone = said
        turn = f"turn {number + 1}"
        shown = _last_line(message.spoken)[:40]
        line = self.controls.plain(_last_line(message.spoken))
        if line not in answer or not answer:
            if not whole and line in alone:
                raise DataError(
                    f"{where}: the chat template renders {turn} otherwise once others follow",
                    "Give one row for each answer, as prompt and completion.",
                )
            raise DataError(
                f"{where}: the chat template hides the answer of {turn} ({shown!r})",
                "Use another template: --template file.jinja.",
            )
        for name in message.calls:
            if name not in answer:
                _left_out(where, f"the call of {name!r} in {turn}")
        for thought in message.thoughts:
            if self.controls.plain(_last_line(thought)) not in alone:
                _left_out(where, f"the reasoning in {turn}")
        *_, end = [0, *(match.end() for match in self.ends.meant.finditer(answer))]
        if not end or (line and line in answer[end:]):
            raise DataError(
                f"{where}: the chat template leaves no end token behind the answer of {turn}",
                "A model that never learns to stop goes on for ever: end answers with {{ eos_token }}.",
            )

    def _check_shown(self, message: Message, number: int, text: str, where: str) -> None:
        for name in message.calls:
            if name not in text:
                _left_out(where, f"the call of {name!r} in turn {number + 1}")
        line = _last_line(message.spoken)
        if not line or self.controls.plain(line) in text:
            return
        written = self.controls.plain(json.dumps(line, ensure_ascii=False)[1:-1])
        if written not in text and json.dumps(line)[1:-1] not in text and not _contained(message.content, text):
            role = message.role if message.role.isprintable() else repr(message.role)
            _left_out(where, f"the {role} turn ({line[:40]!r})")

    def _check_tools(self, talk: Talk, text: str, where: str) -> None:
        for tool in talk.tools or []:
            inner = tool.get("function", tool)
            name = inner.get("name") if isinstance(inner, dict) else None
            if isinstance(name, str) and name not in text:
                _left_out(where, f"the tool {name!r}")


def _left_out(where: str, what: str) -> None:
    raise DataError(f"{where}: the chat template leaves out {what}", "Use another template: --template file.jinja.")


def _contained(content: str, text: str) -> bool:
    """Whether the text holds all words and numbers of a message that is JSON, which templates may write anew."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return False
    found, queue = [], [value]
    while queue:
        one = queue.pop()
        queue += [*one.keys(), *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []
        found += [str(one)] if isinstance(one, (str, int, float)) and not isinstance(one, bool) else []
    return all(one in text for one in found)


def _written(talk: Talk) -> Talk:
    """The same with the arguments of tool calls written as JSON, which some templates expect."""
    messages = []
    for message in talk.messages:
        more = dict(message.more)
        if calls := more.get("tool_calls"):
            more["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _dumped(call["function"]["arguments"])}}
                for call in calls
            ]
        messages.append(replace(message, more=more))
    return replace(talk, messages=tuple(messages))


def _dumped(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
