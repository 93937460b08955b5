"""What a method is: the only thing the bank knows of it, and the only thing it knows of the bank.

A method is a frozen dataclass of its settings. It names the sites it acts on, makes the parameters of one site, and
computes that site's new input or output for ONE adapter; which rows belong to which adapter is not its concern.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Le
from torch import Tensor

from inlay.errors import UsageError
from inlay.sites.find import Structure
from inlay.sites.select import check_pattern, parse_layers, select_projections
from inlay.sites.site import Site
from inlay.values import Checked, Count, Help, Share

__all__ = [
    "Dropout",
    "Layers",
    "Length",
    "Method",
    "Params",
    "Site",
    "Structure",
    "Targets",
    "check_pattern",
    "parse_layers",
    "select_projections",
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


class Params(Mapping[str, Tensor]):
    """The parameters of one adapter at one site, by name; `params[name]` is in the dtype of the computation.

    `params.own(name)` is what is trained itself, for functions that cast it, and its gradient, on their own.
    `may_overwrite` says that nobody else needs the y that `output` gets, so that the result may be written into it;
    `frozen`, for methods with `takes_product`, is the weight (out, in) by which y came from x without a gradient.
    """

    dropper: Callable[[Tensor, float], Tensor] | None = None
    may_overwrite = False
    frozen: Tensor | None = None

    def __init__(self, values: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        self._values, self._dtype = values, dtype

    def __getitem__(self, name: str) -> Tensor:
        value = self._values[name]
        return value if self._dtype is None else value.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def own(self, name: str) -> Tensor:
        return self._values[name]

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout that is the same for a token wherever it stands in a batch; x itself outside of training."""
        return x if self.dropper is None or not p else self.dropper(x, p)


@dataclass(frozen=True)
class Method(Checked, ABC):
    """Base of every method; `title` and `paper` are shown to people.

    Its fields are its settings, checked when one is made (see `inlay.values`).
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    peft_type: ClassVar[str]
    """What HF PEFT calls the method in adapter_config.json."""
    shared_only: ClassVar[bool] = False
    """Whether all parameters are shared ones, so that a checkpoint names no module."""

    takes_product: ClassVar[bool] = False
    """Whether `output` can give x the gradient of the base's own product too, which saves a pass over it."""

    lr: ClassVar[float] = 1e-3
    """The learning rate to begin with, by benchmarks/learning_rates.py and the paper; see `usual_rate`."""

    @property
    def usual_rate(self) -> float:
        """The learning rate where nobody says one."""
        return self.lr

    @abstractmethod
    def sites(self, base: Structure) -> list[Site]:
        """The sites this method acts on. Raises UsageError where it cannot act on this base, and says why."""

    def check_fit(self, sites: Sequence[Site]) -> None:
        """Raises: UsageError where a new adapter of these settings would be out of proportion to `sites`."""

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh float32 parameters for one site; random numbers come from `generator` alone (on the CPU)."""
        return {}

    def changes_input(self, site: Site) -> bool:
        """Whether `input` is called at this site."""
        return False

    def input(self, params: Params, x: Tensor, site: Site) -> Tensor:
        """The input the base's module gets instead of x, of the same shape (..., in)."""
        return x

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """The output that leaves the site instead of y = base(x): x is (..., in), y and the result (..., out).

        At a sublayer, y is what attention or MLP gives and x the residual stream that y will be added to.
        """
        return y

    def inputs(self, params: Params, x: Tensor, site: Site) -> Tensor:
        """`input` for K adapters of these settings at once: parameters (K, ...), x and the result (K, ..., in)."""
        return torch.vmap(lambda own, x: self.input(Params(own), x, site))(dict(params), x)

    def outputs(self, params: Params, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """`output` for K adapters of these settings at once: parameters (K, ...), x (K, ..., in), y (K, ..., out)."""
        return torch.vmap(lambda own, x, y: self.output(Params(own), x, y, site))(dict(params), x, y)

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        """The module's parameters, by name and in its own layout, that make its plain forward equal to this adapter's.

        Raises: UsageError for methods that have no such parameters.
        """
        raise UsageError(f"{self.title} cannot be merged into the base", "Keep the adapter beside the base.")

    def rate(self, site: Site | None, key: str) -> float:
        """By what the learning rate is multiplied for the parameter `key` of `site` (None: a shared one)."""
        return 1.0

    # ---- attention and embedding sites: parameters that the sites of one adapter share

    @property
    def prefix_length(self) -> int:
        """Keys and values put before those of a sequence."""
        return 0

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

    def virtual(self, params: Params) -> Tensor:
        """Embeddings (n, hidden) of the tokens put before a sequence."""
        raise NotImplementedError

    def prepared(self, tokenizer: Any) -> Method:
        """This method with everything that only a tokenizer can say filled in."""
        return self

    def folded(self, params: Params, sites: Sequence[Site]) -> tuple[Method, Mapping[str, Tensor]]:
        """The method and shared parameters to save: what only training needed is multiplied out."""
        return self, params

    # ---- checkpoints

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For each parameter at `site`, the end of its key in an HF PEFT checkpoint and its shape there."""
        return {}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For each shared parameter of the folded method, its key and shape in an HF PEFT checkpoint."""
        return {}

    @abstractmethod
    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        """The fields of HF PEFT's config for this method at these sites, without `peft_type`."""

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> Method:
        """The method that an HF PEFT config describes, acting on the modules at `paths`.

        Raises: FormatError naming a field whose value has no equivalent here.
        """
