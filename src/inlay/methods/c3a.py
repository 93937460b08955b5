"""C3A: the change of a weight in circulant blocks, each of which is one trained row.

    y = W x + K x / in        each block of K is circulant: K_ij = k_(j - i mod b)

Paper: Chen et al. 2024, "Parameter-Efficient Fine-Tuning via Circular Convolution" (arXiv:2407.19342).

Shapes: k is (out / b, in / b, b). A block times its piece of x is their circular correlation, computed by FFT in
float32, or float64 where the base is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from inlay.errors import UsageError
from inlay.values import Count, Help, OneOf

from .common import check_named, check_patterns, patterned
from .contract import Layers, Params, Site, Targets, Tokens
from .linear import LAYERS, LinearMethod, merged_weight
from .peft_fields import Fields

__all__ = ["C3A"]

STARTS = ("xavier_uniform", "kaiming_uniform", "gaussian", "zeros")


@dataclass(frozen=True)
class C3A(LinearMethod):
    """Settings of C3A, by HF PEFT's names and defaults: `block_size` divides both sides of every weight,
    `block_size_pattern` maps a name or regular expression over the end of a module's path to its own. Of the starts
    that `init_weights` names, "zeros" alone leaves the base as it is. The learning rate is that of HF PEFT's run
    on MetaMathQA, and large since K is divided by `in`; a third of it did as well.
    """

    title = "C3A"
    paper = "arXiv:2407.19342"
    peft_type = "C3A"
    peft_bias = True
    lr = 0.3
    uncast = ("kernel",)  # few bits have no FFT
    peft_fields = Fields(
        read={
            "block_size": 256, "block_size_pattern": {}, "bias": "none", "target_modules": None,
            "modules_to_save": None, **LAYERS,
        },
        passed={"init_weights": "xavier_uniform"},
    )  # fmt: skip

    block_size: Annotated[Count, Help("size of a block, a divisor of both sides of every weight")] = 256
    targets: Targets = "all-linear"
    layers: Layers = None
    block_size_pattern: Annotated[Mapping[str, Count], Help("other sizes, by the end of a path")] = field(
        default_factory=dict
    )
    init_weights: Annotated[str, OneOf(STARTS, "init_weights"), Help("what the kernel starts at")] = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self, "block_size_pattern")

    def _size(self, site: Site) -> int:
        return int(patterned(self.block_size_pattern, site.path, self.block_size))

    def _shape(self, site: Site) -> tuple[int, int, int]:
        size = self._size(site)
        return site.out_features // size, site.in_features // size, size

    def check_fit(self, sites: Sequence[Site]) -> None:
        check_named(self, sites, "block_size_pattern")
        self._check_sizes(sites)

    def _check_sizes(self, sites: Sequence[Site]) -> None:
        for site in sites:
            common, size = math.gcd(site.out_features, site.in_features), self._size(site)
            if common % size:
                shape = f"({site.out_features}, {site.in_features})"
                what = f"C3A's block_size is {size}, which does not divide both sides of {site.path} {shape}"
                raise UsageError(what, f"Choose a divisor of {common}, or give it its own by block_size_pattern.")

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        self._check_sizes([site])
        kernel = torch.zeros(self._shape(site))
        if self.init_weights == "gaussian":
            kernel.normal_(generator=generator)
        elif self.init_weights != "zeros":
            fan = site.in_features if self.init_weights == "kaiming_uniform" else site.in_features + site.out_features
            bound = math.sqrt((1 if self.init_weights == "kaiming_uniform" else 6) / fan)
            kernel.uniform_(-bound, bound, generator=generator)
        return {"kernel": kernel}

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        kernel, size = params["kernel"], self._size(site)
        waves = torch.fft.rfft(x.to(kernel.dtype).reshape(len(x), -1, size))  # (tokens, in / b, b / 2 + 1)
        turned = torch.einsum("tnf,mnf->tmf", waves, torch.fft.rfft(kernel).conj())
        return y + (torch.fft.irfft(turned, size).flatten(1) / site.in_features).to(y.dtype)

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        kernel, size, weight = params["kernel"], self._size(site), site.weight()
        places = torch.arange(size, device=kernel.device)
        blocks = kernel[:, :, (places[None] - places[:, None]) % size]  # (out / b, in / b, b, b)
        delta = blocks.transpose(1, 2).reshape(weight.shape) / site.in_features
        return merged_weight(site, weight + delta.to(weight))

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"kernel": ("c3a_kernel", self._shape(site))}
