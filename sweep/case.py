"""One base with what every law asks of it: fresh banks, rows, what the plain base gives, and how exact it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import inlay

from .bases import Base, Batch
from .inputs import Row
from .samples import NEIGHBOUR, VIRTUAL, add
from .verdicts import RIGHT, STATUSES, BaseFails, Different, Tolerance, Untried, Verdict, apart, of_error

__all__ = ["Case", "Checks", "each_or_all", "gradients", "loss_of", "neighbours", "over"]

Checks = dict[str, Verdict]
"""By the name of a method."""


class Fewer(TorchDispatchMode):
    """Sees whether anything is computed in fewer bits than float64."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.dtype != torch.float64 and out.numel() > 1:
            self.seen = True
        return out


class Case:
    def __init__(self, base: Base) -> None:
        self.base = base
        self.known: dict[Any, Any] = {}
        self.banks: dict[torch.dtype | None, inlay.Bank] = {}
        self.usable: list[str] = []  # samples that the base has a place for
        self.raised: set[str] = set()  # methods whose batches raised
        _ = base.maker

    def shared(self, names: Sequence[str], dtype: torch.dtype | None = None) -> inlay.Bank:
        """A bank with these samples among others, which laws share that leave it as it was: attaching takes longest."""
        if dtype not in self.banks or not {*names} <= {*self.banks[dtype].adapters}:
            self.banks[dtype] = self.bank(list(dict.fromkeys([*self.usable, *names])), dtype)
        return self.banks[dtype]

    def bank(self, names: Sequence[str], dtype: torch.dtype | None = None) -> inlay.Bank:
        """A fresh bank with these samples."""
        bank = inlay.attach(self.base.make(dtype))
        for name in names:
            add(bank, name)
        return bank

    @cached_property
    def plain(self) -> Any:
        return self.base.make()

    @cached_property
    def tolerance(self) -> Tolerance:
        """How exact the base is: parts of many compute in float32 whatever their weights are, and there a last bit of
        float64 moves a last bit of float32. Seen in one forward, and measured by changing weights in the last bits."""
        batch, model = self.base.batch(self.base.rows(2)), self.base.make()
        with torch.no_grad():
            with Fewer() as fewer:
                before = self.base.run(model, batch)
            for parameter in model.parameters():
                parameter.mul_(1 + torch.randn_like(parameter) * 20 * torch.finfo(parameter.dtype).eps)
            after = self.base.run(model, batch)
        noise = max(apart(a, b) for a, b in zip(after, before, strict=True))
        if self.base.dtype == torch.float32:
            return Tolerance(min(1e-3, max(1e-4, 30 * noise)), min(2e-2, max(1e-3, 300 * noise)))
        if noise < 1e-11 and not fewer.seen:
            shifted = self._shifted()
            return Tolerance(max(1e-9, 10 * shifted), max(1e-7, 1e3 * shifted))
        return Tolerance(min(1e-4, max(1e-5, 100 * noise)), min(1e-2, max(1e-4, 1e4 * noise)))

    def _shifted(self) -> float:
        """By how much columns before a row move it, where that is but the rounding of a table of positions; else 0."""
        if not self.base.padded:
            return 0.0
        row = self.base.rows(1)
        try:
            with torch.no_grad():
                batches = self.base.batch(row), self.base.batch(row, "left", 16)
                own, moved = (self.base.first_row(self.plain, batch) for batch in batches)
        except Exception:  # what the base cannot do is a law's affair
            return 0.0
        return found if (found := apart(moved, own)) < 1e-6 else 0.0

    def check_effect(self, bank: inlay.Bank, name: str, batch: Batch, effect: float) -> None:
        """Raises: Different where an adapter changes its row by no more than rounding; Untried where that is because
        the plain base calls none of its modules with these rows, as an image tower without images."""
        if effect > self.tolerance.output:
            return
        called: set[str] = set()
        model = self.base.make()
        for path in self.sites(bank, name):
            model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
        with torch.no_grad():
            self.base.run(model, batch)
        if not called:
            raise Untried("its rows call no module of it")
        if effect < 1e-7:
            self._check_read(batch)
            raise Different("the adapter does not change its row")

    def _check_read(self, batch: Batch) -> None:
        """Raises: BaseFails where the plain base gives a row the same whatever its tokens are."""
        if "input_ids" in batch.inputs:
            own, other = self._with_others(batch, batch.inputs["attention_mask"].bool())
            if torch.equal(own, other):
                raise BaseFails("the plain base gives the row the same whatever its tokens are")

    def reads_nothing(self, batch: Batch) -> BaseFails | None:
        """Where no token of a row without padding reads its first one, so that no virtual one would be read either."""
        if "input_ids" not in batch.inputs:
            return None
        first = torch.zeros_like(batch.inputs["input_ids"], dtype=torch.bool)
        first[:, 0] = True
        own, other = self._with_others(batch, first)
        return BaseFails("no token of the plain base reads another") if torch.equal(own[1:], other[1:]) else None

    def _with_others(self, batch: Batch, where: Tensor) -> tuple[Tensor, Tensor]:
        """What the plain base makes of the first row as it is, and with one other token at `where`."""
        ids, model = batch.inputs["input_ids"], self.base.make()
        others = torch.where(where, ids.max() - 1, ids)
        with torch.no_grad():
            own, other = (
                self.base.run(model, Batch({**batch.inputs, "input_ids": i}, batch.spans))[0] for i in (ids, others)
            )
        return own, other

    def own_gradient(self, bank: inlay.Bank, name: str, ways: Sequence[Batch]) -> BaseFails | None:
        """Where the plain base itself has no finite gradient, or none, in the modules that an adapter acts on, all else
        of it frozen."""
        for way in ways:
            model, parameters = self._frozen_elsewhere(bank, name)
            try:
                total = torch.stack([loss_of(row, 0) for row in self.base.run(model, way)]).sum()
                found = gradients(total, parameters)
            except Exception as error:
                return BaseFails(f"the plain base, frozen elsewhere: {type(error).__name__}: {str(error)[:200]}")
            if not all(bool(g.isfinite().all()) for g in found):
                return BaseFails("a gradient of the plain base is not finite")
            if not any(bool(g.abs().max() > 0) for g in found if g.numel()):
                return BaseFails("the plain base has no gradient there")
        return None

    def gradient_moves(self, bank: inlay.Bank, name: str, batch: Batch, index: int, alone: Batch) -> BaseFails | None:
        """Where the gradient of row `index` in those modules depends on its neighbours in the plain base as well."""
        model, parameters = self._frozen_elsewhere(bank, name)
        mine, own = (
            gradients(loss_of(self.base.run(model, b)[i], index), parameters) for b, i in ((batch, index), (alone, 0))
        )
        scale = max(float(g.abs().max()) for g in own) or 1.0
        moved = max(float((a - b).abs().max()) for a, b in zip(mine, own, strict=True)) / scale
        if moved <= self.tolerance.gradient:
            return None
        return BaseFails(f"gradients of the plain base, frozen elsewhere, depend on neighbours: {moved:.2g}")

    def _frozen_elsewhere(self, bank: inlay.Bank, name: str) -> tuple[Any, list[Tensor]]:
        """The plain base, frozen but for the modules that an adapter acts on, and their parameters."""
        model = self.base.make()
        modules = [model.get_submodule(path) for path in self.sites(bank, name)]
        parameters = [p for module in modules for p in module.parameters()] or list(model.parameters())
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return model, parameters

    def sites(self, bank: inlay.Bank, name: str) -> list[str]:
        """Paths of the modules that an adapter acts on."""
        paths = {path for part in bank.adapters[name].parts for path in part.sites}
        return [path for path, _ in bank.model.named_modules() if path in paths]

    def sides(self) -> tuple[str, ...]:
        return ("right", "left") if self.base.padded else ("none",)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What the plain base gives is the same for every batch of as many rows: it is computed once."""
        if key not in self.known:
            try:
                self.known[key] = make()
            except BaseFails as error:
                self.known[key] = error
        if isinstance(found := self.known[key], BaseFails):
            raise found
        return found

    def expected(self, rows: Sequence[Row], side: str) -> Plain:
        """What the plain base makes of the rows: together, each alone as it is, and each alone with its padding."""
        key = tuple(tuple(row["input_ids"][0].tolist()) if "input_ids" in row else () for row in rows)
        return self.once((key, side), lambda: self._expected(rows, side))

    def _expected(self, rows: Sequence[Row], side: str) -> Plain:
        batch = self.base.batch(rows, side)
        width = batch.inputs["input_ids"].shape[1] if "input_ids" in batch.inputs else 0
        try:
            with torch.no_grad():
                together = self.base.run(self.plain, batch)
                alone = [self.base.run(self.plain, self.base.batch([row]))[0] for row in rows]
                padded = [self.base.run(self.plain, self.base.batch([row], side, width))[0] for row in rows]
        except Exception as error:
            raise BaseFails(f"the plain base, {side} padding: {type(error).__name__}: {str(error)[:200]}") from error
        bound = self.tolerance.output
        for index, (row, own) in enumerate(zip(together, padded, strict=True)):
            if not bool(own.isfinite().all()):
                raise BaseFails(f"the plain base gives numbers that are not finite under {side} padding")
            if (found := apart(row, own)) > bound:
                raise BaseFails(
                    f"row {index} of the plain base depends on its neighbours ({side} padding): {found:.2g}"
                )
        worst = max(apart(a, b) for a, b in zip(padded, alone, strict=True))
        wider = self.base.batch(rows, side, width + VIRTUAL) if width else batch
        return Plain(batch, wider, width, together, worst)


@dataclass(frozen=True)
class Plain:
    """What the plain base makes of a batch; `wider` has the padding besides that rows of virtual tokens bring, and
    `moved` is by how much padding alone moves a row."""

    batch: Batch
    wider: Batch
    width: int
    outputs: list[Tensor]
    moved: float


def each_or_all(case: Case, names: Sequence[str], check: Callable[[Sequence[str]], Checks]) -> Checks:
    """The verdicts of all methods in one batch; where that raises, of smaller and smaller batches. Those that raised
    alone are not put with others again."""
    apart_from_others = [name for name in names if name in case.raised]
    together = [name for name in names if name not in case.raised]
    found = _halves(case, together, check) if together else {}
    for name in apart_from_others:
        found |= _halves(case, [name], check)
    return {name: found[name] for name in names}


def _halves(case: Case, names: Sequence[str], check: Callable[[Sequence[str]], Checks]) -> Checks:
    try:
        found = check(names)
    except Exception as error:
        if of_error(error).status == "raw":
            case.banks.clear()  # who knows what it left
        if isinstance(error, BaseFails) or len(names) == 1:
            if not isinstance(error, BaseFails):
                case.raised.update(names)
            return {name: of_error(error) for name in names}
        middle = len(names) // 2
        return _halves(case, names[:middle], check) | _halves(case, names[middle:], check)
    bad = [name for name in names if len(names) > 1 and found[name].status in ("wrong", "raw")]
    for name in bad:  # once more without company
        single = _halves(case, [name], check)[name]
        found[name] = single if single.status != RIGHT else Verdict(
            "wrong", f"only beside other methods: {found[name].note}"
        )  # fmt: skip
    return found


def over(ways: Iterable[str], names: Sequence[str], check: Callable[[Sequence[str], str], Checks]) -> Checks:
    """The worst verdict of each method over several ways; one that is no good in a way is not tried in the next."""
    found: dict[str, list[Verdict]] = {name: [] for name in names}
    for way in ways:
        left = [name for name, own in found.items() if all(v.status in (RIGHT, "base", "untried") for v in own)]
        for name, verdict in (check(left, way) if left else {}).items():
            found[name].append(Verdict(verdict.status, f"{way}: {verdict.note}" if verdict.note else ""))
    return {name: worst(own) for name, own in found.items()}


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    return min(verdicts, key=lambda verdict: STATUSES.index(verdict.status))


def loss_of(output: Tensor, seed: int) -> Tensor:
    """A random direction of the output: its gradient reaches everything that moves it."""
    generator = torch.Generator().manual_seed(seed)
    return (output * torch.randn(output.shape, generator=generator).to(output)).sum() / output.shape[0]


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where a parameter has none."""
    if not loss.requires_grad:
        raise Different("the output has no gradient")
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def neighbours(names: Sequence[str]) -> list[str | None]:
    """The rows of a mixed batch: the base, each method, another LoRA."""
    return [None, *names, NEIGHBOUR]
