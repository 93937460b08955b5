"""What may not change results: gradient checkpointing, and fewer bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import inlay

from .bases import Batch
from .case import Case, Checks, each_or_all, loss_of, neighbours, over
from .samples import NEIGHBOUR
from .verdicts import BaseFails, Different, verdict_of

__all__ = ["checkpointing", "dtypes"]


def checkpointing(case: Case, names: Sequence[str]) -> Checks:
    """Gradients with blocks computed again, by Inlay's switch and by transformers' two ways, against those without."""
    ways = ("recomputing", "reentrant", "not reentrant")
    return over(ways, names, lambda some, way: each_or_all(case, some, partial(_checkpointing, case, way=way)))


@contextmanager
def _switched(bank: inlay.Bank, way: str) -> Iterator[None]:
    if way == "recomputing":
        with bank.recomputing():
            yield
        return
    model: Any = bank.model
    try:
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
        model.enable_input_require_grads()
    except Exception as error:  # before any of Inlay: transformers' own switch
        raise BaseFails(f"transformers' switch: {type(error).__name__}: {error}") from error
    model.train()
    yield
    model.eval()
    model.gradient_checkpointing_disable()


def _checkpointing(case: Case, names: Sequence[str], way: str) -> Checks:
    wanted = neighbours(names)
    batch = case.base.batch(case.base.rows(len(wanted)), case.sides()[0])
    needed = [n for n in wanted if n]
    bank = case.shared(needed) if way == "recomputing" else case.bank(needed)
    parameters = {n: list(bank.parameters(n)) for n in wanted if n}

    def grads(model: Any) -> dict[str, list[Tensor]]:
        for several in parameters.values():
            for parameter in several:
                parameter.grad = None
        torch.manual_seed(0)  # what methods draw at random
        with bank.route(wanted):
            outputs = case.base.run(model, batch)
        sum(loss_of(out, i) for i, out in enumerate(outputs)).backward()  # pyright: ignore
        return {
            n: [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in ps] for n, ps in parameters.items()
        }

    if way != "recomputing":
        bank.model.train()
    alone = {n: [case.base.batch([row])] for n, row in zip(wanted, case.base.rows(len(wanted)), strict=True)}
    try:
        plain = grads(bank.model)
    except Exception as error:
        fault = next((f for n in needed if (f := case.own_gradient(bank, n, alone[n])) is not None), None)
        raise fault or _frozen_fault(case, bank, names, way) or error from error
    with _switched(bank, way):
        try:
            ours = grads(bank.model)
        except Exception as error:
            raise _frozen_fault(case, bank, names, way) or error from error

    def check(name: str) -> None:
        if not all(bool(g.isfinite().all()) for g in plain[name]):
            raise case.own_gradient(bank, name, alone[name]) or Different("a gradient is not finite")
        scale = max(float(g.abs().max()) for g in plain[name])
        for a, b in zip(ours[name], plain[name], strict=True):
            if not float((a - b).abs().max()) <= case.tolerance.gradient * max(scale, 1e-6):
                raise _own_fault(case, way) or Different(f"gradients {float((a - b).abs().max()) / scale:.2g} apart")

    return {n: verdict_of(lambda n=n: check(n)) for n in wanted if n and n != NEIGHBOUR}


def _frozen_fault(case: Case, bank: inlay.Bank, names: Sequence[str], way: str) -> BaseFails | None:
    """Where the plain base fails as well, when transformers computes its blocks again and few weights are trained."""
    if way == "recomputing":
        return None
    paths = {path for name in names for path in case.sites(bank, name)}
    for trained in (paths, ()):
        model = case.base.make().requires_grad_(False)
        for path in trained:
            model.get_submodule(path).requires_grad_(True)
        model.train()
        try:
            model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
            model.enable_input_require_grads()
            outputs = case.base.run(model, case.base.batch(case.base.rows(2), case.sides()[0]))
            if trained:
                sum(loss_of(out, i) for i, out in enumerate(outputs)).backward()  # pyright: ignore
        except Exception as error:
            return BaseFails(f"the plain base, frozen but for {len(trained)} modules: {type(error).__name__}: {error}")
    return None


def _own_fault(case: Case, way: str) -> BaseFails | None:
    """Where gradients of the plain base differ as well when transformers computes its blocks again."""

    def grads(switched: bool) -> list[Tensor]:
        model = case.base.make().train()
        if switched:
            model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
            model.enable_input_require_grads()
        outputs = case.base.run(model, case.base.batch(case.base.rows(2), case.sides()[0]))
        sum(loss_of(out, i) for i, out in enumerate(outputs)).backward()  # pyright: ignore
        return [_grad(p) for p in model.parameters()]

    try:
        pairs = list(zip(grads(True), grads(False), strict=True))
    except Exception as error:
        return BaseFails(f"the plain base: {type(error).__name__}: {error}")
    moved = max(float((a - b).abs().max()) for a, b in pairs) / max(1e-6, max(float(b.abs().max()) for _, b in pairs))
    return (
        BaseFails(f"gradients of the plain base move as well: {moved:.2g}") if moved > case.tolerance.gradient else None
    )


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def dtypes(case: Case, names: Sequence[str]) -> Checks:
    """float32, bfloat16 and float16: finite, and as near to the exact numbers as the plain base's."""
    return over(
        DTYPES, names, lambda some, way: each_or_all(case, some, partial(_dtype, case, dtype=DTYPES[way]))
    )  # fmt: skip


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _dtype(case: Case, names: Sequence[str], dtype: torch.dtype) -> Checks:
    wanted = neighbours(names)
    batch = case.base.batch(case.base.rows(len(wanted)), case.sides()[0])
    own = case.once(("dtype", len(wanted), dtype), lambda: _own_error(case, batch, dtype))
    exact, fewer = (_logits(case, wanted, batch, d) for d in (None, dtype))

    def check(index: int) -> None:
        if not bool(fewer[index].isfinite().all()):
            raise Different("numbers that are not finite")
        found = distance(fewer[index], exact[index])
        if found > max(6 * own, 0.25 if dtype != torch.float32 else 1e-3):
            name = wanted[index]
            moved = 0.0 if name is None else distance(_of_rounded(case, name, batch, index, dtype), exact[index])
            if 6 * moved > found:
                raise BaseFails(f"weights rounded to {dtype} alone move the row by {moved:.2g}")
            raise Different(f"{found:.2g} from the exact logits, where the plain base is {own:.2g}")

    return {n: verdict_of(lambda i=i: check(i)) for i, n in enumerate(wanted) if n and n != NEIGHBOUR}


def _logits(case: Case, wanted: Sequence[str | None], batch: Any, dtype: torch.dtype | None) -> list[Tensor]:
    bank = case.shared([n for n in wanted if n], dtype)
    with torch.no_grad(), bank.route(wanted):
        return case.base.run(bank.model, batch)


def _of_rounded(case: Case, name: str, batch: Batch, index: int, dtype: torch.dtype) -> Tensor:
    """A row's logits, computed exactly from weights and an adapter that are rounded: bases that choose the highest of
    many scores may choose others."""
    bank = case.bank([name])
    with torch.no_grad():
        for parameter in (*bank.model.parameters(), *bank.parameters(name)):
            parameter.copy_(parameter.to(dtype))
        with bank.route([name] * len(batch.spans)):
            return case.base.run(bank.model, batch)[index]


def _own_error(case: Case, batch: Any, dtype: torch.dtype) -> float:
    with torch.no_grad():
        exact = case.base.run(case.plain, batch)
        try:
            fewer = case.base.run(case.base.make(dtype), batch)
        except Exception as error:
            raise BaseFails(f"the plain base in {dtype}: {type(error).__name__}: {error}") from error
    if not all(bool(row.isfinite().all()) for row in fewer):
        raise BaseFails(f"the plain base in {dtype} gives numbers that are not finite")
    return max(distance(a, b) for a, b in zip(fewer, exact, strict=True))


def distance(ours: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of the expected one's."""
    ours, expected = (torch.where(t.isfinite(), t, 0.0).double() for t in (ours, expected))
    return float((ours - expected).norm()) / max(1e-6, float(expected.norm()))
