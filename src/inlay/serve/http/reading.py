"""What is asked of whole texts: the logprobs of prompts, and the labels of texts. It runs in the engine's thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from inlay.bank.bank import Bank
from inlay.data.encode import Example
from inlay.data.prompting import Prompting, prompt_row
from inlay.data.rows import Row
from inlay.data.targets import HeadEncoder
from inlay.errors import UsageError
from inlay.evaluation.head_predict import predicted_by_head
from inlay.evaluation.predict import Prediction, predicted_labels
from inlay.kernels.sampling import likeliest
from inlay.runtime.drawing import TokenLogprobs
from inlay.runtime.forward import Segment, answer_logits
from inlay.runtime.memory import TokenBudget

from .prompts import Prompt, Prompts

__all__ = ["groups", "labels_of", "prompt_logprobs"]

TOKENS = 2048
"""Tokens that are read between two steps of the engine, so that answers under way go on."""
TEXTS = 64
"""Texts that are classified between two steps."""


def groups(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts in groups of at most `TOKENS` tokens, one at least."""
    group: list[Prompt] = []
    left = TOKENS
    for prompt in prompts:
        if group and len(prompt.ids) > left:
            yield group
            group, left = [], TOKENS
        group.append(prompt)
        left -= len(prompt.ids)
    if group:
        yield group


@torch.no_grad()
def prompt_logprobs(bank: Bank, route: Any, prompts: Sequence[Prompt], best: int) -> list[list[TokenLogprobs | None]]:
    """For each token of each prompt the logarithm of its probability behind those before it, and the `best` likeliest;
    None for a first token. `route` has the names of the bank.

    Raises: UsageError where the base reads prompts and writes answers in two stacks: it gives prompts no probability.
    """
    if len(bank.base.stacks) == 2:
        raise UsageError("this base gives the tokens of prompts no probability", "Leave echo or logprobs out.")
    found: list[list[TokenLogprobs | None]] = [[None] for _ in prompts]
    long = [(n, prompt) for n, prompt in enumerate(prompts) if len(prompt.ids) > 1]
    if not long:
        return found
    segments = [
        Segment(route, Example(tuple(p.ids), (False, *(True,) * (len(p.ids) - 1)), 0, virtual_at=p.place))
        for _, p in long
    ]  # fmt: skip
    bank.model.eval()
    logits, labels, counts = answer_logits(bank, segments)
    split = zip(long, logits.split(counts), labels.split(counts), strict=True)
    for (number, _), rows, ids in split:
        chosen, scores, tokens = likeliest(rows, ids, best)
        for own, values, names in zip(chosen.tolist(), scores.tolist(), tokens.tolist(), strict=True):
            pairs = sorted(zip(names, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
            found[number].append(TokenLogprobs(own, tuple(pairs)))
    return found


def labels_of(
    bank: Bank, adapter: str, texts: Sequence[str | dict[str, str]], prompting: Prompting, prompts: Prompts
) -> list[Prediction]:
    """What an adapter makes of each text, cut to its length in training; `adapter` is its name in the bank. A head may
    give numbers or tags too.

    Raises: UsageError where it was not trained on labels.
    """
    template = prompting.template
    if template.kind != "label" and template.task == "generate":
        raise UsageError(f"the adapter was trained on {template.kind} rows, not on labels", "Ask for a completion.")
    own = bank.adapters[adapter]
    room = None if prompts.positions is None else prompts.positions - own.virtual_length - own.prefix_length
    encoder = prompts.encoder(prompting, room)
    rows = [_row(template, text, number) for number, text in enumerate(texts)]
    budget = TokenBudget(4 * TOKENS, device=next(bank.model.parameters()).device)
    bank.model.eval()
    if isinstance(encoder, HeadEncoder):
        return predicted_by_head(bank, encoder, rows, adapter, budget)
    return predicted_labels(bank, encoder, rows, adapter, budget)


def _row(template: Any, text: str | dict[str, str], number: int) -> Row:
    where = f"text {number}"
    if template.task == "tag":  # spaces part the words that get a tag each
        words = text.get(template.text, "") if isinstance(text, dict) else text
        return Row({template.text: words.split()}, number, where, number + 1)
    if isinstance(text, dict):
        return Row(dict(text), number, where, number + 1)
    made = prompt_row(template, text, where)
    return Row(made.values, number, where, number + 1)
