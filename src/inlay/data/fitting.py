"""Cuts prompts to the maximal length: which tokens go, and where virtual tokens stand in what is left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from .fields import names_in
from .jobs import Job, Jobs
from .messages import Message, Talk
from .tokens import Tokens

__all__ = ["Fitting"]


class Fitting:
    """Cuts prompts of one template. Rows of kind label are cut for the longest word of any label: they are scored as
    they were trained, and the length of a prompt does not tell its label.
    """

    def __init__(self, jobs: Jobs, place: str) -> None:
        self.jobs, self.words, self.place = jobs, jobs.words, place
        self.labels = jobs.template.kind == "label"

    def shortened(self, ids: list[int], length: int, job: Job, tokens: Tokens) -> tuple[list[int], int]:
        """At most `length` tokens (1 or more) of the prompt `ids`, and the place at which tokens are left out.

        For label templates the end of the row's text goes, and the template's words behind it stay. Else the beginning
        goes, but for a first token that opens every text (BOS, CLS).
        """
        excess = len(ids) - length
        if excess <= 0:
            return ids, len(ids)
        first = 1 if ids[0] in (self.words.bos, self.words.cls) else 0
        start = first
        if self.labels and self.jobs.chat is None:
            start = max(first, len(ids) - self._behind(len(ids), job, tokens) - excess)
        return ids[:start] + ids[start + excess :], start

    def placed(self, system: int, kept: Sequence[int], whole: int, at: int) -> int:
        """Where virtual tokens stand in the `kept` tokens of a prompt that had `whole` ones, some of which are left out
        from place `at` on; the system turn, or what opens a text, had `system` tokens.
        """
        if self.place == "after-system":
            return system if system <= at else max(at, system - (whole - len(kept)))
        return len(kept) if self.place == "before-answer" else 0

    @cached_property
    def reserve(self) -> int:
        """Tokens of the longest words of a label, with what follows them; 0 where that depends on the row."""
        template, chat = self.jobs.template, self.jobs.chat
        if not self.labels or (names_in(template.after) and chat is None):
            return 0
        listed = [word for words in template.verbalizer.values() for word in words]
        if chat is not None:
            return max(self._turn(word.strip()) for word in listed)
        return max(self._size(f"film{self.jobs.tail}", template.ending(word, self.jobs.tail)) for word in listed)

    # ---- inside

    def _behind(self, count: int, job: Job, tokens: Tokens) -> int:
        """How many of the prompt's `count` tokens belong to the template's words behind its last column."""
        place, tail = job.places[0], self.jobs.tail
        place -= len(tail) if job.text[:place].endswith(tail) else len(tail.rstrip(" "))  # as `Jobs.prompt` leaves it
        ((head,),) = self.words.heads([job.text], [tokens], [[max(0, place)]], job.markup)
        return max(0, count - len(job.opening) - head)

    def _size(self, prompt: str, ending: str) -> int:
        text, markup = prompt + ending, self.jobs.authored
        (tokens,) = self.words.encode([text], markup)
        ((head,),) = self.words.heads([text], [tokens], [[len(prompt)]], markup)
        return len(tokens.ids) - head + len(self.words.ended(tokens.ids))

    def _turn(self, word: str) -> int:
        chat = self.jobs.chat
        assert chat is not None
        rendered = chat.render(Talk((Message("user", "film"), Message("assistant", word))), "the template")
        (tokens,) = self.words.encode([rendered.text], True)
        ((start, end),) = self.words.heads([rendered.text], [tokens], [list(rendered.answers[0])], True)
        return end - start
