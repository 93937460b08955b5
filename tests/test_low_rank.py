"""The computation that adapters of any ranks, scales and sizes share, in training and when text is written."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import inlay
from inlay.bank import applying
from inlay.kernels import low_rank as kernel
from inlay.kernels.bags import Bags, units
from inlay.kernels.low_rank import Product, low_rank
from inlay.methods.table import METHODS
from zoo import make

EXACT = {"rtol": 0, "atol": 1e-10}
IN, OUT = 12, 10
SPANS = [((0, 5),), ((5, 10),), ((10, 13), (20, 22)), ((13, 20),), ((24, 30),)]  # tokens 22 and 23 are nobody's
RANKS = [3, 3, 8, 17, 1]


def made(masked=False):
    torch.manual_seed(0)
    products = []
    for number, (spans, rank) in enumerate(zip(SPANS, RANKS, strict=True)):
        size = sum(stop - start for start, stop in spans)
        rand = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((rank, IN), (OUT, rank))]
        more = {}
        if masked and number == 1:
            more["mask"] = torch.rand(size, IN, dtype=torch.float64).gt(0.3).double()
        if masked and number == 3:
            more = {
                "middle": torch.randn(rank, dtype=torch.float64, requires_grad=True),
                "outer": torch.randn(OUT, dtype=torch.float64, requires_grad=True),
            }
        products.append(Product(spans, 0.5 + number, *rand, **more))
    x = torch.randn(30, IN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    return x, weight, products


def plain(x, weight, products):
    """The same, token by token."""
    y = x @ weight.t()
    added = torch.zeros_like(y)
    for own in products:
        index = torch.cat([torch.arange(start, stop) for start, stop in own.spans])
        seen = x[index] if own.mask is None else x[index] * own.mask
        low = seen @ own.down.t()
        low = low if own.middle is None else low * own.middle
        out = low @ own.up.t() * own.scale
        added = added.index_add(0, index, out if own.outer is None else out * own.outer)
    return y + added


def leaves(x, products):
    return [x, *(t for p in products for t in (p.down, p.up, p.middle, p.outer) if t is not None)]


@pytest.mark.parametrize("pad", [False, True], ids=["one by one", "padded"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("rides_along", [False, True])
def test_values_and_gradients_are_those_of_each_product_alone(pad, masked, rides_along, monkeypatch):
    monkeypatch.setattr(kernel, "pads", lambda x, shapes: pad)
    x, weight, products = made(masked)
    expected = plain(x, weight, products)
    seed = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves(x, products), seed)
    if rides_along:
        ours = low_rank(x, x.detach() @ weight.t(), products, weight, in_place=True)
    else:
        ours = low_rank(x, x @ weight.t(), products)
    torch.testing.assert_close(ours, expected, **EXACT)
    for own, other in zip(torch.autograd.grad(ours, leaves(x, products), seed), wanted, strict=True):
        torch.testing.assert_close(own, other, **EXACT)


@pytest.mark.parametrize("pad", [False, True], ids=["one by one", "padded"])
def test_a_neighbour_that_is_no_number_changes_nothing(pad, monkeypatch):
    monkeypatch.setattr(kernel, "pads", lambda x, shapes: pad)
    x, weight, products = made()
    expected = low_rank(x, x.detach() @ weight.t(), products, weight)
    wanted = torch.autograd.grad(expected[:5].sum(), [products[0].down, x])
    with torch.no_grad():
        x[13:20] = float("nan")
        products[3].down.fill_(float("inf"))
    ours = low_rank(x, x.detach() @ weight.t(), products, weight)
    torch.testing.assert_close(ours[:13], expected[:13], **EXACT)
    found = torch.autograd.grad(ours[:5].sum(), [products[0].down, x])
    torch.testing.assert_close(found[0], wanted[0], **EXACT)
    torch.testing.assert_close(found[1][:13], wanted[1][:13], **EXACT)


def test_bags_are_products_of_units():
    torch.manual_seed(0)
    ranks, slots, first = [3, 8, 20], [], 0
    factors = [[(torch.randn(r, IN), torch.randn(out, r), 0.5 + r) for r in ranks] for out in (OUT, 4)]
    for r in ranks:
        slots.append(tuple(range(first, first + units(r))))
        first += units(r)
    rows = [slots[2], (), slots[0], slots[1], slots[0]]
    owner = [2, None, 0, 1, 0]
    x = torch.randn(len(rows), IN)
    bags = Bags.of(rows, factors)
    low = bags.low(x)
    for layer, own in enumerate(factors):
        ours = bags.high(low, layer)
        for row, number in enumerate(owner):
            if number is None:
                assert not ours[row].any()
                continue
            down, up, scale = own[number]
            torch.testing.assert_close(ours[row], x[row] @ down.t() @ up.t() * scale, rtol=1e-4, atol=1e-4)


WISHES = {
    "a": lambda: inlay.LoRA(r=4), "b": lambda: inlay.LoRA(r=13, alpha=3), "c": lambda: inlay.IA3(),
    "d": lambda: inlay.LoRA(r=20, targets=["q_proj", "down_proj"]), "e": lambda: inlay.NormTuning(),
    "f": lambda: METHODS["houlsby"](), "g": lambda: inlay.PrefixTuning(3), "h": lambda: inlay.PromptTuning(2),
    "i": lambda: METHODS["dora"](r=3), "j": lambda: METHODS["vera"](r=5),
}  # fmt: skip


def test_rows_that_write_together_have_the_logits_of_each_alone(monkeypatch):
    bank = inlay.attach(make("llama", dtype=torch.float64))
    for seed, (name, method) in enumerate(WISHES.items()):
        bank.add(name, method(), seed=seed)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    calls, asked = [], applying.step_of
    monkeypatch.setattr(applying, "step_of", lambda *args: calls.append(1) or asked(*args))
    rows = ["a", None, "b", "c", "a", "d", "e", "f", "g", "h", "i", "j", ["a", "c"], {"b": 0.5}]
    ids = torch.randint(3, 40, (len(rows), 8))

    def written(rows, ids):
        found, cache = [], DynamicCache()
        with torch.no_grad(), bank.route(rows):
            for start, stop in ((0, 4), (4, 5), (5, 7), (7, 8)):
                out = bank.model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
                found.append(out.logits)
        return torch.cat(found, 1)

    together = written(rows, ids)
    assert calls
    for number, row in enumerate(rows):
        alone = written([row], ids[number : number + 1])
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=1e-9)
