"""What a run learns: text, or what a head gives. The loop asks a task for losses, and knows nothing else of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.bank.bank import Bank
from inlay.batch.noise import NeftuneNoise, Noise
from inlay.data.encode import Example
from inlay.data.targets import Targeted
from inlay.data.template import Template
from inlay.errors import UsageError
from inlay.methods.contract import Method
from inlay.methods.head import ModulesToSave

from .forward import Segment, check_trainable, token_losses

__all__ = ["GENERATE", "Generate", "HeadTask", "Task", "head_outputs", "task_of"]

SLACK = 1.25
"""How much longer than the mean the longest row of one padded forward may be."""


class Task(ABC):
    """How examples bear loss."""

    name: str

    @abstractmethod
    def check(self, bank: Bank) -> None:
        """Raises: UsageError where the base cannot do the task."""

    def methods(self, method: Any) -> list[Method]:
        """The parts of an adapter that is trained by `method`, or by several."""
        return list(method) if isinstance(method, Sequence) else [method]

    @abstractmethod
    def count(self, example: Example) -> int:
        """How many losses an example has."""

    @abstractmethod
    def losses(self, bank: Bank, segments: Sequence[Segment]) -> list[Tensor]:
        """For each segment its losses (n,); a step's loss is their mean over all examples of an adapter."""


class Generate(Task):
    """The tokens of a loss mask are predicted, each from those before it; losses in nats."""

    name = "generate"

    def check(self, bank: Bank) -> None:
        check_trainable(bank)

    def count(self, example: Example) -> int:
        return sum(example.loss_mask[1:])

    def losses(self, bank: Bank, segments: Sequence[Segment]) -> list[Tensor]:
        return token_losses(bank, segments)


class HeadTask(Task):
    """A head gives a row's label ("classify"), a number ("regress") or a tag for each token of the loss mask ("tag").

    Losses are nats, for numbers squared errors. Each adapter has its own copy of the modules `saved`.
    """

    def __init__(self, name: str, saved: Sequence[str] | None = None) -> None:
        self.name, self.saved = name, saved

    def methods(self, method: Any) -> list[Method]:
        listed = super().methods(method)
        if any(type(one).whole is not Method.whole for one in listed):
            return listed  # a head of its own is what is trained
        return [*listed, ModulesToSave(self.saved)]

    def check(self, bank: Bank) -> None:
        if not bank.base.heads:
            raise UsageError(
                f"{type(bank.model).__name__} has no head for the task {self.name}", "Use --task generate."
            )

    def count(self, example: Example) -> int:
        return len(example.targets) if isinstance(example, Targeted) else 0

    def losses(self, bank: Bank, segments: Sequence[Segment]) -> list[Tensor]:
        outputs = head_outputs(bank, segments, self.name)
        return [self._loss(own, segment) for own, segment in zip(outputs, segments, strict=True)]

    def _loss(self, output: Tensor, segment: Segment) -> Tensor:
        assert isinstance(segment.example, Targeted)
        wide = output if output.dtype == torch.float64 else output.float()
        targets = torch.tensor(segment.example.targets, dtype=wide.dtype, device=wide.device)
        if self.name == "regress":
            return (wide[:, 0] - targets).square()
        return F.cross_entropy(wide, targets.long(), reduction="none", label_smoothing=segment.smoothing)


GENERATE = Generate()


def task_of(template: Template, bank: Bank, fresh: Sequence[str] = ()) -> Task:
    """The task that a template's rows are for. Adapters save the base's heads, and the modules `fresh`, which were
    drawn at random when the base was opened."""
    if template.task == "generate":
        return GENERATE
    heads = [site.path for site in bank.base.heads]
    inside = tuple(f"{head}." for head in heads)
    return HeadTask(template.task, [*heads, *(p for p in fresh if p not in heads and not p.startswith(inside))])


def head_outputs(bank: Bank, segments: Sequence[Segment], task: str) -> list[Tensor]:
    """What the base's head, or that of each segment's adapter, gives: (1, outputs) for a row, and for tags (n, labels)
    for the n tokens of the loss mask. Rows of like length run together, padded on the right."""
    found: dict[int, Tensor] = {}
    for group in _alike([len(segment.example.ids) for segment in segments]):
        rows = [segments[n] for n in group]
        logits = _padded(bank, rows)
        for n, segment, own in zip(group, rows, logits, strict=True):
            places = [k for k, bears in enumerate(segment.example.loss_mask) if bears]
            found[n] = own[places] if task == "tag" else own[None]
    return [found[n] for n in range(len(segments))]


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows in groups of like length."""
    groups: list[list[int]] = []
    total = 0
    for n in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        if not groups or lengths[n] * (len(groups[-1]) + 1) > SLACK * (total + lengths[n]):
            groups.append([])
            total = 0
        groups[-1].append(n)
        total += lengths[n]
    return groups


def _padded(bank: Bank, segments: Sequence[Segment]) -> Tensor:
    model: Any = bank.model
    longest = max(len(segment.example.ids) for segment in segments)
    pad = model.config.get_text_config().pad_token_id or 0
    ids = torch.tensor([[*s.example.ids, *[pad] * (longest - len(s.example.ids))] for s in segments])
    lengths = torch.tensor([len(s.example.ids) for s in segments])[:, None]
    mask = (torch.arange(longest)[None] < lengths).long()
    places = [segment.example.virtual_at for segment in segments]
    with bank.route([segment.route for segment in segments], noise=_noise(segments), places=places):
        return model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits


def _noise(segments: Sequence[Segment]) -> Noise | None:
    steps = [segment.step for segment in segments if segment.step is not None]
    if len(steps) not in (0, len(segments)):
        raise UsageError("one forward holds segments in training and others", "Run them in forwards of their own.")
    neftune: list[NeftuneNoise | None] = []
    if any(segment.neftune for segment in segments):
        neftune = [NeftuneNoise(s.seed, s.neftune, len(s.example.ids)) if s.neftune else None for s in segments]
    return Noise(steps, [segment.example.sample for segment in segments], neftune) if steps else None
