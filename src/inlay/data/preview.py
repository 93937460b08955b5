"""Shows a row as the model gets it: tokens with their roles, which bear loss, what is cut, where virtual ones are."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inlay.errors import DroppedRow

from .encode import Encoder, Example
from .table import Row
from .targets import HeadEncoder

__all__ = ["PART", "PreviewRow", "Token", "pieces", "preview_row"]

PART = "·"
"""Stands for a token that is part of what the token before it shows whole."""
MOST = 16
"""Tokens at most that are looked at for one character."""
JOINING = "\u200d"


@dataclass(frozen=True)
class Token:
    """`role` is system, user, assistant (or another of the conversation), prompt, answer, text, or virtual; `special`
    says that its words are markup of the tokenizer, `part` that it is the rest of a character (or of a letter and its
    marks) that the first token of it shows whole.
    """

    text: str
    id: int | None
    role: str
    learned: bool
    special: bool = False
    part: bool = False


@dataclass(frozen=True)
class PreviewRow:
    """The tokens in their order, virtual ones in place; `cut` tokens of the prompt are left out before `cut_at`. A
    row that is `dropped` has the reason there, and no tokens where there is nothing to show. Of a text in several
    `pieces` the first. `answer` is what a head should say.
    """

    tokens: list[Token]
    cut: int
    cut_at: int
    dropped: str
    pieces: int = 1
    answer: str = ""

    def to_dict(self) -> dict[str, Any]:
        tokens = [asdict(token) for token in self.tokens]
        return {"tokens": tokens, "cut": self.cut, "dropped": self.dropped, "pieces": self.pieces} | (
            {"answer": self.answer} if self.answer else {}
        )


def preview_row(encoder: Encoder, row: Row, virtual: int = 0) -> PreviewRow:
    """What becomes of `row`, with `virtual` tokens at the encoder's place. Raises: DataError as encoding does."""
    (drafts,) = encoder.drafts([row])
    if isinstance(drafts, DroppedRow):
        return PreviewRow([], 0, 0, drafts.reason)
    example = drafts[0]
    special = {*encoder.tokenizer.all_special_ids, *encoder.tokenizer.get_added_vocab().values()}
    told = pieces(encoder.tokenizer, example.ids, special)
    roles = _roles(encoder, row, example)
    tokens = [
        Token(text, id, role, learned, id in special, part)
        for (text, part), id, role, learned in zip(told, example.ids, roles, example.loss_mask, strict=True)
    ]
    made = [Token(f"⟨v{n + 1}⟩", None, "virtual", False) for n in range(virtual)]
    tokens[example.virtual_at : example.virtual_at] = made
    cut, at = _cut(encoder, row, example)
    (kept,) = encoder.encode([row])
    dropped = kept.reason if isinstance(kept, DroppedRow) else ""
    answer = encoder.answer(example) if isinstance(encoder, HeadEncoder) else ""
    return PreviewRow(tokens, cut, at + (len(made) if at > example.virtual_at else 0), dropped, len(drafts), answer)


def pieces(tokenizer: Any, ids: Sequence[int], special: set[int] | None = None) -> list[tuple[str, bool]]:
    """Each token's words, and whether it is part of what a token before it shows: the bytes of a character, a
    letter's marks. Bytes that make no character are given as the tokenizer writes them.
    """
    known = special if special is not None else set(tokenizer.all_special_ids)
    found: list[tuple[str, bool]] = []
    first = start = 0
    while start < len(ids):
        end, text = _whole(tokenizer, ids, start, known)
        if found and _joins(text, found[first][0]) and ids[start] not in known and ids[first] not in known:
            found[first] = (found[first][0] + text, False)
            found += [(PART, True)] * (end - start)
        else:
            first = start
            found += [(text, False), *[(PART, True)] * (end - start - 1)]
        start = end
    return found


def _whole(tokenizer: Any, ids: Sequence[int], start: int, special: set[int]) -> tuple[int, str]:
    """The end of the shortest run of tokens from `start` that decodes to whole characters, and its words."""
    written = str(tokenizer.convert_ids_to_tokens(ids[start]))
    for end in range(start + 1, min(start + MOST, len(ids)) + 1):
        if end > start + 1 and (ids[end - 1] in special or ids[start] in special):
            break
        text = tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False)
        if text and "\ufffd" not in text:
            return end, " " + text if written.startswith("▁") and not text.startswith(" ") else text
    return start + 1, f"⟨{written}⟩"


def _joins(text: str, before: str) -> bool:
    """Whether `text` goes on with the sign before it: combining marks, and emoji that joiners or skin tones extend."""
    if before.endswith(JOINING):
        return True
    return bool(text) and (
        unicodedata.category(text[0])[0] == "M" or text[0] == JOINING or "\U0001f3fb" <= text[0] <= "\U0001f3ff"
    )


def _roles(encoder: Encoder, row: Row, example: Example) -> list[str]:
    if encoder.template.kind == "text":
        return ["text"] * len(example.ids)
    if encoder.chat is None:
        return ["answer" if learned else "prompt" for learned in example.loss_mask]
    talk = encoder.jobs.talk(row)
    rendered = encoder.chat.render(talk, row.where, turns=True)
    (tokens,) = encoder.words.encode([rendered.text], True)
    (heads,) = encoder.words.heads([rendered.text], [tokens], [[end for end, _ in rendered.turns]], True)
    roles: list[str] = []
    for end, (_, role) in zip(heads, rendered.turns, strict=True):
        roles += [role] * (end - len(roles))
    roles += [talk.messages[-1].role] * (len(tokens.ids) - len(roles))
    return roles[len(roles) - len(example.ids) :]  # what is cut is cut in front


def _cut(encoder: Encoder, row: Row, example: Example) -> tuple[int, int]:
    """How many tokens are left out, and where they stood: the first place at which the whole goes on otherwise."""
    if not example.cut:
        return 0, 0
    whole = copy.copy(encoder)
    whole.jobs = copy.copy(encoder.jobs)
    whole.max_length = whole.jobs.max_length = 1 << 30
    (drafts,) = whole.drafts([row])
    assert not isinstance(drafts, DroppedRow)
    pairs = zip(drafts[0].ids, example.ids, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), len(example.ids))
    return len(drafts[0].ids) - len(example.ids), at
