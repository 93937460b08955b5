"""What methods share that learn keys, values or embeddings of no real token: their number, and what they start as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.site import plain_call
from inlay.values import Help, OneOf

from .contract import Length, Method, Site, Structure

__all__ = ["NotNegative", "VirtualEmbeddings", "VirtualTokens", "network_start", "token_table"]

NotNegative = Annotated[int, Ge(0)]
Init = Annotated[str, OneOf(("random", "vocab", "text"), "init"), Help("what they start as")]
NAMES: Mapping[str, str] = {"RANDOM": "random", "SAMPLE_VOCAB": "vocab", "TEXT": "text"}
"""HF PEFT's names of starts, which are taken too."""


@dataclass(frozen=True)
class VirtualTokens(Method):
    """Settings: `num_virtual_tokens` of them, which start at random (`init` "random"), as random tokens of the base's
    table ("vocab"), or as those of `init_text`, repeated or cut to length ("text"); `init_ids` are the tokens of the
    text, for those who have no tokenizer at hand. HF PEFT's names of starts are taken too.
    """

    placed_by_settings = True
    whole_text: ClassVar[bool] = False
    """Whether the text has the special tokens that the tokenizer puts around one."""

    num_virtual_tokens: Annotated[Length, Help("how many stand before a row's own; 20 is usual")] = 20
    init: Init = "random"
    init_text: Annotated[str | None, Help("words that they start as, repeated or cut to length")] = None
    init_ids: Annotated[Sequence[NotNegative] | None, Help("the tokens of those words, without a tokenizer")] = None

    def __post_init__(self) -> None:
        if isinstance(self.init, str):
            object.__setattr__(self, "init", NAMES.get(self.init, self.init))
        super().__post_init__()
        if self.init_text is not None or self.init_ids is not None:
            object.__setattr__(self, "init", "text")
        elif self.init == "text":
            raise UsageError("init is 'text' but there is no text", "Give init_text.")

    def with_tokenizer(self, tokenizer: Any) -> Method:
        if self.init_text is None or self.init_ids is not None:
            return self
        ids = tokenizer(self.init_text, add_special_tokens=self.whole_text)["input_ids"]
        return replace(self, init_ids=tuple(ids))

    def start_ids(self, count: int, vocabulary: int, generator: torch.Generator) -> Tensor:
        """The tokens to start as, int64 (count,), of a table of `vocabulary` rows. Raises: UsageError."""
        drawn = torch.randint(vocabulary, (count,), generator=generator)
        if self.init != "text":
            return drawn
        if not self.init_ids:
            raise UsageError("init_text gives no tokens here", "Give other words, or init_ids.")
        if (highest := max(self.init_ids)) >= vocabulary:
            raise UsageError(f"init_ids holds {highest}", f"The base's table has rows 0 to {vocabulary - 1}.")
        return torch.tensor(list(self.init_ids)).repeat(-(-count // len(self.init_ids)))[:count]


def network_start(shapes: Mapping[str, tuple[tuple[int, ...], int]], generator: torch.Generator) -> dict[str, Tensor]:
    """Tensors of a network as torch starts them: for each its shape, and the number of inputs that bounds it."""
    bounds = {name: (shape, inputs**-0.5) for name, (shape, inputs) in shapes.items()}
    return {name: torch.empty(s).uniform_(-bound, bound, generator=generator) for name, (s, bound) in bounds.items()}


def token_table(base: Structure, title: str) -> Site:
    """The table that the ids of a base are looked up in. Raises: UsageError where there is none."""
    try:
        table: Any = base.stacks[0].get_input_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):
        table = None
    site = next((s for s in base.tables if s.module is table), None)
    if site is None:
        what = f"{title} needs a base whose {type(base.stacks[0]).__name__} names the table that embeds its token ids"
        raise UsageError(f"{what} (get_input_embeddings)", "Choose LoRA or prefix tuning.")
    return site


@dataclass(frozen=True)
class VirtualEmbeddings(VirtualTokens):
    """Those whose virtual tokens are embeddings, which are put among a row's own."""

    @property
    def virtual_length(self) -> int:
        return self.num_virtual_tokens

    def sites(self, base: Structure) -> list[Site]:
        return [replace(token_table(base, self.title.lower()), kind="tokens")]

    def start(self, rows: int, site: Site, generator: torch.Generator) -> Tensor:
        """What `rows` embeddings start as, float32 (rows, hidden); random ones have the size of the table's."""
        sample = self.start_ids(max(rows, 256), site.in_features, generator)
        table: Any = site.module
        looked_up = plain_call(table, {}, sample.to(table.weight.device)).detach().float().cpu()
        if self.init == "random":
            return torch.randn(rows, site.out_features, generator=generator) * looked_up.std()
        return looked_up[:rows].clone()
