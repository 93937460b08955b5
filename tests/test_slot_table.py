"""Tables of low-rank products whose owners come and go."""

from __future__ import annotations

import gc

import pytest
import torch

from inlay.kernels.slot_table import SlotTable

WIDTH, OUTS = 12, (5, 7)


class Owner:
    """Somebody with products of one rank at two layers."""

    def __init__(self, rank, seed):
        generator = torch.Generator().manual_seed(seed)
        self.products = [
            (
                torch.randn(rank, WIDTH, generator=generator, dtype=torch.float64),
                torch.randn(out, rank, generator=generator, dtype=torch.float64),
                0.5 + seed,
            )
            for out in OUTS
        ]

    def of(self, x, layer):
        down, up, scale = self.products[layer]
        return x @ down.t() @ up.t() * scale


def check(table, owners):
    slots = [table.place(owner, lambda owner=owner: owner.products) for owner in owners]
    x = torch.randn(len(owners) + 1, WIDTH, dtype=torch.float64)
    bags = table.bags([*slots, ()])
    low = bags.low(x)
    for layer in range(len(OUTS)):
        made = bags.high(low, layer)
        for row, owner in enumerate(owners):
            torch.testing.assert_close(made[row], owner.of(x[row], layer))
        assert not made[-1].any()
    return slots


@pytest.mark.parametrize("ranks", [[8], [3, 8, 20], [1, 1, 1, 40, 2]])
def test_each_owner_keeps_its_products_while_others_come(ranks):
    table, owners = SlotTable(), []
    before = []
    for seed, rank in enumerate(ranks * 3):
        owners.append(Owner(rank, seed))
        slots = check(table, owners)
        assert slots[: len(before)] == before
        before = slots
    assert len({slot for own in before for slot in own}) == sum(map(len, before))


def test_what_is_asked_for_once_is_not_asked_again():
    table, owner, asked = SlotTable(), Owner(4, 0), []
    for _ in range(3):
        table.place(owner, lambda: asked.append(1) or owner.products)
    assert len(asked) == 1


def test_slots_of_those_who_are_gone_are_used_again_and_hold_nothing_of_theirs():
    table, owners = SlotTable(), [Owner(20, 0), Owner(16, 1), Owner(3, 2)]
    check(table, owners)
    room = table._room
    with torch.no_grad():
        table._downs.fill_(float("nan"))  # of the one who goes, if of nobody else
        kept = owners[2]
        table._slots.clear()
    del owners[:2]
    gc.collect()
    check(table, [kept, Owner(9, 3), Owner(12, 4)])
    assert table._room == room
