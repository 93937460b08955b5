"""Law 1: the base is untouched, and detach gives it back; merging writes what the route did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import inlay

from .case import Case, Checks, each_or_all
from .samples import add
from .verdicts import Different, apart, same, verdict_of

__all__ = ["attach", "merge"]


def attach(case: Case, names: Sequence[str]) -> Checks:
    """Logits bit for bit with a bank, with adapters that no row uses, and behind detach; nothing stays on the model."""

    def check(some: Sequence[str]) -> Checks:
        model = case.base.make()
        batch = case.base.batch(case.base.rows(3), case.sides()[-1])
        before, marks = _outputs(case, model, batch), _marks(model)
        keys = {key: value.data_ptr() for key, value in model.state_dict().items()}
        bank = inlay.attach(model)
        _equal(case, "attached", model, batch, before)
        for name in some:
            add(bank, name)
        if [*model.state_dict()] != [*keys]:
            raise Different("the keys of the state dict differ with a bank")
        bank.set(None)
        _equal(case, "rows of no adapter", model, batch, before)
        found = {name: verdict_of(lambda n=name: _used(case, bank, n, batch)) for name in some}
        bank.detach()
        _equal(case, "detached", model, batch, before)
        if {key: value.data_ptr() for key, value in model.state_dict().items()} != keys:
            raise Different("the state dict differs behind detach")
        if left := [path for path, mark in _marks(model).items() if marks.get(path) != mark]:
            raise Different(f"left behind by detach: {left[:3]} {_change(marks[left[0]], _marks(model)[left[0]])}")
        return found

    return each_or_all(case, names, check)


def _equal(case: Case, what: str, model: nn.Module, batch: Any, before: Sequence[torch.Tensor]) -> None:
    """Bit for bit, but for what runs of plain copies differ by: torch chooses products by where numbers lie in memory,
    and by whether weights take gradients, which a bank's base does not."""
    ours, expected = _flat(_outputs(case, model, batch)), _flat(before)
    if apart(ours, expected) > 0:
        copies = [case.base.make().requires_grad_(trained) for trained in (True, False) * 2]
        own = max(apart(_flat(_outputs(case, copy, batch)), expected) for copy in copies)
        same(what, ours, expected, 4 * own)


def _used(case: Case, bank: inlay.Bank, name: str, batch: Any) -> None:
    """What an adapter leaves behind it leaves when a row uses it."""
    with bank.route([name] * 3):
        _outputs(case, bank.model, batch)


def _outputs(case: Case, model: nn.Module, batch: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return case.base.run(model, batch)


def _flat(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([out.flatten() for out in outputs])


def _marks(model: nn.Module) -> dict[str, Any]:
    """What could stay behind on each module: hooks, attributes, flags."""
    return {
        path: (
            len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks),
            module.training, _attributes(module), type(module).__name__,
            tuple(p.requires_grad for p in module.parameters(recurse=False)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for path, module in model.named_modules()
    }  # fmt: skip


def _attributes(module: nn.Module) -> tuple[str, ...]:
    """Names that the object has of its own, but for those that only repeat its class."""
    kind, none = type(module), object()
    return tuple(sorted(k for k, v in vars(module).items() if getattr(kind, k, none) is not v))


def _change(before: Any, after: Any) -> str:
    def brief(a: Any, b: Any) -> Any:
        return sorted({*b} ^ {*a}) if isinstance(a, tuple) and a and isinstance(a[0], str) else f"{a} -> {b}"

    return "; ".join(str(brief(a, b)) for a, b in zip(before, after, strict=True) if a != b)[:200]


def merge(case: Case, names: Sequence[str]) -> Checks:
    """The merged base's logits against the routed ones."""

    def check(name: str) -> None:
        bank = case.bank([name])
        batch = case.base.batch(case.base.rows(2))
        with torch.no_grad():
            plain = _flat(case.base.run(bank.model, batch))
            with bank.route([name] * 2):
                routed = _flat(case.base.run(bank.model, batch))
            case.check_effect(bank, name, batch, apart(routed, plain))
            bank.merge(name)
            merged = _flat(case.base.run(bank.model, batch))
            same("merged", merged, routed, 100 * case.tolerance.output)
            bank.detach()
            same("merged and detached", _flat(case.base.run(bank.model, batch)), routed, 100 * case.tolerance.output)

    return {name: verdict_of(lambda n=name: check(n)) for name in names}
