"""Rows to token ids, with the tokens that bear loss; prompts are cut where they are too long, answers never."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.errors import DataError, DroppedRow, UsageError

from .fitting import Fitting
from .jobs import Job, Jobs
from .messages import Talk
from .places import PLACES
from .table import Row
from .template import Template
from .words import Tokens, Words

__all__ = ["PIECE", "PLACES", "Choices", "Encoder", "Example"]

PIECE = 40
"""Bits of an example's `sample` that are the row's number; those above count the pieces of a row of text."""


@dataclass(frozen=True)
class Example:
    """`ids` (n,) and their `loss_mask` (n,); `sample` is the row's number in its table (with the number of the piece,
    shifted by `PIECE` bits, where a row of text has several), `cut` how many tokens of its prompt are left out at least
    (words beyond all that could fit are left out uncounted), `virtual_at` the token before which virtual ones stand.
    """

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    sample: int
    cut: int = 0
    virtual_at: int = 0


@dataclass(frozen=True)
class Choices:
    """A prompt, and the token ids of every word that may follow it (with the words of the template that follow the
    word), with the label each stands for.
    """

    prompt: tuple[int, ...]
    words: tuple[tuple[str, tuple[int, ...]], ...]
    label: str
    sample: int
    virtual_at: int = 0


class Encoder:
    """Encodes rows of one template with one tokenizer, at most `max_length` tokens each, or `limit` where that is
    less: the positions that a base has for a row's own tokens. `table_size` is how many token ids the base knows.

    Virtual tokens go to `place`: start, after-system (behind a conversation's system turn, or a text's opening token)
    or before-answer.
    Raises: UsageError for settings that cannot be.
    """

    def __init__(
        self, tokenizer: Any, template: Template, max_length: int, place: str = "start", limit: int | None = None,
        table_size: int | None = None,
    ) -> None:  # fmt: skip
        if tokenizer is None:
            raise UsageError("the base has no tokenizer", "Name a base folder that holds one.")
        if max_length < 2:
            raise UsageError(f"the maximal length is {max_length} tokens", "Give 2 or more.")
        if place not in PLACES:
            raise UsageError(f"virtual tokens cannot stand at {place!r}", f"Choose {', '.join(PLACES)}.")
        if limit is not None and limit < 2:
            said = f"the base's positions leave {limit} for a row's own tokens"
            raise UsageError(said, "Take fewer virtual tokens, or a base with more positions.")
        self.tokenizer, self.template, self.place = tokenizer, template, place
        self.max_length = max_length if limit is None else min(max_length, limit)
        self.table_size = table_size
        self.words = Words(tokenizer)
        self.jobs = Jobs(self.words, template, self.max_length, place)
        self.fitting = Fitting(self.jobs, place)
        self.chat = self.jobs.chat
        self._beyond = table_size is not None and max(tokenizer.get_vocab().values(), default=0) >= table_size

    # ---- rows

    def encode(self, rows: Sequence[Row]) -> list[list[Example] | DroppedRow]:
        """What each row becomes: one example, several for a long row of text, or why it is of no use. Equal for a
        row alone and among others.

        Raises: DataError naming the file and line of a row that is not what its column should hold.
        """
        return [found if isinstance(found, DroppedRow) else self._usable(found, row)
                for found, row in zip(self.drafts(rows), rows, strict=True)]  # fmt: skip

    def drafts(self, rows: Sequence[Row]) -> list[list[Example] | DroppedRow]:
        """As `encode`, but rows that are too long or teach nothing are there too."""
        jobs = [_tried(self.jobs.job, row) for row in rows]
        wanted = [job for job in jobs if isinstance(job, Job)]
        found = iter(zip(wanted, *self._tokens(wanted), strict=True))
        return [job if isinstance(job, DroppedRow) else self._examples(*next(found), row)
                for job, row in zip(jobs, rows, strict=True)]  # fmt: skip

    def example(self, row: Row) -> Example:
        """What a row becomes (the first piece of a long row of text). Raises: DroppedRow, DataError."""
        return _one(self.encode([row]))[0]

    def choices(self, row: Row) -> Choices:
        """The row's prompt and every candidate word after it. Raises: DroppedRow, DataError."""
        return _one(self.all_choices([row]))

    def all_choices(self, rows: Sequence[Row]) -> list[Choices | DroppedRow]:
        """`choices` of many rows. Raises: DataError."""
        jobs = [_tried(self.jobs.choices, row) for row in rows]
        wanted = [one for listed in jobs if not isinstance(listed, DroppedRow) for _, one in listed]
        found = iter(zip(*self._tokens(wanted), strict=True))
        told: list[Choices | DroppedRow] = []
        for listed, row in zip(jobs, rows, strict=True):
            if isinstance(listed, DroppedRow):
                told.append(listed)
            else:
                told.append(self._choices(row, [(label, job, *next(found)) for label, job in listed]))
        return told

    def prompt(self, row: Row) -> tuple[list[int], int]:
        """What stands before the answer, for generation, and the place of virtual tokens in it. Raises: DataError."""
        return self._asked(self.jobs.prompt(row), row.where)

    def asked(self, turns: Sequence[Any], where: str = "the conversation") -> tuple[list[int], int]:
        """As `prompt`, for a conversation that ends before an answer: (role, words) pairs or messages.

        Raises: UsageError where there is no chat template, DataError where it refuses the turns.
        """
        return self._asked(self.jobs.asked(Talk.of(turns, where), where), where)

    def prompt_ids(self, row: Row) -> list[int]:
        """The tokens before the answer."""
        return self.prompt(row)[0]

    # ---- one row

    def _tokens(self, jobs: Sequence[Job]) -> tuple[list[Tokens], list[list[int]]]:
        """The tokens of each job's words, and for each of its places the first token behind it."""
        tokens: list[Any] = [None] * len(jobs)
        heads: list[list[int]] = [[]] * len(jobs)
        for markup in (False, True):
            own = [n for n, job in enumerate(jobs) if job.markup == markup]
            texts, places = [jobs[n].text for n in own], [jobs[n].places for n in own]
            encoded = self.words.encode(texts, markup)
            for n, one, head in zip(own, encoded, self.words.heads(texts, encoded, places, markup), strict=True):
                tokens[n], heads[n] = one, head
        return tokens, heads

    def _examples(self, job: Job, tokens: Tokens, heads: list[int], row: Row) -> list[Example]:
        if self.template.kind == "text":
            return self._pieces(job, tokens.ids, row)
        lead = len(job.opening)
        ids = [*job.opening, *tokens.ids]
        spans = [(lead + heads[n], lead + heads[n + 1]) for n in range(0, job.spans * 2, 2)]
        if job.closed:
            ids += self.words.ended(tokens.ids)
            spans[-1] = (spans[-1][0], len(ids))
        system = lead + heads[-1] if job.system else self._opening(ids)
        return [self._fitted(ids, spans, row, system, (job, tokens))]

    def _pieces(self, job: Job, inner: list[int], row: Row) -> list[Example]:
        """All tokens of a text in rows of at most the maximal length, as even as can be; its end is in the last one."""
        inner = [*inner, *self.words.ended(inner)]
        room = max(1, self.max_length - len(job.opening))
        count = -(-len(inner) // room)
        edges = [n * len(inner) // count for n in range(count + 1)]
        found = []
        for piece in range(count):
            ids = (*job.opening, *inner[edges[piece] : edges[piece + 1]])
            self._check(ids, row.where)
            found.append(Example(ids, (True,) * len(ids), row.number + (piece << PIECE), 0, self._opening(ids)))
        return found

    def _choices(self, row: Row, listed: Sequence[tuple[str, Job, Tokens, list[int]]]) -> Choices | DroppedRow:
        """From each candidate's label, words and tokens."""
        _, first, tokens, heads = listed[0]
        head = min(heads[0] for _, _, _, heads in listed)
        words = tuple((label, tuple(tokens.ids[head:])) for label, _, tokens, _ in listed)
        if any(not ids for _, ids in words):
            said = f"{row.where}: a word of the verbalizer has no token of its own behind the prompt"
            raise DataError(said, "Choose other words, or end the template in a space or a sign.")
        whole = [*first.opening, *tokens.ids[:head]]
        longest = max(len(ids) for _, ids in words)
        if _one_begins_another([ids for _, ids in words]):  # the shorter would never score less
            end = tuple(self.words.ended([]))
            words = tuple((label, ids + end) for label, ids in words)
        ends = len(self.words.ended(tokens.ids)) if self.chat is None else 0
        room = self.max_length - max(longest + ends, self.fitting.reserve)
        kept, at = self.fitting.shortened(whole, max(room, min(1, len(whole))), first, tokens)
        if len(kept) + max(len(ids) for _, ids in words) > self.max_length:
            return DroppedRow(row.where, "answer too long", "Raise --max-length.")
        system = len(first.opening) + heads[-1] if first.system else self._opening(whole)
        virtual_at = self.fitting.placed(system, kept, len(whole), at)
        for _, ids in words:
            self._check((*kept, *ids), row.where)
        return Choices(tuple(kept), words, self.template.label_of(row), row.number, virtual_at)

    def _asked(self, job: Job, where: str) -> tuple[list[int], int]:
        tokens = self.words.opened(job.text, job.markup)
        (heads,) = self.words.heads([job.text], [tokens], [job.places], job.markup)
        ids = [*job.opening, *tokens.ids]
        if not ids:
            raise DroppedRow(where, "no text", "Give words to go on from.")
        kept, at = self.fitting.shortened(ids, self.max_length, job, tokens)
        self._check(kept, where)
        system = len(job.opening) + heads[-1] if job.system else self._opening(ids)
        return kept, self.fitting.placed(system, kept, len(ids), at)

    def _opening(self, ids: Sequence[int]) -> int:
        """Tokens that open every text."""
        if self.place != "after-system" or self.chat is not None or not ids:
            return 0
        return 1 if ids[0] in (self.words.bos, self.words.cls) else 0

    # ---- length

    def _fitted(
        self, ids: list[int], spans: list[tuple[int, int]], row: Row, system: int, source: tuple[Job, Tokens]
    ) -> Example:
        """Cut tokens in front of the first of the loss mask, so that the whole fits, and place the virtual tokens."""
        self._check(ids, row.where)
        head = spans[0][0] if spans else len(ids)
        own, kept, at = len(ids) - head, ids[:head], head
        if own < self.max_length < head + max(own, self.fitting.reserve):
            room = max(1, self.max_length - max(own, self.fitting.reserve))
            kept, at = self.fitting.shortened(kept, room, *source)
        cut = head - len(kept)
        mask = (False,) * (len(ids) - cut)
        for start, end in spans:
            mask = mask[: start - cut] + (True,) * (end - start) + mask[end - cut :]
        virtual_at = self.fitting.placed(system, kept, head, at)
        return Example((*kept, *ids[head:]), mask, row.number, cut, virtual_at)

    # ---- checks

    def _usable(self, found: list[Example], row: Row) -> list[Example] | DroppedRow:
        if any(len(example.ids) > self.max_length for example in found):
            return DroppedRow(row.where, "answer too long", "Raise --max-length.")
        kept = [e for e in found if (len(e.ids) > 1 and e.loss_mask[-1]) or True in e.loss_mask[1:]]
        return kept or DroppedRow(row.where, "nothing to learn")

    def _check(self, ids: Sequence[int], where: str) -> None:
        if self._beyond and self.table_size is not None and max(ids, default=0) >= self.table_size:
            said = f"{where}: the tokenizer makes token {max(ids)} of it, and the base knows {self.table_size}"
            raise DataError(f"{said}: tokenizer and base do not fit", "Name a base folder with its own tokenizer.")


def _one_begins_another(words: Sequence[tuple[int, ...]]) -> bool:
    """Whether one of some different words is the beginning of another."""
    ordered = sorted(set(words))
    return any(later[: len(one)] == one for one, later in itertools.pairwise(ordered))


def _tried(make: Callable[[Row], Any], row: Row) -> Any:
    try:
        return make(row)
    except DroppedRow as dropped:
        return dropped


def _one(found: Sequence[Any]) -> Any:
    if isinstance(found[0], DroppedRow):
        raise found[0]
    return found[0]
