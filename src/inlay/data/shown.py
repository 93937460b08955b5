"""A row as the model gets it: tokens with their roles, which bear loss, what was cut, where virtual ones stand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .encode import Encoder, Example
from .table import Row

__all__ = ["Shown", "Token", "shown"]


@dataclass(frozen=True)
class Token:
    """`role` is system, user, assistant (or another of the conversation), prompt, answer, text, or virtual; `special`
    says that its words are markup of the tokenizer.
    """

    text: str
    id: int | None
    role: str
    learned: bool
    special: bool = False


@dataclass(frozen=True)
class Shown:
    """The tokens in their order, virtual ones in place; `cut` tokens of the prompt are left out before `cut_at`."""

    tokens: list[Token]
    cut: int
    cut_at: int
    dropped: str

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": [asdict(token) for token in self.tokens], "cut": self.cut, "dropped": self.dropped}


def shown(encoder: Encoder, row: Row, virtual: int = 0) -> Shown:
    """What becomes of `row`, with `virtual` tokens at the encoder's place. Raises: DataError as encoding does."""
    example = encoder.example(row)
    roles = _roles(encoder, row, example)
    special = set(encoder.tokenizer.all_special_ids) | set(encoder.tokenizer.get_added_vocab().values())
    texts = pieces(encoder.tokenizer, example.ids)
    tokens = [
        Token(text, id, role, learned, id in special)
        for text, id, role, learned in zip(texts, example.ids, roles, example.learned, strict=True)
    ]
    made = [Token(f"⟨v{n + 1}⟩", None, "virtual", False) for n in range(virtual)]
    tokens[example.place : example.place] = made
    at = _cut_at(encoder, row, example)
    return Shown(tokens, example.cut, at + (len(made) if at > example.place else 0), _dropped(encoder, example))


def pieces(tokenizer: Any, ids: tuple[int, ...]) -> list[str]:
    """Each token's words; tokens that are parts of one character are given as their bytes."""
    texts = []
    for id in ids:
        text = tokenizer.decode([id], clean_up_tokenization_spaces=False)
        if "\ufffd" in text or not text:
            text = f"⟨{tokenizer.convert_ids_to_tokens(id)}⟩"
        texts.append(text)
    return texts


def _roles(encoder: Encoder, row: Row, example: Example) -> list[str]:
    if encoder.template.kind == "text":
        return ["text"] * len(example.ids)
    if encoder.chat is None:
        return ["answer" if learned else "prompt" for learned in example.learned]
    rendered = encoder.chat.render(encoder.turns(row), row.where)
    missing = len(rendered.ids) - len(example.ids)
    return rendered.roles[missing:]  # what is cut is cut in front


def _cut_at(encoder: Encoder, row: Row, example: Example) -> int:
    """Where the tokens that are left out stood: the first place at which the whole goes on otherwise."""
    if not example.cut:
        return 0
    if encoder.template.kind == "text":
        return len(example.ids)
    whole = Encoder(encoder.tokenizer, encoder.template, 1 << 30).example(row)
    pairs = zip(whole.ids, example.ids, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(example.ids))


def _dropped(encoder: Encoder, example: Example) -> str:
    if len(example.ids) > encoder.max_length:
        return "answer too long"
    return "" if any(example.learned[1:]) else "nothing to learn"
