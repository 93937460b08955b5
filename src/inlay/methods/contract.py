"""What a method is: the only thing the bank knows of it, and the only thing it knows of the bank.

A method is a frozen dataclass of its settings. It names the sites it acts on, makes the parameters of one site, and
says what they do there for ONE adapter: as a linear form, or by computing the site's new output. Which rows belong to
which adapter is not its concern, and how many adapters are computed together is not either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Le
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.parameters import select_experts, split_targets
from inlay.sites.site import Site
from inlay.sites.structure import Structure
from inlay.sites.targets import check_pattern, parse_layers, select_projections
from inlay.values import Checked, Count, Help, Share

from .around import Around, Probe, Values
from .form import BottleneckForm, LinearForm, merged
from .over import Over
from .peft_fields import Fields
from .token_view import Tokens

__all__ = [
    "BottleneckForm",
    "Dropout",
    "Layers",
    "Length",
    "LinearForm",
    "Method",
    "Params",
    "Probe",
    "Site",
    "Structure",
    "Targets",
    "Tokens",
    "Values",
    "check_pattern",
    "merged",
    "parse_layers",
    "select_experts",
    "select_projections",
    "split_targets",
]

Targets = Annotated[
    str | Sequence[str],
    Help("module names, a group (all-linear, attention, mlp, qv, qkv) or a regular expression over whole paths"),
]
Layers = Annotated[
    str | int | Sequence[int] | None,
    Help('blocks to keep: 5, "8-11", "0,3", "last 4", "first 2", [0, -1]; all where unset'),
]
Length = Annotated[Count, Le(4096)]
Dropout = Annotated[Share, Help("share of inputs that training drops; 0.05 to 0.2 where rows are few")]


Params = Mapping[str, Tensor]
"""What a method reads at one site of one adapter, by name, in the dtype of the computation: what is trained, what the
method's `constants` are, and what it `derive`d."""


@dataclass(frozen=True)
class Method(Checked, Around, Over, ABC):
    """Base of every method; `title` and `paper` are shown to people.

    Its fields are its settings, checked when one is made (see `inlay.values`).
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    peft_type: ClassVar[str]
    """What HF PEFT calls the method in adapter_config.json."""
    peft_fields: ClassVar[Fields | None] = None
    """The fields of that file; None for methods that HF PEFT does not have, whose fields are their settings."""
    placed_by_settings: ClassVar[bool] = False
    """Whether settings alone say the sites, so that no key of a checkpoint is needed to find them."""
    replaces: ClassVar[bool] = False
    """Whether the method computes a module anew, whatever acted there before: then it must come first in a chain."""
    untrained: ClassVar[frozenset[str]] = frozenset()
    """Names of parameters of its sites that belong to an adapter and are saved with it, but never trained."""
    whole_numbers: ClassVar[frozenset[str]] = frozenset()
    """Those of the `untrained` that are whole numbers (below 2^24), as which checkpoints hold them."""
    peft_bias: ClassVar[bool] = False
    """Whether HF PEFT's config of the method has a field `bias`, which says that biases of the base are trained too."""
    lr: ClassVar[float] = 1e-3
    """The learning rate to begin with, by benchmarks/learning_rates.py and the paper; see `usual_rate`."""

    @property
    def usual_rate(self) -> float:
        """The learning rate where nobody says one."""
        return self.lr

    @property
    def causal(self) -> bool:
        """Whether a token's state depends on that token and those before it alone: then prompts are read in pieces, and
        rows of one adapter share what they read of a common beginning."""
        return True

    def parts(self) -> list[Method]:
        """The methods that an adapter of this one is made of: itself, but for presets."""
        return [self]

    @abstractmethod
    def sites(self, base: Structure) -> list[Site]:
        """The sites this method acts on. Raises UsageError where it cannot act on this base, and says why."""

    def check_fit(self, sites: Sequence[Site]) -> None:
        """Raises: UsageError where a new adapter of these settings would be out of proportion to `sites`."""

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh float32 parameters for one site; random numbers come from `generator` alone (on the CPU)."""
        return {}

    def constants(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """What is seen at every site and not trained; adapters of equal settings share one copy."""
        return {}

    def derive(self, params: Params, site: Site | None) -> Params:
        """What follows from the parameters of one site (None: from the shared ones) and is worth computing once: once a
        forward in training, once for each version of the parameters else. It is added to `params`."""
        return {}

    def draw(self, params: Params, dropout: Callable[[Tensor, float], Tensor]) -> Params:
        """What training draws anew at each step for the shared `params`; `derive` finds it among them."""
        return {}

    # ---- linear, embedding and norm sites

    def form(self, params: Params, site: Site) -> LinearForm:
        """The method as a linear form: then nothing else has to be written for it to be computed and merged."""
        raise NotImplementedError

    @classmethod
    def has_form(cls) -> bool:
        return cls.has("form")

    @classmethod
    def has(cls, name: str) -> bool:
        """Whether the class says for itself what `name` is, a function of this contract."""
        return getattr(cls, name) is not getattr(Method, name)

    def scales_input(self, site: Site) -> bool:
        """Whether the form has an `in_scale` at this site."""
        return False

    def form_dropout(self) -> float:
        """The share of x that D does not see in training."""
        return 0.0

    # ---- sites of other kinds, and methods without a form

    def bottleneck(self, params: Params, site: Site) -> BottleneckForm | None:
        """The method as a bottleneck at a sublayer, if it is one: what `output` gives outside of training. Then many
        adapters are computed together where each has few tokens."""
        return None

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        """The output that leaves the site instead of y, for ONE adapter: x is (n, in), y and the result (n, out).

        At a sublayer, y is what attention or MLP gives and x the residual stream that y will be added to; at a block, y
        is the stream behind it and x the one before it.
        """
        raise NotImplementedError

    def input(self, params: Params, x: Tensor, site: Site, tokens: Tokens) -> Tensor:
        """What the module reads instead of x (n, in), for ONE adapter. A method that has it acts by it alone, and at
        most one acts on a module's input."""
        raise NotImplementedError

    def whole(self, params: Params, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """At a head: what the module gives instead, for the rows of this adapter alone."""
        raise NotImplementedError

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        """The module's parameters, by name and in its own layout, that make its plain forward equal to this adapter's.

        Raises: UsageError for methods that have no such parameters."""
        if not self.has_form():
            raise UsageError(f"{self.title} cannot be merged into the base", "Keep the adapter beside the base.")
        return merged([self.form(params, site)], site)

    def rate(self, site: Site | None, key: str) -> float:
        """By what the learning rate is multiplied for the parameter `key` of `site` (None: a shared one)."""
        return 1.0

    # ---- attention and embedding sites: parameters that the sites of one adapter share

    @property
    def prefix_length(self) -> int:
        """Keys and values put before those of a sequence."""
        return 0

    moves_positions: ClassVar[bool] = True
    """Whether a row's own positions are counted from behind its prefix."""

    @property
    def virtual_length(self) -> int:
        """Embeddings put before those of a sequence."""
        return 0

    def shared(self, sites: Sequence[Site], generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh float32 parameters that belong to no single site; random numbers come from `generator` alone."""
        return {}

    def prefix(self, params: Params, site: Site, index: int) -> tuple[Tensor, Tensor]:
        """Keys (heads, n, head_dim) and values (heads, n, value_dim) at the `index`-th attention site."""
        raise NotImplementedError

    def prefix_gates(self, params: Params, x: Tensor, site: Site, tokens: Tokens) -> Tensor:
        """By what the row of each token multiplies its keys and values, (n, 2), equal in a row; x is what attention
        reads, (n, in)."""
        raise NotImplementedError

    def virtual(self, params: Params) -> Tensor:
        """Embeddings (n, hidden) of the tokens put before a sequence."""
        raise NotImplementedError

    def with_tokenizer(self, tokenizer: Any) -> Method:
        """This method with everything that only a tokenizer can say filled in."""
        return self

    def export(self, params: Params, sites: Sequence[Site]) -> tuple[Method, Mapping[str, Tensor]]:
        """The method and shared parameters to save: what only training needed is multiplied out."""
        return self, params

    # ---- checkpoints

    def compacted(self, values: Values, sites: Sequence[Site]) -> tuple[Method, Values]:
        """The method and the parameters of its sites to save, which do the same in fewer or plainer ones."""
        return self, values

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For each parameter at `site`, the end of its key in an HF PEFT checkpoint and its shape there."""
        return {}

    def own_shape(self, name: str, value: Tensor) -> Tensor:
        """A parameter as it is here, from its value in a checkpoint."""
        return value

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For each shared parameter of the exported method, its key and shape in an HF PEFT checkpoint."""
        return {}

    def constant_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For each of the `constants` that a checkpoint holds, its key and shape there."""
        return {}

    def copied_keys(self, site: Site) -> dict[str, str]:
        """Ends of keys at `site` that a checkpoint may have beside those, with the constant, or the shared parameter,
        that each holds again."""
        return {}

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Whether an HF PEFT config describes this method; where a subclass claims it too, it is the subclass's."""
        return config.get("peft_type") == cls.peft_type

    def fields_beside(self, host: Method, sites: Sequence[Site]) -> Mapping[str, Any] | None:
        """The fields of the config of another method, `host`, that describe this one beside it (`bias`, for
        one), at whatever `sites`; None where no field does."""
        return None

    @classmethod
    def read_beside(cls, config: Mapping[str, Any], keys: Collection[str]) -> Method | None:
        """The method of this class that the config of another one describes in fields of its own, for a file of
        `keys` (without HF PEFT's root); None where it describes none.
        """
        return None

    def key_beside(self, key: str) -> str:
        """The key of a parameter where the method stands in another one's config, from the one that it has alone."""
        return key

    def beside_whole_base(
        self, config: Mapping[str, Any], values: Mapping[str, Mapping[str, Tensor]], sites: Sequence[Site]
    ) -> tuple[Method, Mapping[str, Mapping[str, Tensor]]]:
        """The method with its values at `sites`, read by an HF PEFT config, as they are beside the base as it is: for
        adapters that began inside of its weights. Raises: FormatError where they cannot be."""
        return self, values

    @abstractmethod
    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        """The fields of HF PEFT's config for this method at these sites, without `peft_type`."""

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Method:
        """The method that an HF PEFT config describes, acting on the modules at `paths`.

        Raises: FormatError naming a field whose value has no equivalent here.
        """
