"""What the adapters of a batch do at one site while text is written: laid out once, then run at every step.

A step is a list of acts; each changes some rows of y (vectors, width) in place and reads no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.batch.forward import Forward
from inlay.kernels.bags import Bags, Factors, one_by_one, units
from inlay.kernels.bottlenecks import Bottlenecks
from inlay.kernels.picked import Picked
from inlay.kernels.rows import Rows
from inlay.kernels.slot_table import SlotTable
from inlay.methods.contract import BottleneckForm, LinearForm, Site

from .acting import Scope, unseen
from .slot_rows import count_of, picked_at, rows_of
from .slot_scales import has_scales, scalings

__all__ = ["Bagged", "Forms", "StepAct", "beside", "linear_acts", "placed_acts"]

Forms = Mapping[int, LinearForm]
"""By the number of a share."""

StepAct = Callable[[Tensor, Tensor | None, Forward], None]
"""Changes y (vectors, width), given the module's input (vectors, in) and the forward of this step."""


# ---- linear layers


def linear_acts(
    scope: Scope, layers: Mapping[str, Forms], path: str, vectors: int, owners: Mapping[int, object]
) -> dict[str, list[StepAct]]:
    """The acts of the forms at `path`, and of those `layers` that take the same x through D together. `owners` are the
    adapters that the shares belong to."""
    ranks = {name: _ranks(forms) for name, forms in layers.items()}
    own, dtype = ranks[path], _dtype(layers[path])
    alike = [name for name in layers if ranks[name] == own]
    found: dict[str, list[StepAct]] = {path: []}
    counts = [(rank, count_of(scope, number, vectors)) for number, rank in own.items()]
    if not own or (not picked_at(scope) and one_by_one(counts, dtype)):
        found[path] += [_Product.of(layers[path][n], rows_of(scope, [n], vectors, layers[path])) for n in own]
    else:
        tables = getattr(scope.layout, "tables", None)
        if tables is None:
            bags = _bags(scope, [layers[name] for name in alike], list(own), vectors)
        else:
            table = tables.setdefault((*alike, dtype), SlotTable())
            bags = _placed(scope, table, [layers[name] for name in alike], {n: owners[n] for n in own}, vectors)
            tables.update({("placed", name, dtype): (table, alike) for name in alike})
        found = {name: [Bagged(bags, layer, name == alike[-1])] for layer, name in enumerate(alike)}
    for name, acts in found.items():
        acts += scalings(scope, layers[name], vectors)
    return found


def placed_acts(
    scope: Scope, path: str, dtype: torch.dtype, owners: Mapping[int, object], vectors: int,
    forms_of: Callable[[str, int], LinearForm | None],
) -> dict[str, list[StepAct]] | None:  # fmt: skip
    """`linear_acts` where others have laid out a table of products at `path`, and adapters do nothing there beside
    theirs; None where that is not so. `forms_of` a layer and a share is asked where an adapter is not in the table."""
    table, alike = getattr(scope.layout, "tables", {}).get(("placed", path, dtype), (None, ()))
    if table is None:
        return None
    slots: dict[int, tuple[int, ...]] = {}
    for number, owner in owners.items():
        if owner not in table.plain:
            forms = [forms_of(name, number) for name in alike]
            if not _alike(forms):
                return None
            table.place(owner, lambda forms=forms: [_factors(form) for form in forms])
            table.plain.add(owner)
        slots[number] = table.place(owner, list)
    sizes = [(len(own), count_of(scope, number, vectors)) for number, own in slots.items()]
    if not picked_at(scope) and one_by_one(sizes, dtype):
        return None
    bags = table.bags([slots.get(number, ()) for number in _shares(scope, vectors)])
    return {name: [Bagged(bags, layer, name == alike[-1])] for layer, name in enumerate(alike)}


def _alike(forms: Sequence[LinearForm | None]) -> bool:
    """Whether all are products of one rank, and nothing beside."""
    ranks = {0 if form is None or form.down is None else units(len(form.down)) for form in forms}
    return 0 not in ranks and len(ranks) == 1 and not any(form is None or has_scales(form) for form in forms)


def _ranks(forms: Forms) -> dict[int, int]:
    """The units of each share that has a product."""
    return {number: units(form.down.shape[0]) for number, form in forms.items() if form.down is not None}


def _dtype(forms: Forms) -> torch.dtype:
    """In which the products are computed; any where there are none."""
    return next((form.down.dtype for form in forms.values() if form.down is not None), torch.float32)


@dataclass(frozen=True, eq=False)
class _Product:
    """One adapter's product; `down` is (in, r), `up` (r, out)."""

    rows: Rows
    down: Tensor
    up: Tensor
    scale: float

    @classmethod
    def of(cls, form: LinearForm, rows: Rows) -> _Product:
        down, up, scale = _factors(form)
        return cls(rows, down.t(), up.t(), scale)

    def __call__(self, y: Tensor, x: Tensor | None, forward: Forward) -> None:
        assert x is not None
        low = self.rows.take(x).to(y.dtype) @ self.down
        if self.rows.index is None:
            self.rows.take(y).addmm_(low, self.up, alpha=self.scale)
        else:
            self.rows.add(y, (low @ self.up).mul_(self.scale))


@dataclass(frozen=True, eq=False)
class Bagged:
    """The products of all shares; this layer is the number `layer` of those that read x."""

    bags: Bags | Picked
    layer: int
    last: bool

    def __call__(self, y: Tensor, x: Tensor | None, forward: Forward) -> None:
        assert x is not None
        spot = "low", id(self.bags)
        low = forward.inputs.pop(spot, None) if self.layer else None
        low = self.bags.low(x.to(y.dtype)) if low is None else low
        if not self.last:
            forward.inputs[spot] = low
        self.bags.add_high(y, low, self.layer)


def _bags(scope: Scope, layers: Sequence[Forms], numbers: Sequence[int], vectors: int) -> Bags:
    """Slots in the order of the shares; those of one adapter one behind the other."""
    slots: list[tuple[int, ...]] = [()] * vectors
    first = 0
    for number, rank in _ranks(layers[0]).items():
        own = tuple(range(first, first + rank))
        first += rank
        for start, stop in scope.spans(number, vectors):
            slots[start:stop] = [own] * (stop - start)
    return Bags.of(slots, [[_factors(forms[number]) for number in numbers] for forms in layers])


def _placed(
    scope: Scope, table: SlotTable, layers: Sequence[Forms], owners: Mapping[int, object], vectors: int
) -> Bags | Picked:
    """The same, of products in a table that stays."""
    own = {
        number: table.place(owner, lambda number=number: [_factors(forms[number]) for forms in layers])
        for number, owner in owners.items()
    }
    beside = {number for forms in layers for number, form in forms.items() if has_scales(form)}
    table.plain.update(owner for number, owner in owners.items() if number not in beside)
    return table.bags([own.get(number, ()) for number in _shares(scope, vectors)])


def _shares(scope: Scope, vectors: int) -> Sequence[int]:
    """The number of the share that each vector belongs to."""
    spot = "shares", vectors
    if spot not in scope.route.cache:
        order = [0] * vectors
        for number in range(len(scope.layout.partition.shares)):
            for start, stop in scope.spans(number, vectors):
                order[start:stop] = [number] * (stop - start)
        scope.route.cache[spot] = order
    return scope.route.cache[spot]


def _factors(form: LinearForm) -> Factors:
    found = form.factors()
    assert found is not None
    return *found, form.scale


# ---- bottlenecks


def beside(scope: Scope, site: Site, forms: Mapping[int, BottleneckForm], vectors: int) -> list[StepAct]:
    """The acts of bottlenecks at one sublayer; those that read and activate alike are computed together."""
    kinds: dict[object, list[int]] = {}
    for number, form in forms.items():
        kinds.setdefault((form.reads, form.activation), []).append(number)
    acts: list[StepAct] = []
    for numbers in kinds.values():
        counts = [count_of(scope, n, vectors) for n in numbers]
        sizes = [(units(len(forms[n].down)), count) for n, count in zip(numbers, counts, strict=True)]
        if one_by_one(sizes, forms[numbers[0]].down.dtype):
            acts += [_Beside(site, rows_of(scope, [n], vectors, forms), forms[n], forms[n].added) for n in numbers]
            continue
        own = [forms[n] for n in numbers]
        factors = [(form.down, form.down_bias, form.up, form.up_bias, form.scale) for form in own]
        together = Bottlenecks.of(factors, counts, own[0].activation)
        acts.append(_Beside(site, rows_of(scope, numbers, vectors, forms), own[0], together))
    return acts


@dataclass(frozen=True, eq=False)
class _Beside:
    """`added` gives what is added to the rows, from z, which `form` says how to read."""

    site: Site
    rows: Rows
    form: BottleneckForm
    added: Callable[[Tensor], Tensor]

    def __call__(self, y: Tensor, x: Tensor | None, forward: Forward) -> None:
        stream = forward.streams.get(self.site.path)
        if stream is None:
            raise unseen(self.site)
        own = self.rows.take(y)
        z = own if self.form.reads == "output" else self.form.read(self._of(stream), own, self.site)
        self.rows.add(y, self.added(z))

    def _of(self, stream: Tensor) -> Tensor:
        return self.rows.take(stream.reshape(-1, stream.shape[-1]))
