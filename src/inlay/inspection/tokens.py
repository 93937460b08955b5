"""Virtual tokens and prefixes: which words they are near, how far they moved, how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.bank.adapter import Adapter, Part
from inlay.bank.bank import Bank
from inlay.errors import UsageError
from inlay.methods.virtual import token_table

from .spectra import effective_rank
from .words_near import CHANCE, Near, nearest, shown, similarity, values_of_words, words_table

__all__ = ["look_at_tokens", "token_parts", "vectors_of", "written_alone"]


def token_parts(adapter: Adapter) -> list[Part]:
    """The parts that put virtual tokens among a row's own, or keys before them."""
    return [part for part in adapter.parts if part.method.virtual_length or part.method.prefix_length]


@torch.no_grad()
def vectors_of(part: Part) -> Tensor:
    """All that each virtual token is, (n, d): its embedding, or its keys and values of all layers side by side."""
    shared = part.at("", None, {})
    if part.method.virtual_length:
        return part.method.virtual(shared).detach().float()
    pairs = [part.method.prefix(shared, site, index) for site, index in part.order.values()]
    return torch.cat([one.transpose(0, 1).flatten(1) for pair in pairs for one in pair], 1).detach().float()


@torch.no_grad()
def look_at_tokens(bank: Bank, part: Part, tokenizer: Any, start: Adapter | None) -> dict[str, Any]:
    """Nearest words, norms, how far each token moved from its `start` (||now - then|| / ||then||), the mean cosine
    between them, and how many equally strong directions they span (effective rank of their singular values).

    A prefix's words are those whose values in the first attention layer are nearest to its own there. `began` is the
    number of the word that a token was near at its start, None where it was near none. `random_cosine` is how near to a
    word vectors are that are none, in the mean.
    """
    vectors = vectors_of(part)
    prefix = not part.method.virtual_length
    before = _part_then(part, start, vectors)
    then = None if before is None else vectors_of(before)
    found: dict[str, Any] = {
        "kind": "prefix" if prefix else "embeddings", "method": part.method.title, "count": len(vectors),
        "similarity": similarity(vectors),
        "effective_number": effective_rank(torch.linalg.svdvals(vectors.double()).tolist()),
    }  # fmt: skip
    near, why = _near(bank, part, vectors, prefix)
    began = [] if before is None or then is None or not near else _near(bank, before, then, prefix)[0]
    found["no_words"] = why
    moved = None if then is None else (vectors - then).norm(dim=1) / then.norm(dim=1).clamp(min=1e-9)
    found["tokens"] = [
        {
            "index": n, "norm": float(vectors[n].norm()), "moved": None if moved is None else float(moved[n]),
            **({} if not near else _words(near[n], tokenizer)),
            **({} if not began else {"began": began[n].words[0] if began[n].chance <= CHANCE else None}),
        }
        for n in range(len(vectors))
    ]  # fmt: skip
    return found


def _words(near: Near, tokenizer: Any) -> dict[str, Any]:
    words = shown(tokenizer, near.words)
    pairs = [{"word": w, "id": i, "cosine": c} for w, i, c in zip(words, near.words, near.cosines, strict=True)]
    return {"nearest": pairs, "random_cosine": near.usual, "z": near.z, "chance": near.chance}


def _near(bank: Bank, part: Part, vectors: Tensor, prefix: bool) -> tuple[Sequence[Near], str]:
    """The nearest words of each token, or why there are none to say."""
    try:
        if not prefix:
            return nearest(vectors, words_table(bank.base, part.method.title)), ""
        site, index = next(iter(part.order.values()))
        values = part.method.prefix(part.at("", None, {}), site, index)[1].transpose(0, 1).flatten(1).float()
        with bank.alone():
            table = values_of_words(bank.base, site, token_table(bank.base, part.method.title.lower()).in_features)
        if table.shape[1] != values.shape[1]:
            raise UsageError("the base's values have another size than the prefix's", "Look at the scores instead.")
        return nearest(values, table), ""
    except UsageError as error:
        return [], error.what


def _part_then(part: Part, start: Adapter | None, now: Tensor) -> Part | None:
    """What the tokens began as; None where that is not known."""
    if start is None or part.index >= len(start.parts):
        return None
    other = start.parts[part.index]
    same = (other.method.virtual_length, other.method.prefix_length)
    if same != (part.method.virtual_length, part.method.prefix_length):
        return None
    return other if vectors_of(other).shape == now.shape else None


@torch.no_grad()
def written_alone(bank: Bank, name: str, tokenizer: Any, count: int = 16) -> str:
    """What the base writes, taking the likeliest token each time, when it sees the virtual tokens alone: behind one
    opening token, which every text needs."""
    model: Any = bank.model
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[opening or 0]], device=model.device)
    pad = tokenizer.pad_token_id or 0
    places = [1 if bank.adapters[name].virtual_length else 0]
    with bank.route([name], places=places):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1,
            pad_token_id=pad,
        )  # fmt: skip
    start = 0 if model.config.is_encoder_decoder else 1
    return tokenizer.decode(out[0, start:].tolist(), skip_special_tokens=True)
