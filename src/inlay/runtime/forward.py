"""One forward over segments of many adapters: the logits that predict the tokens of each one's loss mask."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.bank.bank import Bank
from inlay.bases.heads import can_write
from inlay.batch.noise import NeftuneNoise, Noise
from inlay.batch.route import RowSpec
from inlay.data.encode import Example
from inlay.errors import UsageError

from .memory import TokenBudget

__all__ = ["Logits", "Segment", "answer_logits", "batches", "check_reads", "check_trainable", "token_losses"]


@dataclass(frozen=True)
class Segment:
    """An example and its route. In training: its label smoothing, NEFTune's alpha and seed, and the adapter's `step`.

    A `step` switches dropout on and names its masks; segments of one forward may be at different steps.
    """

    route: RowSpec
    example: Example
    smoothing: float = 0.0
    neftune: float = 0.0
    seed: int = 0
    step: int | None = None


def check_trainable(bank: Bank) -> None:
    """Raises: UsageError where the base does not write text."""
    if not can_write(bank.model):
        raise UsageError(f"{type(bank.model).__name__} does not write text", "Choose a causal or encoder-decoder base.")


def check_reads(bank: Bank, kind: str) -> None:
    """Raises: UsageError where the base does not write text, or reads prompts and rows of this `kind` have none."""
    check_trainable(bank)
    if kind == "text" and len(bank.base.stacks) == 2:
        what = f"{type(bank.model).__name__} reads a prompt and writes an answer, and rows of text have no prompt"
        raise UsageError(what, "Give prompt and completion, or text and label, or take a causal base.")


def batches(segments: Sequence[Segment], budget: TokenBudget) -> list[list[Segment]]:
    """Segments in groups of at most `budget.tokens` tokens (one segment at least), in their order."""
    groups: list[list[Segment]] = []
    left = 0
    for segment in segments:
        size = len(segment.example.ids)
        if not groups or size > left:
            groups.append([])
            left = budget.tokens
        groups[-1].append(segment)
        left -= size
    largest = max(groups, key=lambda group: sum(len(s.example.ids) for s in group), default=[])
    budget.largest = sum(len(s.example.ids) for s in largest), max(map(len, groups), default=0)
    return groups


def token_losses(bank: Bank, segments: Sequence[Segment]) -> list[Tensor]:
    """For each segment, the negative log-likelihoods (n,) in nats of the tokens in its loss mask, a first one left out.

    The base runs packed where it keeps segments apart, padded else. Raises: UsageError where some segments have a step
    and others none.
    """
    logits, labels, counts = answer_logits(bank, segments)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses: list[Tensor] = list(F.cross_entropy(wide, labels, reduction="none").split(counts))
    if any(segment.smoothing for segment in segments):
        rest = (-wide.log_softmax(-1).mean(-1)).split(counts)
        shares = [segment.smoothing for segment in segments]
        losses = [own + e * (other - own) for e, own, other in zip(shares, losses, rest, strict=True)]
    return losses


def answer_logits(bank: Bank, segments: Sequence[Segment]) -> Logits:
    """The logits that predict the tokens in each segment's loss mask; see `token_losses`."""
    noise = _noise(bank, segments)
    if bank.packs:
        return _packed(bank, segments, noise)
    return _encoded(bank, segments, noise) if len(bank.base.stacks) == 2 else _padded(bank, segments, noise)


def _noise(bank: Bank, segments: Sequence[Segment]) -> Noise | None:
    """Raises: UsageError where some segments have a step and others none."""
    steps = [segment.step for segment in segments if segment.step is not None]
    if not steps:
        return None
    if len(steps) != len(segments):
        raise UsageError("one forward holds segments in training and others", "Run them in forwards of their own.")
    neftune: list[NeftuneNoise | None] = []
    if any(segment.neftune for segment in segments):
        encoder = len(bank.base.stacks) == 2
        sizes = [max(_read(segment), 1) if encoder else len(segment.example.ids) for segment in segments]
        neftune = [
            NeftuneNoise(s.seed, s.neftune, size) if s.neftune else None
            for s, size in zip(segments, sizes, strict=True)
        ]
    return Noise(steps, [segment.example.sample for segment in segments], neftune)


def _read(segment: Segment) -> int:
    """The tokens that an encoder reads: those before the first one of the loss mask."""
    return segment.example.loss_mask.index(True)


Logits = tuple[Tensor, Tensor, list[int]]
"""Logits (n, vocabulary) that predict tokens of loss masks, those tokens (n,), and how many belong to each segment."""


def _packed(bank: Bank, segments: Sequence[Segment], noise: Noise | None) -> Logits:
    model: Any = bank.model
    ids = [token for segment in segments for token in segment.example.ids]
    places, labels, counts, start = [], [], [], 0
    for segment in segments:
        own = [n for n, bears_loss in enumerate(segment.example.loss_mask) if bears_loss and n]
        places += [start + n - 1 for n in own]
        labels += [segment.example.ids[n] for n in own]
        counts.append(len(own))
        start += len(segment.example.ids)
    device = model.device
    index = torch.tensor(places, device=device)
    lengths = [(segment.route, len(segment.example.ids)) for segment in segments]
    with bank.stream(lengths, kept=counts, noise=noise, **_lengths(segments)):
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits = model(input_ids=torch.tensor([ids], device=device), logits_to_keep=index).logits[0]
        else:
            logits = model(input_ids=torch.tensor([ids], device=device)).logits[0].index_select(0, index)
    return logits, torch.tensor(labels, device=device), counts


def _padded(bank: Bank, segments: Sequence[Segment], noise: Noise | None) -> Logits:
    model: Any = bank.model
    ids, mask = _rows([segment.example.ids for segment in segments], model.device)
    rows, places, labels, counts = [], [], [], []
    for row, segment in enumerate(segments):
        own = [n for n, bears_loss in enumerate(segment.example.loss_mask) if bears_loss and n]
        rows += [row] * len(own)
        places += [n - 1 for n in own]
        labels += [segment.example.ids[n] for n in own]
        counts.append(len(own))
    with bank.route([segment.route for segment in segments], noise=noise, **_lengths(segments)):
        logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[rows, places], torch.tensor(labels, device=model.device), counts


def _encoded(bank: Bank, segments: Sequence[Segment], noise: Noise | None) -> Logits:
    """The encoder reads the tokens before the first of the loss mask, an end alone where nothing does; the decoder
    writes the rest.
    """
    model: Any = bank.model
    heads = [_read(segment) for segment in segments]
    asked = [segment.example.ids[:head] or (_end(model),) for segment, head in zip(segments, heads, strict=True)]
    answers = [segment.example.ids[head:] for segment, head in zip(segments, heads, strict=True)]
    ids, mask = _rows(asked, model.device)
    start = model.config.decoder_start_token_id
    decoder, _ = _rows([(start, *answer[:-1]) for answer in answers], model.device)
    with bank.route([segment.route for segment in segments], noise=noise, **_lengths(segments)):
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
    pieces = [row[: len(answer)] for row, answer in zip(logits, answers, strict=True)]
    labels = torch.tensor([token for answer in answers for token in answer], device=model.device)
    return torch.cat(pieces), labels, [len(answer) for answer in answers]


def _end(model: Any) -> int:
    """The token that ends a text; encoders read nothing as a text that ends at once."""
    end = model.config.eos_token_id
    return int(end[0] if isinstance(end, list) else end or 0)


def _lengths(segments: Sequence[Segment]) -> dict[str, list[int]]:
    """Where virtual tokens stand in each segment, and how many of its tokens are its prompt: those before the first of
    the loss mask, or all where it has no prompt."""
    prompts = [(_read(s) if any(s.example.loss_mask) else 0) or len(s.example.ids) for s in segments]
    return {"places": [segment.example.virtual_at for segment in segments], "prompts": prompts}


def _rows(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, L) ids padded on the right with 0, and their mask."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences], device=device)
    lengths = torch.tensor([len(s) for s in sequences], device=device)[:, None]
    return ids, (torch.arange(longest, device=device)[None] < lengths).long()
