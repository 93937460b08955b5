"""Scales and shifts of adapters at one site while text is written, laid out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.batch.forward import Forward
from inlay.kernels.rows import Rows
from inlay.methods.contract import LinearForm, Site
from inlay.sites.site import bare

from .acting import Scope
from .slot_rows import count_of, picked_at, rows_of

__all__ = ["has_scales", "norm_act", "scalings"]


def has_scales(form: LinearForm) -> bool:
    """Whether a form does something beside its product."""
    return form.out_scale is not None or form.shift is not None


@dataclass(frozen=True, eq=False)
class _Scaling:
    """y, or what a `norm` with weights of one gives for x: times `scale`, plus `shift`, (n, width) or (width,)."""

    rows: Rows
    scale: Tensor | None
    shift: Tensor | None
    norm: nn.Module | None = None

    def __call__(self, y: Tensor, x: Tensor | None, forward: Forward) -> None:
        if self.norm is None:
            value = self.rows.take(y)
        else:
            assert x is not None
            value = self.norm(self.rows.take(x))
        value = value if self.scale is None else (value * self.scale).to(y.dtype)
        self.rows.put(y, value if self.shift is None else value + self.shift)


@dataclass(frozen=True, eq=False)
class _Everywhere:
    """The same in one kernel, over all rows: those that nobody changes have ones and zeros."""

    scale: Tensor | None
    shift: Tensor | None

    @classmethod
    def of(cls, own: _Scaling, vectors: int) -> _Everywhere:
        given = ((own.scale, 1.0), (own.shift, 0.0))
        return cls(*(None if value is None else _whole(value, own.rows, vectors, neutral) for value, neutral in given))

    def __call__(self, y: Tensor, x: Tensor | None, forward: Forward) -> None:
        if self.scale is not None and self.shift is not None:
            torch.addcmul(self.shift, y, self.scale, out=y)
        elif self.scale is not None:
            torch.mul(y, self.scale, out=y)
        elif self.shift is not None:
            torch.add(y, self.shift, out=y)


def _whole(value: Tensor, rows: Rows, vectors: int, neutral: float) -> Tensor:
    """(vectors, width) of the values of some rows."""
    whole = value.new_full((vectors, value.shape[-1]), neutral)
    rows.put(whole, value.expand(rows.count, -1))
    return whole


def scalings(scope: Scope, forms: Mapping[int, LinearForm], vectors: int) -> list[_Scaling] | list[_Everywhere]:
    """What the forms at a site do beside their products: one act, or none."""
    numbers = [number for number, form in forms.items() if has_scales(form)]
    made = [_scaling(scope, numbers, forms, vectors)] if numbers else []
    return [_Everywhere.of(own, vectors) for own in made] if picked_at(scope) else made


def _scaling(
    scope: Scope, numbers: list[int], forms: Mapping[int, LinearForm], vectors: int, norm: nn.Module | None = None
) -> _Scaling:
    scale, shift = (
        _stacked([(getattr(forms[n], name), count_of(scope, n, vectors)) for n in numbers], neutral)
        for name, neutral in (("out_scale", 1.0), ("shift", 0.0))
    )
    return _Scaling(rows_of(scope, numbers, vectors, forms), scale, shift, norm)


def _stacked(values: Sequence[tuple[Tensor | None, int]], neutral: float) -> Tensor | None:
    """Each value (width,) for its own number of rows; None where there are none."""
    there = [value for value, _ in values if value is not None]
    if not there or len(values) == 1:
        return there[0] if there else None
    like = max(there, key=lambda value: torch.finfo(value.dtype).bits)
    none = torch.full_like(like, neutral)
    return torch.cat([(none if value is None else value.to(like.dtype)).expand(n, -1) for value, n in values])


def norm_act(scope: Scope, site: Site, forms: Mapping[int, LinearForm], vectors: int) -> _Scaling:
    """The forms of a norm, which have no products: the base's formula runs once for all their rows."""
    return _scaling(scope, list(forms), forms, vectors, bare(site.module, site.neutral()))
