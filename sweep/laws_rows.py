"""Law 2: a row never sees its neighbours, whatever they are, and however the batch is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import inlay

from .bases import Batch, cast, logits_of
from .case import Case, Checks, Plain, each_or_all, gradients, loss_of, neighbours, over
from .inputs import Row
from .samples import NEIGHBOUR, VIRTUAL
from .verdicts import RIGHT, WRONG, BaseFails, Different, Tolerance, Untried, apart, of_error, same, verdict_of

__all__ = ["images", "mixed", "nan", "packed"]


def mixed(case: Case, names: Sequence[str]) -> Checks:
    """Values and gradients of each row of a mixed batch against the row alone, padded on either side."""
    return over(case.sides(), names, lambda some, side: each_or_all(case, some, partial(_mixed, case, side=side)))


def _mixed(case: Case, names: Sequence[str], side: str, rows: Sequence[Row] | None = None) -> Checks:
    wanted = neighbours(names)
    rows = case.base.rows(len(wanted)) if rows is None else rows
    plain = case.expected(rows, side)
    bank = case.shared([n for n in wanted if n])
    with bank.route(wanted):
        together = case.base.run(bank.model, plain.batch)
    tolerance = case.tolerance
    base_row = verdict_of(lambda: same("the base's row", together[0], plain.outputs[0], 10 * tolerance.output))
    if base_row.status != RIGHT:
        if plain.moved > tolerance.output:  # virtual tokens make padding for the others
            raise BaseFails(f"padding alone moves a row of the plain base by {plain.moved:.2g}")
        raise Different(base_row.note)
    found: Checks = {}
    for index, name in enumerate(wanted):
        if name is None or name == NEIGHBOUR:
            continue
        ways = [case.base.batch([rows[index]])]
        if plain.moved > tolerance.output:  # the base itself tells padding from none
            ways.append(case.base.batch([rows[index]], side, plain.width))
        effect = apart(together[index].detach(), plain.outputs[index])
        found[name] = verdict_of(
            lambda i=index, n=name, w=ways, e=effect: compare(case, bank, n, together[i], w, e, tolerance, i, plain)
        )
        wrong = found[name].status == WRONG
        if wrong and widened(bank, wanted) and (fault := padding_moves(case, rows[index])):
            found[name] = of_error(fault)
    return found


def widened(bank: inlay.Bank, names: Sequence[str | None]) -> bool:
    """Whether virtual tokens of some rows are padding for the others."""
    return len({0 if name is None else bank.adapters[name].virtual_length for name in names}) > 1


def padding_moves(case: Case, row: Row) -> BaseFails | None:
    """Where columns of padding before a row, as virtual tokens of others bring them, move it in the plain base."""
    if "input_ids" not in row:
        return None
    length = row["input_ids"].shape[1]
    with torch.no_grad():
        own, *wider = (
            case.base.run(case.plain, case.base.batch([row], "left", length + more))[0] for more in range(VIRTUAL + 1)
        )
    moved = max(apart(other, own) for other in wider)
    if moved <= case.tolerance.output:
        return None
    return BaseFails(f"columns of padding before it alone move the row of the plain base by {moved:.2g}")


def compare(
    case: Case, bank: inlay.Bank, name: str, ours: Tensor, ways: Sequence[Any], effect: float,
    tolerance: Tolerance, seed: int, plain: Plain | None = None,
) -> str:  # fmt: skip
    """`ours` and its gradient, of row `seed` of a batch, against the row alone in the nearest of `ways`."""
    case.check_effect(bank, name, ways[-1], effect)
    alone: list[Tensor] = []
    for way in ways:
        with bank.route([name]):
            alone.append(case.base.run(bank.model, way)[0])
    nearest = min(alone, key=lambda a: apart(ours.detach(), a.detach()))
    same("values", ours, nearest, tolerance.output)
    parameters = list(bank.parameters(name))
    try:
        mine, expected = (gradients(loss_of(out, seed), parameters) for out in (ours, nearest))
    except Exception as error:
        raise case.own_gradient(bank, name, ways) or error from error
    if not all(bool(g.isfinite().all()) for g in (*mine, *expected)):
        together = ways if plain is None else [*ways, plain.batch, plain.wider]
        raise case.own_gradient(bank, name, together) or Different("a gradient is not finite")
    scale = max(float(g.abs().max()) for g in expected)
    if not scale > 0:
        fault = case.own_gradient(bank, name, ways) or case.reads_nothing(ways[0])
        raise fault or Different("no parameter has a gradient")
    for index, (a, b) in enumerate(zip(mine, expected, strict=True)):
        if (found := float((a - b).abs().max()) / scale) > tolerance.gradient:
            fault = None if plain is None else case.gradient_moves(bank, name, plain.batch, seed, ways[-1])
            raise fault or Different(f"gradient of parameter {index} of {len(mine)}: {found:.2g} apart")
    return dead(bank, name, expected)


def dead(bank: inlay.Bank, name: str, found: Sequence[Tensor]) -> str:
    """A note on parameters that nothing moves."""
    still = sum(not bool(g.abs().max() > 0) for g in found)
    return f"{still} of {len(found)} parameters have no gradient" if still else ""


def nan(case: Case, names: Sequence[str]) -> Checks:
    """A neighbour whose parameters are NaN: rows of others stay as they were, and their gradients finite."""
    return each_or_all(case, names, partial(_nan, case))


def _nan(case: Case, names: Sequence[str]) -> Checks:
    wanted = neighbours(names)
    rows = case.base.rows(len(wanted))
    side = case.sides()[0]
    case.expected(rows, side)
    batch = case.base.batch(rows, side)
    bank = case.shared([n for n in wanted if n])
    with bank.route(wanted):
        healthy = [row.detach() for row in case.base.run(bank.model, batch)]
    kept = [parameter.detach().clone() for parameter in bank.parameters(NEIGHBOUR)]
    _fill(bank, [torch.full_like(value, float("nan")) for value in kept])
    with bank.route(wanted):
        sick = case.base.run(bank.model, batch)
    if bool(sick[-1].isfinite().all()):
        raise Different("the NaN of an adapter does not reach its own row")
    same("the base's row beside NaN", sick[0], healthy[0], case.tolerance.output)

    def check(index: int, name: str) -> None:
        same("values beside NaN", sick[index], healthy[index], case.tolerance.output)
        alone = [case.base.batch([rows[index]], side, batch_width(batch))]
        try:
            found = gradients(loss_of(sick[index], index), list(bank.parameters(name)))
        except Exception as error:
            raise case.own_gradient(bank, name, alone) or error from error
        if not all(bool(grad.isfinite().all()) for grad in found):
            raise case.own_gradient(bank, name, alone) or Different("the gradient beside NaN is not finite")

    found = {n: verdict_of(lambda i=i, n=n: check(i, n)) for i, n in enumerate(wanted) if n and n != NEIGHBOUR}
    _fill(bank, kept)
    return found


def batch_width(batch: Batch) -> int:
    """Columns of its tokens, 0 where it has none."""
    return batch.inputs["input_ids"].shape[1] if "input_ids" in batch.inputs else 0


@torch.no_grad()
def _fill(bank: inlay.Bank, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(bank.parameters(NEIGHBOUR), values, strict=True):
        parameter.copy_(value)


def packed(case: Case, names: Sequence[str]) -> Checks:
    """Segments of a packed row against each row alone, where the bank says that the base packs."""
    if not case.base.padded:
        raise Untried("its rows are no tokens")
    return each_or_all(case, names, partial(_packed, case))


def _packed(case: Case, names: Sequence[str]) -> Checks:
    wanted = neighbours(names)
    rows = [case.base.maker.row_of(4 + i % 3, i, 0) for i in range(len(wanted))]
    rows = [{name: value for name, value in row.items() if name == "input_ids"} for row in rows]
    bank = case.shared([n for n in wanted if n])
    lengths = [row["input_ids"].shape[1] for row in rows]
    with bank.stream(list(zip(wanted, lengths, strict=True))):
        out = bank.model(**cast({"input_ids": torch.cat([row["input_ids"] for row in rows], 1)}, bank.model))
    if logits_of(out).shape[1] != sum(lengths):
        raise Untried("its output is not one of tokens")
    pieces = list(logits_of(out)[0].split(lengths))
    batches = [case.base.batch([row]) for row in rows]
    with torch.no_grad():
        plain = [case.base.run(case.plain, batch)[0] for batch in batches]
    same("the base's segment", pieces[0], plain[0], 10 * case.tolerance.output)
    return {
        n: verdict_of(
            lambda i=i, n=n: compare(
                case, bank, n, pieces[i], [batches[i]], apart(pieces[i].detach(), plain[i]), case.tolerance, i
            )
        )
        for i, n in enumerate(wanted) if n and n != NEIGHBOUR
    }  # fmt: skip


def images(case: Case, names: Sequence[str]) -> Checks:
    """Rows with none, one and two images or sounds in one batch."""
    maker = case.base.maker
    if not maker.placeholders:
        raise Untried("no image or sound of its rows is counted by placeholders")
    counts = [i % 3 for i in range(len(neighbours(names)))]
    rows = [maker.row_of(4 + i % 2, i, count) for i, count in enumerate(counts)]
    try:
        case.expected(rows, "right")
    except BaseFails:
        raise
    except Exception as error:
        raise BaseFails(f"rows of 0, 1 and 2 images: {type(error).__name__}: {error}") from error

    def check(some: Sequence[str]) -> Checks:
        kept = [0, *(1 + list(names).index(n) for n in some), len(rows) - 1]
        return _mixed(case, some, "right", [rows[i] for i in kept])

    return each_or_all(case, names, check)
