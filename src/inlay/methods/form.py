"""The linear form: what nearly every method is at a linear site, and how it is written into the base's weights; and the
form of a bottleneck at a sublayer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.errors import UsageError
from inlay.sites.site import Site, plain_call

__all__ = ["BottleneckForm", "LinearForm", "behind", "merged"]


@dataclass(frozen=True)
class LinearForm:
    """What nearly every method is at a linear site:

        y = a * (W (c * x) + bias + s * v * U (m * D (c * x))) + b

    `down` is D (r, in) and `up` U (out, r), both there or neither; `scale` is s, `middle` m (r,) and `outer` v (out,);
    `in_scale` is c (in,), `out_scale` a (out,) and `shift` b (out,). Each may be None, and then changes nothing. At an
    embedding, D's columns are looked up by token id; at a norm, y is what the norm gives with weights of one and no
    bias. At a parameter of E experts there are D (E, r, in) and U (E, out, r) alone, each expert with its own.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0
    middle: Tensor | None = None
    outer: Tensor | None = None
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    shift: Tensor | None = None

    def cast(self, dtype: torch.dtype | None) -> LinearForm:
        """The same, with the factors of its product in the dtype of the computation; as it is where that is None."""
        if dtype is None or self.down is None or self.up is None or self.down.dtype == self.up.dtype == dtype:
            return self
        return replace(self, down=self.down.to(dtype), up=self.up.to(dtype))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """m D (r, in) and v U (out, r), or None."""
        if self.down is None or self.up is None:
            return None
        down = self.down if self.middle is None else self.middle[:, None] * self.down
        return down, self.up if self.outer is None else self.outer[:, None] * self.up

    def product(self) -> Tensor | None:
        """s * v * U m D (out, in), or None."""
        found = self.factors()
        return None if found is None else found[1] @ found[0] * self.scale


@dataclass(frozen=True)
class BottleneckForm:
    """A small network beside a sublayer:

        y' = y + s (U act(D z + d) + u)

    `down` is D (r, hidden), `down_bias` d (r,), `up` U (hidden, r), `up_bias` u (hidden,) and `scale` s, a number or
    (1,). z is what it `reads`: the sublayer's "output" y, the residual "stream" x that y is added to, or the stream
    "behind" both: x + y, in a post-norm block behind its norm.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: Callable[[Tensor], Tensor]
    scale: Tensor | float = 1.0
    reads: Literal["output", "stream", "behind"] = "output"

    def read(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """z (n, hidden)."""
        if self.reads == "behind":
            return behind(x, y, site)
        return y if self.reads == "output" else x

    def added(self, z: Tensor) -> Tensor:
        """What is added to y, (n, hidden)."""
        made = F.linear(self.activation(F.linear(z, self.down, self.down_bias)), self.up, self.up_bias)
        return made if isinstance(self.scale, float) and self.scale == 1.0 else made * self.scale


def behind(x: Tensor, y: Tensor, site: Site) -> Tensor:
    """The stream behind a sublayer that gives y: x + y, in a post-norm block behind its norm."""
    return x + y if site.norm is None else plain_call(site.norm, {}, x + y)


def merged(forms: Sequence[LinearForm], site: Site) -> dict[str, Tensor]:
    """The weight and bias of `site` with chained forms written into them: each makes a (W + s v U m D) and a bias + b
    of what the one before it made; the input scales come last, since all see the scaled input.

    Raises: UsageError where a form has a shift and the module no bias to hold it.
    """
    if site.kind == "norm":
        return _merged_norm(forms[-1], site)  # each begins anew from the normalised input
    if site.experts:
        weight = sum((product for form in forms if (product := form.product()) is not None), site.weight())
        return {site.name: weight.mT if site.transposed else weight}
    weight, bias = site.weight(), getattr(site.module, "bias", None)
    first = bias.detach() if isinstance(bias, Tensor) else None
    bias = first
    for form in forms:
        product, scale = form.product(), form.out_scale
        if product is not None:
            weight = weight + (product.t() / site.table_scale if site.is_embedding else product)
        if scale is not None:
            weight = weight * (scale if site.is_embedding else scale[:, None])
            bias = None if bias is None else bias * scale
        if form.shift is not None:
            bias = form.shift if bias is None else bias + form.shift
    for form in forms:
        weight = weight if form.in_scale is None else weight * form.in_scale
    found = {"weight": weight.t().contiguous() if site.transposed else weight}
    if first is None and bias is not None and bool(bias.any()):
        raise UsageError(f"{site.path} has no bias that could hold the adapter's shift", "Keep the adapter beside it.")
    return found if first is None or bias is first or bias is None else {**found, "bias": bias}


def _merged_norm(form: LinearForm, site: Site) -> dict[str, Tensor]:
    """A norm's own weight is its scale less the `offset` that its formula adds."""
    found = {}
    if form.out_scale is not None:
        found["weight"] = form.out_scale - site.offset
    if form.shift is not None:
        found["bias"] = form.shift
    return found
