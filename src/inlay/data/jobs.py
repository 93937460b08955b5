"""Turns a row into the text to tokenise, with the characters at which answers and the system turn begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from inlay.errors import DataError, DroppedRow

from .chat import Chat
from .fields import blank, kind_of, names_in, tail_of
from .messages import Message, Talk, checked_options, messages_of, tools_of
from .table import Row
from .template import Template
from .words import LONG, MARGIN, Words

__all__ = ["Job", "Jobs"]


@dataclass
class Job:
    """`text` to tokenise. `places` are characters of it: the start and the end of each of the `spans` that bear loss,
    then, with `system`, the end of the system turn. `markup` says that control tokens in the text are control tokens,
    not words; `opening` are the ids before it; `closed` says that an end-of-text token follows.
    """

    text: str
    places: list[int] = field(default_factory=list)
    spans: int = 0
    system: bool = False
    markup: bool = False
    opening: list[int] = field(default_factory=list)
    closed: bool = False


class Jobs:
    """Makes the jobs of rows of one template.

    Control tokens in a row's text are tokenised as ordinary text, those in the template as control tokens. A row's own
    BOS at its very start and EOS at its very end count as control tokens, once. A prompt that begins with a control
    token, and a text that begins and ends with one, are markup that somebody wrote out: all of theirs count.
    """

    def __init__(self, words: Words, template: Template, max_length: int, place: str) -> None:
        self.words, self.template, self.max_length = words, template, max_length
        self.system = place == "after-system"
        chats = template.chat or template.kind == "messages"
        self.chat = Chat(words.tokenizer, template.jinja, words.controls) if chats else None
        self.authored = not chats and bool(words.controls.any.search(template.authored))
        self.tail = tail_of(template.prompt)
        self.bos, self.eos = words.tokenizer.bos_token, words.tokenizer.eos_token

    # ---- what to encode

    def job(self, row: Row) -> Job:
        """The whole row. Raises: DroppedRow, DataError."""
        if self.chat is not None:
            return self._conversation(self.talk(row), row)
        if self.template.kind == "text":
            return self._text(row)
        row = self._marked(row)
        prompt = self.template.prompt_of(row)
        answer = self.template.answer_of(row, prompt)
        if self.template.kind == "label":
            self._check_words(row)
        else:
            answer = self._unended(answer)
            if not answer.strip():
                raise DroppedRow(row.where, "no answer")
        job = self._behind(prompt, [answer + self.template.after_of(row)], row.where)[0]
        job.places, job.spans, job.closed = [job.places[0], len(job.text)], 1, True
        return job

    def choices(self, row: Row) -> list[tuple[str, Job]]:
        """The row's prompt with each candidate behind it; the place is where the candidate begins. Raises: as `job`."""
        self.template.label_of(row)
        if self.chat is not None:
            talk = self.talk(row).asked
            opened = self.asked(talk, row.where)
            listed = self.template.candidates(row)
            start, lead = len(opened.text), self.chat.lead(talk, row.where)
            texts = [opened.text + lead + self.words.controls.plain(word.strip()) for _, word in listed]
            jobs = [replace(opened, text=text, places=[start, *opened.places]) for text in texts]
        else:
            row = self._marked(row)
            prompt = self.template.prompt_of(row)
            self._check_words(row)
            listed = self.template.candidates(row, prompt)
            jobs = self._behind(prompt, [words for _, words in listed], row.where)
        return [(label, job) for (label, _), job in zip(listed, jobs, strict=True)]

    def prompt(self, row: Row) -> Job:
        """The words before the answer. Raises: DataError."""
        if self.chat is not None:
            return self.asked(self.talk(row, False).asked, row.where)
        if self.template.kind == "text":
            text = row.values.get(self.template.answer)
            if not isinstance(text, str):
                raise DataError(f"{row.where}: column {self.template.answer!r} holds no text", "Give words.")
            return self._behind(text, [""], row.where)[0]
        prompt = self.template.prompt_of(self._marked(row))
        if self.template.slot:  # tokenizers make the space a part of the word behind it, as the answer was learned
            prompt = prompt.rstrip(" ") or prompt
        return self._behind(prompt, [""], row.where)[0]

    def asked(self, talk: Talk, where: str) -> Job:
        """A conversation that ends before an answer. Raises: UsageError where there is no chat template, DataError."""
        chat = self.chat or Chat(self.words.tokenizer, self.template.jinja, self.words.controls)
        text = _sound(chat.text(talk, True, where), where)
        places = [chat.behind_system(talk, text)] if self.system else []
        return self._shortened(Job(text, places, system=self.system, markup=True), len(text), where)

    def talk(self, row: Row, answered: bool = True) -> Talk:
        """The row as a conversation. Raises: DroppedRow, DataError."""
        template, values = self.template, row.values
        if template.kind == "messages":
            return _talk_of(row, template, answered)
        asked = Talk((Message("user", template.prompt_of(row)),))
        if template.kind == "completion":
            options = checked_options(values.get("chat_template_kwargs"), row.where)
            asked = replace(asked, tools=tools_of(values.get("tools"), row.where), options=options)
        if not answered:
            return asked
        answer = template.answer_of(row)
        if template.kind == "label":
            self._check_words(row)
        return replace(asked, messages=(*asked.messages, Message("assistant", self._unended(answer).strip())))

    # ---- words

    def _behind(self, prompt: str, endings: Sequence[str], where: str) -> list[Job]:
        """The prompt with each of the endings."""
        opening, markup = self.words.opening, self.authored
        if self.bos and prompt.startswith(self.bos):
            prompt, opening = self._opened(prompt)
        written = opening is not self.words.opening or prompt.startswith(self.words.controls.names)
        if written and not markup and self.template.kind != "label" and self.words.controls.any.search(prompt):
            markup, endings = True, [self.words.controls.plain(ending) for ending in endings]
        jobs = []
        for ending in endings:
            text = _sound(prompt + ending, where)
            job = Job(text, [len(prompt)], markup=markup, opening=opening)
            jobs.append(self._shortened(job, len(prompt), where))
        return jobs

    def _text(self, row: Row) -> Job:
        column = self.template.answer
        if column not in row.values:
            raise DataError(f"{row.where}: the row has no column {column!r}", "It holds the text.")
        text = row.values[column]
        if blank(text):
            raise DroppedRow(row.where, "no text")
        if not isinstance(text, str):
            raise DataError(f"{row.where}: column {column!r} holds {kind_of(text)}, no text", "Give words.")
        names, opening = self.words.controls.names, self.words.opening
        markup = text.startswith(names) and text.rstrip().endswith(names)
        if self.bos and text.startswith(self.bos):
            text, opening = self._opened(text)
        text = _sound(self._unended(text), row.where)
        return Job(text, markup=markup, opening=opening, closed=True)

    def _opened(self, text: str) -> tuple[str, list[int]]:
        """A text without the BOS that it brings, and the ids that open it: one BOS."""
        while text.startswith(self.bos):
            text = text[len(self.bos) :]
        bos = self.words.tokenizer.bos_token_id
        return text, list(self.words.opening) if bos in self.words.opening else [bos, *self.words.opening]

    def _unended(self, text: str) -> str:
        """A text without the EOS that it brings: one is learned anyway."""
        while self.eos and text.rstrip().endswith(self.eos):
            text = text.rstrip()[: -len(self.eos)]
        return text

    def _marked(self, row: Row) -> Row:
        """The row with its control tokens marked as words, where the template means its own."""
        if not self.authored:
            return row
        kept = self.template.answer if self.template.kind == "label" else None
        values = dict(row.values)
        if self.template.kind == "completion" and isinstance(values.get(self.template.answer), str):
            values[self.template.answer] = self._unended(values[self.template.answer])
        plain = self.words.controls.all_plain
        return replace(row, values={name: one if name == kept else plain(one) for name, one in values.items()})

    def _check_words(self, row: Row) -> None:
        if self.template.wordless(row):
            raise DroppedRow(row.where, "no text")

    # ---- conversations

    def _conversation(self, talk: Talk, row: Row) -> Job:
        assert self.chat is not None
        rendered = self.chat.render(talk, row.where, self.system)
        text = _sound(rendered.text, row.where)
        places = [place for span in rendered.answers for place in span] + ([rendered.system] if self.system else [])
        job = Job(text, places, len(rendered.answers), self.system, True)
        return self._shortened(job, rendered.answers[0][0] if rendered.answers else len(text), row.where)

    # ---- length

    def _shortened(self, job: Job, head: int, where: str) -> Job:
        """The job without those of its first `head` characters that cannot fit, however they are tokenised: a row of
        10 MB takes seconds otherwise. Cut is the end of a label row's text, or the beginning of other prompts.
        """
        size = len(job.text)
        room = 2 * MARGIN + self.words.room(self.max_length) if size > max(LONG, self.max_length) else size
        if size - head > room:
            raise DroppedRow(where, "answer too long", "Raise --max-length.")
        excess = head - room
        if excess <= 0:
            return job
        if self.template.kind == "label" and self.chat is None:
            end = max(0, head - len(self.tail) - MARGIN)  # so that the tail's tokens are those of the whole
            start = max(0, end - excess)
        else:
            start = len(self.bos) if self.bos and job.text.startswith(self.bos) else 0
            end = start + excess
        places = [place if place <= start else max(start, place - (end - start)) for place in job.places]
        return replace(job, text=job.text[:start] + job.text[end:], places=places)


def said(message: Message) -> bool:
    """Whether there is anything in a message to learn."""
    return bool(message.content.strip() or message.calls or message.thoughts)


def _talk_of(row: Row, template: Template, answered: bool) -> Talk:
    """The conversation in a row's columns; with turns in the prompt's column, only those of the answer's are
    learned.
    """
    before = sorted(names_in(template.prompt))
    turns: list[Message] = []
    for column in [*before, template.answer] if answered or not before else before:
        if column not in row.values:
            raise DataError(f"{row.where}: the row has no column {column!r}", "It holds messages.")
        value = row.values[column]
        if blank(value) or value == []:
            raise DroppedRow(row.where, "no messages")
        bears = column == template.answer
        value = [Message("assistant" if bears else "user", value)] if isinstance(value, str) and before else value
        own = messages_of(value, row.where, column)
        turns += [replace(one, learned=one.learned and bears and said(one)) for one in own]
    options = checked_options(row.values.get("chat_template_kwargs"), row.where)
    return Talk(tuple(turns), tools_of(row.values.get("tools"), row.where), options)


def _sound(text: str, where: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DroppedRow(where, "text is not valid Unicode") from None
    return text
