"""The adapters that the laws are tried with: one method for each kind of site, or all methods of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import inlay
from inlay.methods.table import METHODS
from inlay.sites.tiny import quietly, tiny_inputs

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


def _neighbour(bank: inlay.Bank) -> Any:
    """LoRA on the text alone where there is something else; else on all layers that are given twice as much for two
    rows as for one: what all rows share, such as tables of positions, refuses other adapters beside its own."""
    try:
        return dataclasses.replace(_text(bank), r=6, alpha=4.0)
    except Untried:
        given = {} if "input_ids" in str(bank.model.main_input_name) else _given(bank)
    paths = [path for path, (one, two) in given.items() if two == 2 * one]
    return inlay.LoRA(r=6, alpha=4.0, targets=paths) if 0 < len(paths) < len(given) else inlay.LoRA(r=6, alpha=4.0)


def _given(bank: inlay.Bank) -> dict[str, tuple[int, int]]:
    """How many numbers each linear layer is given for one row, and for two."""
    model: Any = bank.model
    unusable = bank.base.observed.unusable
    modules = {site.module: site.path for site in bank.base.projections if site.layer is not None}
    modules = {module: path for module, path in modules.items() if path not in unusable}
    counts: list[dict[str, int]] = []

    def count(module: nn.Module, args: Any) -> None:
        counts[-1][modules[module]] = counts[-1].get(modules[module], 0) + args[0].numel()

    handles = [module.register_forward_pre_hook(count) for module in modules]
    with quietly(model):
        for make in tiny_inputs(model):
            try:
                one, counts = make(), []
                for batch in (one, {name: torch.cat([value, value]) for name, value in one.items()}):
                    counts.append({})
                    model(**batch)
                break
            except Exception:  # whatever the model lacks, the next batch may have
                counts = []
    for handle in handles:
        handle.remove()
    return {path: (counts[0][path], counts[1].get(path, 0)) for path in counts[0]} if len(counts) == 2 else {}


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
        bank.add(name, _neighbour(bank), seed=7)
    else:
        bank.add(name, TABLE[name](bank), seed=len(name))
    shake(bank.parameters(name), seed=sum(map(ord, name)))


@torch.no_grad()
def shake(parameters: Any, seed: int) -> None:
    """Add noise to tensors, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter))
