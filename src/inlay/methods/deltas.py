"""What an adapter adds to parameters of the base itself: shapes of the differences, and the form that applies them.

A linear layer's weight may be meant in some `rows` or `columns` alone; its bias goes with the rows. Tables, norms and
parameters of experts are meant whole. A difference of zeros is the base as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import LinearForm, Site
from .linear import dense_form

__all__ = ["delta_form", "delta_shapes"]

Numbers = Sequence[int] | None


def delta_shapes(site: Site, rows: Numbers = None, columns: Numbers = None) -> dict[str, tuple[int, ...]]:
    """Of the differences by name, "weight" and, where the module has one that is meant, "bias": a weight (out, in) or
    its part, tables as they are (ids, width), (E, out, in) for experts, (width,) at norms."""
    if site.experts:
        return {"weight": (site.experts, site.out_features, site.in_features)}
    bias = isinstance(getattr(site.module, "bias", None), Tensor) and columns is None
    if site.kind == "norm":
        found = {"weight": (site.out_features,)}
    elif site.is_embedding:
        return {"weight": (site.in_features, site.out_features)}
    else:
        count = site.out_features if rows is None else len(rows)
        found = {"weight": (count, site.in_features if columns is None else len(columns))}
    return {**found, "bias": (found["weight"][0],)} if bias else found


def delta_form(
    site: Site, weight: Tensor, bias: Tensor | None, rows: Numbers = None, columns: Numbers = None
) -> LinearForm:
    """The form of a module whose parameters are changed by `weight` and `bias`, of the shapes of `delta_shapes`."""
    if site.experts:
        eye = torch.eye(site.out_features, dtype=weight.dtype, device=weight.device)
        return LinearForm(weight, eye.expand(site.experts, -1, -1))
    if site.kind == "norm":
        shift = None if bias is None else _own(site, "bias", bias) + bias
        return LinearForm(out_scale=_own(site, "weight", weight) + weight + site.offset, shift=shift)
    if site.is_embedding:
        eye = torch.eye(site.out_features, dtype=weight.dtype, device=weight.device)
        return LinearForm(_as_looked_up(site, weight).t(), eye, site.table_scale)
    if columns is not None:
        return LinearForm(_one_hot(columns, site.in_features, weight), weight)
    if rows is None:
        form = dense_form(weight)
        return LinearForm(form.down, form.up, shift=bias)
    if bias is not None:
        bias = bias.new_zeros(site.out_features).index_put((torch.tensor(rows, device=bias.device),), bias)
    return LinearForm(weight, _one_hot(rows, site.out_features, weight).t(), shift=bias)


def _own(site: Site, name: str, like: Tensor) -> Tensor:
    return getattr(site.module, name).detach().to(like.dtype)


def _as_looked_up(site: Site, table: Tensor) -> Tensor:
    """A table whose row of padding gets no gradient where the base's own gets none."""
    padding = getattr(site.module, "padding_idx", None)
    if padding is None or not table.requires_grad:
        return table
    return table.index_copy(0, torch.tensor([padding], device=table.device), table[padding : padding + 1].detach())


def _one_hot(numbers: Sequence[int], count: int, like: Tensor) -> Tensor:
    """(numbers, count), one in each row."""
    made = like.new_zeros(len(numbers), count)
    made[torch.arange(len(numbers)), torch.tensor(numbers)] = 1
    return made
