"""The adapters that the laws are tried with: one method for each kind of site, or all methods of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import inlay
from inlay.methods.table import METHODS

from .verdicts import Untried

__all__ = ["NEIGHBOUR", "SAMPLES", "TABLE", "add", "shake"]

NEIGHBOUR = "neighbour"
VIRTUAL = 3
"""Virtual tokens and prefixes of the samples; for the rows beside them they are padding."""
"""A second LoRA in every mixed batch, of another rank: the one that turns to NaN."""


def _tables(bank: inlay.Bank) -> list[Any]:
    """Paths of the tables that look up ids: those that hold the weight of the input embeddings, and are called."""
    model: Any = bank.model
    try:
        weight = model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError) as error:
        raise Untried("the base has no table of ids") from error
    if weight.ndim != 2:
        raise Untried("the base has no table of ids")
    paths = [path for path, module in bank.model.named_modules() if getattr(module, "weight", None) is weight]
    tables = [path for path in paths if isinstance(bank.model.get_submodule(path), nn.Embedding)]
    return [path for path in tables if path not in bank.base.observed.silent(tables)] or paths


def _text(bank: inlay.Bank) -> Any:
    """LoRA on the linear layers of the text's backbone alone, where there is something else."""
    stack = bank.base.stacks[-1]
    own = {id(module) for module in stack.modules()}
    linear = [site for site in bank.base.projections if site.layer is not None]
    inside = [site.path for site in linear if id(site.module) in own and site.path not in bank.base.observed.unusable]
    if len(inside) == len(linear) or not inside:
        raise Untried("the base has nothing but its text")
    return inlay.LoRA(r=3, targets=inside)


SAMPLES: dict[str, Callable[[inlay.Bank], Any]] = {
    "lora": lambda bank: inlay.LoRA(r=4),
    "text": _text,
    "table": lambda bank: inlay.LoRA(r=3, targets=_tables(bank)),
    "ia3": lambda bank: inlay.IA3(),
    "norm": lambda bank: inlay.NormTuning(),
    "houlsby": lambda bank: inlay.Houlsby(reduction_factor=4, non_linearity="gelu"),
    "prefix": lambda bank: inlay.PrefixTuning(num_virtual_tokens=VIRTUAL),
    "prompt": lambda bank: inlay.PromptTuning(num_virtual_tokens=VIRTUAL),
    "head": lambda bank: inlay.ModulesToSave(),
    "loreft": lambda bank: inlay.LoReFT(r=2, dropout=0.0),
}
"""By name; "table" is LoRA on the table of embeddings, "text" on the text alone where images or sounds are read."""


def _plain(name: str) -> Callable[[inlay.Bank], Any]:
    def make(bank: inlay.Bank) -> Any:
        kind = METHODS[name]
        fields = getattr(kind, "__dataclass_fields__", {})
        wanted: dict[str, float] = {"r": 2, "dropout": 0.0, "num_virtual_tokens": 3, "reduction_factor": 4}
        if {"r", "alpha"} <= {*fields} and isinstance(alpha := fields["alpha"].default, (int, float)):
            scale = alpha / fields["r"].default  # of another rank it would be large: half precision overflows
            wanted["alpha"] = wanted["r"] * min(scale, 2)
        return kind(**{k: v for k, v in wanted.items() if k in fields})

    return make


TABLE: dict[str, Callable[[inlay.Bank], Any]] = {**SAMPLES, **{n: _plain(n) for n in METHODS if n not in SAMPLES}}
"""Every method that Inlay has, by its name there."""


def add(bank: inlay.Bank, name: str) -> None:
    """Add the sample `name`, shaken so that nothing of it is zero. Raises: UsageError where it cannot act here."""
    if name == NEIGHBOUR:
        try:
            bank.add(name, dataclasses.replace(_text(bank), r=6, alpha=4.0), seed=7)
        except Untried:
            bank.add(name, inlay.LoRA(r=6, alpha=4.0), seed=7)
    else:
        bank.add(name, TABLE[name](bank), seed=len(name))
    shake(bank.parameters(name), seed=sum(map(ord, name)))


@torch.no_grad()
def shake(parameters: Any, seed: int) -> None:
    """Add noise to tensors, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter))
