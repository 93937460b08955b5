"""Where virtual tokens collide with a template: before BOS, inside what it writes around a turn, at its system turn.

A prompt is learned where it stands. In a place that no text of the base's training had, or in one that is another place
in use, it learns less than it could; nothing else tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from inlay.errors import DataError, DroppedRow

from .chat import Chat
from .encode import Encoder, Example
from .messages import Talk
from .table import Row

__all__ = ["LOOKED_AT", "Collision", "collisions"]

LOOKED_AT = 64
"""Rows at most that are looked at."""
SHOWN = 40
"""Characters at most of a template's words in a warning."""
SYSTEM = re.compile(r"[\s<|\[#*]*sys(?:tem)?\s*(?:[\]>|*]+.*|:.*)?", re.IGNORECASE)
"""A line that opens a system turn."""
ANSWER, SYSTEM_PLACE = "--virtual-tokens-at before-answer", "--virtual-tokens-at after-system"
Found = tuple[str, str, str]
"""Kind, what is wrong, and what helps."""


@dataclass(frozen=True)
class Collision:
    """In `rows` of the `seen` rows that were looked at, `where` first, `what` is so; `remedy` says what to do."""

    kind: str
    rows: int
    seen: int
    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        share = "" if self.rows == self.seen else f" (in {self.rows} of {self.seen} rows, first in {self.where})"
        return f"{self.what}{share}. {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def collisions(encoder: Encoder, rows: Sequence[Row], virtual: bool = True) -> list[Collision]:
    """What is wrong with where the encoder puts virtual tokens in the first of `rows`, each kind once, with what the
    first such row shows; without `virtual` tokens only what is wrong with the system turn itself.

    Raises: DataError as encoding does.
    """
    rows = rows[:LOOKED_AT]
    drafts = encoder.drafts(rows)
    pairs = [(row, one[0]) for row, one in zip(rows, drafts, strict=True) if not isinstance(one, DroppedRow)]
    found: dict[str, list[tuple[Row, Found]]] = {}
    for row, example in pairs:
        for one in _of_row(encoder, row, example, virtual):
            found.setdefault(one[0], []).append((row, one))
    return [
        Collision(kind, len(listed), len(pairs), listed[0][0].where, *listed[0][1][1:])
        for kind, listed in found.items()
    ]


def _of_row(encoder: Encoder, row: Row, example: Example, virtual: bool) -> Iterator[Found]:
    chat, talk = encoder.chat, None if encoder.chat is None else encoder.jobs.talk(row)
    if chat is None or talk is None:
        if virtual:
            yield from _among_tokens(encoder, example, None)
        return
    layout = _Layout.of(chat, talk, row.where)
    yield from _repeated(layout)
    if virtual:
        yield from _among_tokens(encoder, example, layout)
        yield from _in_talk(encoder.place, layout)


# ---- by tokens


def _among_tokens(encoder: Encoder, example: Example, layout: _Layout | None) -> Iterator[Found]:
    """What the tokens on both sides of the place say."""
    ids, at, words = example.ids, example.virtual_at, encoder.words
    opens = [one for one in (words.bos, words.cls) if one is not None]
    if not ids:
        return
    if not at and ids[0] in opens:
        what = f"virtual tokens stand before {_token(encoder, ids[0])}, with which texts of this base begin"
        behind = layout is None and not encoder.jobs.authored and ids[0] not in ids[1:]
        remedy = f"{SYSTEM_PLACE} puts them behind it." if behind else f"Try {_other(layout)}."
        yield "before-bos", what, remedy
    elif at == 1 and ids[0] in opens and len(ids) > 1:
        control = encoder.tokenizer.decode([ids[1]]).strip() in words.controls.names
        if control:
            both = f"{_token(encoder, ids[0])} and {_token(encoder, ids[1])}"
            yield "outside-turns", f"virtual tokens stand between {both}, outside of every turn", f"Try {ANSWER}."
        elif ids[0] in ids[1:] and layout is None:
            what = f"virtual tokens stand behind {_token(encoder, ids[0])}, inside what opens the first turn"
            yield "inside-control", what, f"Try {ANSWER}, or give the rows as messages."
    if 0 < at < len(ids) and encoder.template.kind != "text" and example.loss_mask[at - 1] and example.loss_mask[at]:
        yield "inside-answer", "virtual tokens stand inside an answer", f"Try {ANSWER}."


def _token(encoder: Encoder, id: int) -> str:
    return repr(str(encoder.tokenizer.convert_ids_to_tokens(id)))


def _other(layout: _Layout | None) -> str:
    """Another place than the start."""
    if layout is not None and layout.system == 0:
        return SYSTEM_PLACE
    if layout is not None and layout.learned > 1:
        return f"{SYSTEM_PLACE}, with a system message in every row"
    return ANSWER


# ---- by words


@dataclass(frozen=True)
class _Layout:
    """A conversation as `text`; `spans` are the characters of each message's words in it, None where they are not there
    as they are. `behind_system` is where the template ends its system turn, `answer` where the first answer begins."""

    chat: Chat
    talk: Talk
    text: str
    spans: Sequence[tuple[int, int] | None]
    behind_system: int
    answer: int

    @classmethod
    def of(cls, chat: Chat, talk: Talk, where: str) -> _Layout:
        rendered = chat.render(talk, where, system=True)
        spans: list[tuple[int, int] | None] = []
        cursor = 0
        for message in talk.messages:
            words = chat.controls.plain(message.spoken.strip())
            at = rendered.text.find(words, cursor) if words else -1
            spans.append(None if at < 0 else (at, at + len(words)))
            cursor = max(cursor, at + len(words)) if at >= 0 else cursor
        first = rendered.answers[0][0] if rendered.answers else len(rendered.text)
        return cls(chat, talk, rendered.text, spans, rendered.system, first)

    @property
    def system(self) -> int | None:
        """The number of the first message where that is the system's."""
        return 0 if self.talk.messages[0].role == "system" else None

    @property
    def learned(self) -> int:
        """How many answers bear loss."""
        return sum(message.role == "assistant" and message.learned for message in self.talk.messages)

    def gaps(self) -> list[str]:
        """What the template writes before, between and behind the messages' words."""
        edges = [0, *(edge for span in self.spans if span is not None for edge in span), len(self.text)]
        return [self.text[edges[n] : edges[n + 1]] for n in range(0, len(edges), 2)]

    def next_words(self, place: int) -> int | None:
        """Where the next message's words begin behind `place`."""
        return next((span[0] for span in self.spans if span is not None and span[0] >= place), None)


def _repeated(layout: _Layout) -> Iterator[Found]:
    """A system turn that the template writes more than once, or besides the row's own."""
    own = sum(message.role == "system" for message in layout.talk.messages)
    controls = layout.chat.controls.meant
    opened = sum(
        SYSTEM.fullmatch(line.strip()) is not None
        for gap in layout.gaps() for line in controls.sub(lambda m: f"\n{m[0]}\n", gap).splitlines() if line.strip()
    )  # fmt: skip
    words = [layout.chat.controls.plain(m.spoken.strip()) for m in layout.talk.messages]
    first = words[0] if layout.system == 0 else ""
    copies = layout.text.count(first) - sum(said.count(first) for said in words) if first else 0
    if max(opened - max(own, 1), copies) > 0:
        times = max(opened, own + copies)
        whose = "the row's system turn" if own else "a system turn of its own"
        what = f"the template writes {whose} {times} times in one conversation" if not own or copies > 0 else (
            f"the template writes a system turn of its own besides the row's: {times} in one conversation"
        )  # fmt: skip
        yield "system-repeated", what, "Use a template that writes it once: --template file.jinja."
    elif own > 1:
        what = f"the row has {own} system turns, and only the first of them is the place called after-system"
        yield "several-system-turns", what, "Keep one system turn in a row."


def _in_talk(place: str, layout: _Layout) -> Iterator[Found]:
    """What the turns say of the place."""
    if place == "before-answer":
        if layout.learned > 1:
            what = "virtual tokens stand before the first of several answers in training, before the next answer in use"
            other = SYSTEM_PLACE if layout.system == 0 else "--virtual-tokens-at start"
            yield "several-answers", what, f"Give one row for each answer, or try {other}."
        yield from _inside_header(layout, layout.answer)
    elif place == "after-system":
        yield from _after_system(layout)


def _after_system(layout: _Layout) -> Iterator[Found]:
    at, span = layout.behind_system, layout.spans[0]
    if layout.system is None:
        behind = _short(layout.text[: layout.next_words(0) or SHOWN])
        what = f"a row without a system turn has its virtual tokens at the start, before {behind}"
        instead = "" if layout.learned > 1 else f", or try {ANSWER}"
        yield "no-system-turn", what, f"Begin rows with a system message{instead}."
    elif span is not None and at < span[1]:
        where = "before" if at <= span[0] else "inside"
        what = f"the template does not end its system turn by itself: virtual tokens stand {where} the system's words"
        yield "system-missed", what, f"Try {ANSWER}."
    elif _folded(layout):
        what = "the template writes the system's words into the user's turn, and virtual tokens stand inside that turn"
        yield "inside-turn", what, f"Try {ANSWER}."
    else:
        yield from _inside_header(layout, at)


def _folded(layout: _Layout) -> bool:
    """Whether the system's words stand behind what opens a user's turn."""
    asked = tuple(message for message in layout.talk.messages if message.role != "system")
    rest, span = replace(layout.talk, messages=asked), layout.spans[0]
    if span is None or not asked:
        return False
    try:
        text = layout.chat.text(rest)
    except DataError:  # it wants a system turn
        return False
    words = layout.chat.controls.plain(rest.messages[0].spoken.strip())
    head = text[: max(0, text.find(words))]
    bos = str(layout.chat.tokenizer.bos_token or "")
    return bool(head.removeprefix(bos).strip()) and layout.text[: span[0]].startswith(head.rstrip())


def _inside_header(layout: _Layout, place: int) -> Iterator[Found]:
    """Words of the template that belong to the control token right before the place."""
    before, nearest = layout.text[:place], layout.next_words(place)
    opened = [match for match in layout.chat.controls.meant.finditer(before) if not before[match.end() :].strip()]
    if not opened or nearest is None or before[opened[-1].end() :].strip(" ") != "":
        return
    said = any(span is not None and not layout.text[span[1] : opened[-1].start()].strip() for span in layout.spans if
               span is not None and span[1] <= opened[-1].start())  # fmt: skip
    lead = layout.text[place:nearest]
    if said or not lead.strip() or layout.chat.ends.meant.match(lead.lstrip()):
        return
    what = f"virtual tokens stand inside what opens a turn, between {opened[-1][0]!r} and {_short(lead)}"
    yield "inside-control", what, "Use a template whose generation prompt is whole: --template file.jinja."


def _short(words: str) -> str:
    shown = words.strip()
    return repr(shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…")
