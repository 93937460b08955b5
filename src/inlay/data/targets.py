"""Rows for a head: their tokens, and the labels, numbers or tags that the head is to give for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from inlay.errors import DataError, DroppedRow, UsageError

from .encode import Encoder, Example
from .fields import blank, kind_of
from .jobs import Job
from .prepare import Examples, Prepared, prepare
from .rows import Row
from .template import Template

__all__ = [
    "HeadEncoder",
    "Targeted",
    "TargetedExamples",
    "encoder_of",
    "number_of",
    "prepare_targets",
    "tags_of",
    "words_of",
]


@dataclass(frozen=True)
class Targeted(Example):
    """An example with the `targets` of a head: the number of its label, a number, or for each token of its loss mask
    the number of its tag. None where the row has no answer."""

    targets: tuple[float, ...] = ()


class TargetedExamples(Examples):
    """`Examples` with targets: those of example i are `targets[target_ends[i - 1] : target_ends[i]]` (float64)."""

    def __init__(self, examples: Examples, targets: np.ndarray, target_ends: np.ndarray) -> None:
        super().__init__(*examples._flat, examples._ends, *examples._each, index=examples._index)
        self._targets, self._target_ends = targets, target_ends

    @property
    def targets(self) -> np.ndarray:
        """All targets of all examples, float64."""
        return self._targets

    @overload
    def __getitem__(self, item: int) -> Example: ...
    @overload
    def __getitem__(self, item: slice) -> Examples: ...
    def __getitem__(self, item: int | slice) -> Example | Examples:
        found = super().__getitem__(item)
        if isinstance(found, Examples):
            return found
        number = int(self._index[range(len(self))[item]])  # pyright: ignore[reportCallIssue, reportArgumentType]
        start, end = int(self._target_ends[number - 1]) if number else 0, int(self._target_ends[number])
        return Targeted(**vars(found), targets=tuple(self._targets[start:end].tolist()))

    def take(self, index: np.ndarray | Sequence[int]) -> Examples:
        return TargetedExamples(super().take(index), self._targets, self._target_ends)


class HeadEncoder(Encoder):
    """Encodes rows whose answer a head gives: the words before the answer, and what the tokenizer closes a text with.

    Rows that are too long lose the end of their text. Raises: as `Encoder`; UsageError where tags meet a tokenizer
    that does not say where its tokens stand.
    """

    def __init__(
        self, tokenizer: Any, template: Template, max_length: int, place: str = "start", limit: int | None = None,
        table_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, template, max_length, place, limit, table_size)
        self.fitting.labels = True  # of long rows the end goes
        self.labels = {label: n for n, label in enumerate(template.verbalizer)}
        if template.task == "tag" and self.words.core is None:
            raise UsageError("tags need a fast tokenizer", "Take a base with a tokenizer.json.")

    @property
    def room(self) -> int:
        """Tokens of a row before what the tokenizer closes texts with."""
        return max(1, self.max_length - len(self.words.closing))

    def drafts(self, rows: Sequence[Row]) -> list[list[Example] | DroppedRow]:
        return self.encode(rows)

    def answer(self, example: Example) -> str:
        """What a head should say of an example, in words."""
        targets = example.targets if isinstance(example, Targeted) else ()
        if self.template.task == "regress":
            return " ".join(map(str, targets))
        labels = list(self.labels)
        return " ".join(labels[int(target)] for target in targets)

    def encode(self, rows: Sequence[Row]) -> list[list[Example] | DroppedRow]:
        return [found if isinstance(found, DroppedRow) else [found] for found in self.targeted(rows)]

    def targeted(self, rows: Sequence[Row], answered: bool = True) -> list[Targeted | DroppedRow]:
        """What each row becomes, without targets where rows need not be `answered`.

        Raises: DataError naming a row whose answer is no label, number or list of tags.
        """
        make = self._tagged if self.template.task == "tag" else self._judged
        return make(rows, answered)

    # ---- one answer a row

    def _judged(self, rows: Sequence[Row], answered: bool) -> list[Targeted | DroppedRow]:
        answers = [_tried(lambda row: self._answer(row) if answered else (), row) for row in rows]
        jobs = [_tried(self._job, row) for row in rows]
        listed = zip(rows, answers, jobs, strict=True)
        bad = [next((one for one in (job, answer) if isinstance(one, DroppedRow)), None) for _, answer, job in listed]
        good = [n for n, why in enumerate(bad) if why is None]
        tokens, heads = self._tokens([jobs[n] for n in good])
        found: list[Targeted | DroppedRow] = [why or DroppedRow("", "") for why in bad]
        for n, own, head in zip(good, tokens, heads, strict=True):
            job = jobs[n]
            ids = [*job.opening, *own.ids]
            kept, at = self.fitting.shortened(ids, self.room, job, own)
            system = len(job.opening) + head[-1] if job.system else self._opening(ids)
            cut, place = len(ids) - len(kept), self.fitting.placed(system, kept, len(ids), at)
            found[n] = self._made(rows[n], kept, (), answers[n], cut, place)
        return found

    def _job(self, row: Row) -> Job:
        if self.template.wordless(row):
            raise DroppedRow(row.where, "no text")
        return self.jobs.prompt(row)

    def _answer(self, row: Row) -> tuple[float, ...]:
        if self.template.task == "regress":
            return (number_of(row, self.template.answer),)
        return (float(self.labels[self.template.label_of(row)]),)

    # ---- an answer for each word

    def _tagged(self, rows: Sequence[Row], answered: bool) -> list[Targeted | DroppedRow]:
        core: Any = self.words.core
        core.encode_special_tokens = True
        found: list[Targeted | DroppedRow] = []
        for row in rows:
            try:
                words = words_of(row, self.template.text)
                tags = tags_of(row, self.template.answer, len(words)) if answered else None
            except DroppedRow as dropped:
                found.append(dropped)
                continue
            encoded = core.encode(" ".join(words), add_special_tokens=False)
            firsts = _first_pieces(encoded, words)
            lead, ids = len(self.words.opening), [*self.words.opening, *encoded.ids[: self.room]]
            ids = ids[: self.room]
            cut = lead + len(encoded.ids) - len(ids)
            if None in firsts:
                word = words[firsts.index(None)]
                raise DataError(f"{row.where}: the tokenizer makes nothing of the word {word!r}", "Leave it out.")
            at = [(lead + first, n) for n, first in enumerate(firsts) if first is not None and lead + first < len(ids)]
            targets = () if tags is None else tuple(float(self._tag(tags[n], row)) for _, n in at)
            found.append(self._made(row, ids, [place for place, _ in at], targets, cut, 0))
        return found

    def _tag(self, tag: str, row: Row) -> int:
        if tag not in self.labels:
            raise DataError(f"{row.where} has the tag {tag!r}", f"Known are {', '.join(self.labels)}.")
        return self.labels[tag]

    def _made(
        self, row: Row, kept: Sequence[int], places: Sequence[int], targets: tuple[float, ...], cut: int, at: int
    ) -> Targeted | DroppedRow:
        ids = (*kept, *self.words.closing)
        if not kept or (self.template.task == "tag" and not places):
            return DroppedRow(row.where, "no text")
        self._check(ids, row.where)
        mask = [False] * len(ids)
        for place in places:
            mask[place] = True
        return Targeted(ids, tuple(mask), row.number, cut, at, targets)


def encoder_of(template: Template) -> type[Encoder]:
    """The encoder that rows of a template need."""
    return Encoder if template.task == "generate" else HeadEncoder


def prepare_targets(
    encoder: HeadEncoder, rows: Sequence[Row], on_progress: Callable[[int, int], None] | None = None
) -> Prepared:
    """As `prepare`, with the targets beside the examples. Raises: as `prepare`."""
    targets: list[float] = []
    ends: list[int] = []

    class Noting:
        def encode(self, rows: Sequence[Row]) -> list[list[Example] | DroppedRow]:
            found = encoder.encode(rows)
            for own in found:
                for example in () if isinstance(own, DroppedRow) else own:
                    targets.extend(example.targets if isinstance(example, Targeted) else ())
                    ends.append(len(targets))
            return found

    made = prepare(Noting(), rows, on_progress)
    listed = TargetedExamples(made.examples, np.array(targets, np.float64), np.array(ends, np.int64))
    return Prepared(listed, made.counts)


# ---- what columns hold


def number_of(row: Row, column: str) -> float:
    """The number in a row's column. Raises: DroppedRow where it is blank; DataError where it holds something else."""
    value = row.values.get(column)
    if blank(value):
        raise DroppedRow(row.where, "no number")
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        what = repr(value)[:40] if isinstance(value, str) else kind_of(value)
        raise DataError(f"{row.where}: column {column!r} holds {what}, no number", "Give numbers, or --task classify.")
    return found


def words_of(row: Row, column: str) -> list[str]:
    """The words of a row for tagging. Raises: DroppedRow where there are none; DataError where it is no list."""
    value = row.values.get(column)
    if value is None or value == []:
        raise DroppedRow(row.where, "no text")
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise DataError(f"{row.where}: column {column!r} holds no list of words", 'Write {"tokens": ["a", "b"]}.')
    if any(not word.strip() for word in value):
        raise DataError(f"{row.where}: column {column!r} holds an empty word", "Leave it out, with its tag.")
    return value


def tags_of(row: Row, column: str, words: int) -> list[str]:
    """The tags of a row's `words`. Raises: DroppedRow where there are none; DataError where they do not fit."""
    value = row.values.get(column)
    if value is None or value == []:
        raise DroppedRow(row.where, "no tags")
    if not isinstance(value, list) or any(isinstance(tag, (list, dict)) or tag is None for tag in value):
        raise DataError(f"{row.where}: column {column!r} holds no list of tags", 'Write {"tags": ["O", "B-PER"]}.')
    if len(value) != words:
        raise DataError(f"{row.where} has {words} words and {len(value)} tags", "Give one tag for each word.")
    return [str(tag) for tag in value]


def _first_pieces(encoded: Any, words: Sequence[str]) -> list[int | None]:
    """For each of the `words`, which a space parts, the number of its first token; None where it has none."""
    found, start = [], 0
    for word in words:
        pieces = (encoded.char_to_token(place) for place in range(start, start + len(word)))
        found.append(next((piece for piece in pieces if piece is not None), None))
        start += len(word) + 1
    return found


def _tried(make: Callable[[Row], Any], row: Row) -> Any:
    try:
        return make(row)
    except DroppedRow as dropped:
        return dropped
