"""Weights of the base that lie in an adapter's file: HF PEFT saves those of tables and heads, which may be trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from inlay.errors import FormatError
from inlay.methods.contract import Site, Structure
from inlay.methods.head import ModulesToSave

from .names import layers
from .parts import ROOT
from .tensors import check_numbers

__all__ = ["check_shape", "taken_weights"]

Values = dict[str, dict[str, Tensor]]


def taken_weights(
    stored: dict[str, Tensor], base: Structure, where: str, had: Collection[str] = ()
) -> tuple[ModulesToSave, Values] | None:
    """Take the base's own weights out of `stored`: those that differ from the base's, by the modules that have them;
    None where all are the same.

    A weight that modules share (tied tables and heads) is one of each, but for those of `had`, which other parts have.
    Raises: FormatError naming a weight that does
    not fit, cannot be compared, or belongs to a module that cannot be an adapter's own.
    """
    plain = layers(base)
    if all(key.removeprefix(ROOT).rpartition(".")[0].rpartition(".")[0] in plain for key in stored):
        return None
    parameters = {name: p.detach() for name, p in base.model.named_parameters(remove_duplicate=False)}
    others = dict(base.model.named_buffers(remove_duplicate=False))
    changed: dict[str, Tensor] = {}
    for name in [key.removeprefix(ROOT) for key in stored]:
        if name in others and name not in parameters:
            del stored[ROOT + name]  # what a base computes for itself
        if name not in parameters:
            continue
        value, own = stored.pop(ROOT + name), parameters[name]
        check_shape(name, tuple(value.shape), tuple(own.shape), base, where)
        check_numbers(name, value, where)
        if not _equal(name, value, own, where):
            changed[name] = value
    return _saved(changed, parameters, base, had) if changed else None


def _saved(
    changed: Mapping[str, Tensor], parameters: Mapping[str, Tensor], base: Structure, had: Collection[str]
) -> tuple[ModulesToSave, Values]:
    shared: dict[int, list[str]] = {}
    for name in parameters:
        shared.setdefault(id(base.model.get_parameter(name)), []).append(name)
    new = {other: v for name, v in changed.items() for other in shared[id(base.model.get_parameter(name))]}
    new = {name: value for name, value in {**new, **changed}.items() if name not in had}
    values: Values = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in new):
        module = base.model.get_submodule(path)
        values[path] = {
            name: new.get(f"{path}.{name}", parameters[f"{path}.{name}"]) for name, _ in module.named_parameters()
        }
    return ModulesToSave(targets=list(values)), values


def _equal(name: str, value: Tensor, own: Tensor, where: str) -> bool:
    """Whether both are one weight: in the coarser of their dtypes, since bases are loaded in another one than saved."""
    if own.is_meta or not own.is_floating_point() or type(own.data) is not Tensor:
        what = f"{where} holds the base's own weight {name!r}, which cannot be compared with the one here"
        raise FormatError(what, "Open the base without quantization, in memory.")
    coarse = min((value.dtype, own.dtype), key=lambda dtype: -torch.finfo(dtype).eps)
    return torch.equal(value.to(own.device, coarse), own.to(coarse))


def check_shape(name: str, got: tuple[int, ...], wanted: tuple[int, ...], base: Structure, where: str) -> None:
    """Raises: FormatError where a stored tensor has another shape than the base needs; it says so where the base's
    vocabulary was resized."""
    if got == wanted:
        return
    entries = vocabulary(base)
    differ = [(a, b) for a, b in zip(got, wanted, strict=False) if a != b]
    if len(got) == len(wanted) and len(differ) == 1 and differ[0][1] == entries and _vocabulary_site(name, base):
        n = differ[0][0]
        raise FormatError(
            f"{where} was saved on a base whose vocabulary was resized to {n} entries: {name!r} has {n} of them, the "
            f"base {entries}",
            f"Resize the base before attaching: model.resize_token_embeddings({n}).",
        )
    raise FormatError(
        f"{name!r} in {where} has shape {got}, the base needs {wanted}",
        "The adapter was trained on another base, or its config was edited.",
    )


def vocabulary(base: Structure) -> int | None:
    """The rows of the table that the base looks its tokens up in."""
    site = next((s for s in base.tables if s.module is _table(base)), None)
    return None if site is None else site.in_features


def _vocabulary_site(name: str, base: Structure) -> bool:
    """Whether `name` is a parameter at the base's table of tokens, or at the layer that gives their logits."""
    modules = (_table(base), _table(base, "get_output_embeddings"))
    sites: list[Site] = [s for s in (*base.tables, *base.projections) if s.module in modules]
    return any(name.removeprefix(ROOT).startswith(site.path + ".") for site in sites)


def _table(base: Structure, which: str = "get_input_embeddings") -> object:
    try:
        return getattr(base.model, which)()
    except (AttributeError, NotImplementedError):
        return None
