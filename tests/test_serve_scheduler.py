"""Whose turn it is: tokens are shared between tenants, within one the first that came is first, and one that has many
rows leaves the others rows, steps and places in the queue. Everything is counted in steps and tokens."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from itertools import pairwise

import pytest

from inlay.serve.scheduler import BURST, EVERY, HEAVY, PRESENT, Scheduler, full


def taken(scheduler, most=10**6):
    """What is handed over and ends at once; its cost is all that it takes."""
    found = []
    while len(found) < most and (item := scheduler.take()) is not None:
        scheduler.end(item)
        found.append(item)
    return found


def filled(most=None, **tenants):
    """A scheduler in which each tenant has some requests waiting: its costs, in order."""
    scheduler = Scheduler(most)
    for tenant, costs in tenants.items():
        for number, cost in enumerate(costs):
            scheduler.push(tenant, (tenant, number, cost), cost)
    return scheduler


# ---- turns


def test_one_tenant_is_first_come_first_served():
    scheduler = filled(a=[500, 1, 30, 2])
    assert scheduler.take(lambda item: False) is None and len(scheduler) == 4
    assert [number for _, number, _ in taken(scheduler)] == [0, 1, 2, 3]
    assert len(scheduler) == 0 and scheduler.take() is None and scheduler.waiting() == {}


def test_who_comes_is_next_however_much_another_has_waiting():
    scheduler = filled(heavy=[50] * 200)
    assert [tenant for tenant, _, _ in taken(scheduler, 5)] == ["heavy"] * 5
    scheduler.push("light", ("light", 0, 50), 50)
    assert "light" in {tenant for tenant, _, _ in taken(scheduler, 2)}


def test_tokens_are_shared_evenly_whatever_requests_cost():
    scheduler = filled(many=[10] * 400, few=[400] * 10, middle=[63] * 64)
    spent = Counter()
    while min(scheduler.waiting().get(name, 0) for name in ("many", "few", "middle")) > 0:
        tenant, _, cost = scheduler.take()
        scheduler.end((tenant, _, cost))
        spent[tenant] += cost
        assert max(spent.values()) - min(spent[name] for name in ("many", "few", "middle")) <= 2 * 400


def test_tokens_that_are_written_count():
    scheduler = filled(a=[10] * 40, b=[10] * 40)
    spent = Counter()
    for _ in range(40):
        tenant, number, cost = scheduler.take()
        scheduler.charge({tenant: 30 if tenant == "a" else 0})
        scheduler.end((tenant, number, cost))
        spent[tenant] += 1
    assert 2.5 <= spent["b"] / spent["a"] <= 5.0


def test_nobody_overtakes_a_request_that_does_not_fit():
    scheduler = filled(a=[100], b=[1])
    scheduler.charge({"b": 5})
    assert scheduler.take(lambda item: item[0] == "b") is None
    assert scheduler.take() == ("a", 0, 100) and scheduler.take() == ("b", 0, 1)


def test_a_request_is_taken_out_wherever_it_stands():
    scheduler = filled(a=[30, 30, 30], b=[30])
    own = {name: [one.item for one in waiting] for name, waiting in scheduler._waiting.items()}
    first, only = own["a"][0], own["b"][0]
    assert not scheduler.remove("b", first) and not scheduler.remove("c", first)
    assert scheduler.remove("b", only) and not scheduler.remove("b", only)
    assert scheduler.remove("a", first) and scheduler.waiting() == {"a": 2}
    assert [number for _, number, _ in taken(scheduler)] == [1, 2]


def test_no_credit_is_saved_up_by_having_nothing_to_do():
    scheduler = filled(busy=[10] * 100)
    scheduler.push("idle", ("idle", -1, 1), 1)
    taken(scheduler, 90)
    for number in range(40):
        scheduler.push("idle", ("idle", number, 10), 10)
    found = Counter(tenant for tenant, _, _ in taken(scheduler, 16))
    assert abs(found["idle"] - found["busy"]) <= 1
    taken(scheduler)
    for name in ("late", "busy"):  # nobody was there: a newcomer has no more than who had most
        for number in range(100, 110):
            scheduler.push(name, (name, number, 10), 10)
    found = Counter(tenant for tenant, _, _ in taken(scheduler, 10))
    assert abs(found["late"] - found["busy"]) <= 1


def test_tenants_that_have_gone_are_not_held():
    scheduler = filled(8, **{f"t{number}": [5] for number in range(30)})
    taken(scheduler)
    scheduler.push("stays", "stays", 5)
    for _ in range(3 * PRESENT):
        scheduler.stepped()
    assert set(scheduler._seen) == set(scheduler._count) == {"stays"}


# ---- one that has many rows


@dataclass(eq=False)
class Asked:
    tenant: str
    step: int
    prompt: int
    left: int
    begun: int = -1


class Loop:
    """Rows under a scheduler, counted in steps: one token of each row in a step."""

    def __init__(self, most, held=True):
        self.most, self.scheduler = most, Scheduler(most if held else None)
        self.step, self.rows, self.ended, self.joins = 0, [], [], []

    def ask(self, tenant, prompt=32, new=16):
        self.scheduler.push(tenant, Asked(tenant, self.step, prompt, new), prompt)

    def go(self):
        joined = Counter()
        while (one := self.scheduler.take(lambda item: len(self.rows) < self.most)) is not None:
            one.begun = self.step
            self.rows.append(one)
            joined[one.tenant] += one.prompt
        self.joins.append(joined)
        for one in list(self.rows):
            one.left -= 1
            self.scheduler.charge({one.tenant: 1})
            if not one.left:
                self.rows.remove(one)
                self.scheduler.end(one)
                self.ended.append(one)
        self.scheduler.stepped()
        self.step += 1

    def had(self, tenant):
        return sum(row.tenant == tenant for row in self.rows)


def flooded(held=True, new=400, steps=300, most=64):
    """A tenant that asks without end, and one that asks now and then, and was there before."""
    loop = Loop(most, held)
    loop.ask("light", new=1)
    loop.go()
    for step in range(steps):
        if step % 20 == 5:
            loop.ask("light")
        while loop.scheduler.waiting().get("noisy", 0) < 3 * most:
            loop.ask("noisy", new=new)
        loop.go()
    return loop


def test_beside_a_flood_a_request_begins_in_the_step_in_which_it_comes():
    waits = [one.begun - one.step for one in flooded().ended if one.tenant == "light"]
    assert len(waits) >= 14 and max(waits[1:]) == 0, waits
    waits = [one.begun - one.step for one in flooded(held=False).ended if one.tenant == "light"]
    assert len(waits) == 1  # where nobody is held back, the others wait for the flood's rows to end


def test_a_flood_joins_in_groups_and_has_an_even_share_of_the_rows():
    loop = flooded(new=16)
    late = range(2 * EVERY, loop.step)
    joins = [step for step in late if loop.joins[step]["noisy"]]
    assert all(after - before >= EVERY for before, after in pairwise(joins))
    assert max(loop.joins[step]["noisy"] for step in joins) <= BURST + (HEAVY + 1) * 32
    assert loop.had("noisy") <= 32 and len(joins) >= len(late) // EVERY - 1
    ended = Counter(one.tenant for one in loop.ended)
    assert ended["noisy"] > 250, ended  # and goes on


@pytest.mark.parametrize(("known", "rows"), [(False, 64), (True, 56)])
def test_a_tenant_that_is_alone_has_the_rows_but_those_for_others_that_are_known(known, rows):
    loop = Loop(64)
    if known:
        loop.ask("other", new=1)
        for _ in range(PRESENT + 2):
            loop.go()
    for _ in range(100):
        loop.ask("noisy", new=40)
    for _ in range(10):
        loop.go()
        assert not loop.scheduler.heavy("noisy")
    assert loop.had("noisy") == rows


def test_tenants_of_as_many_rows_as_others_are_not_held_back():
    loop = Loop(32)
    for _ in range(90):
        for name in ("a", "b"):
            while loop.scheduler.waiting().get(name, 0) < 40:
                loop.ask(name, new=50)
        loop.go()
        assert not loop.scheduler.heavy("a") and not loop.scheduler.heavy("b")
    assert len(loop.rows) >= 31 and abs(loop.had("a") - loop.had("b")) <= 4


def test_a_long_prompt_of_a_flood_is_made_up_for():
    loop = Loop(64)
    for _ in range(HEAVY):
        loop.ask("noisy", 32, 500)
    loop.ask("light", 32, 500)
    loop.go()
    assert loop.scheduler.heavy("noisy")
    for _ in range(4):
        loop.ask("noisy", 10 * BURST, 500)
    for _ in range(3 * 10 * EVERY):
        loop.go()
    begun = [step for step, joined in enumerate(loop.joins) if joined["noisy"]]
    assert [after - before for before, after in pairwise(begun)][1:] == [10 * EVERY] * 2


def test_answers_count_as_rows():
    scheduler = Scheduler(16)
    for number in range(6):
        scheduler.push("noisy", ("noisy", number), 10, rows=4)
    scheduler.push("light", "light", 10)
    begun = deque()
    while (item := scheduler.take()) is not None:
        begun.append(item)
    assert scheduler.heavy("noisy") and sum(item != "light" for item in begun) == 2  # 8 rows, half of 16


def test_in_batches_nobody_is_heavy():
    scheduler = filled(None, noisy=[10] * 50, light=[10])
    assert len([scheduler.take() for _ in range(51)]) == 51 and scheduler.take() is None
    assert not scheduler.heavy("noisy")


# ---- places in the queue


@pytest.mark.parametrize(
    ("waiting", "tenant", "expected"),
    [
        ({}, "a", False), ({"a": 63}, "a", False), ({"a": 64}, "a", True),
        ({"a": 55, "b": 0}, "a", False), ({"a": 56, "b": 0}, "a", True), ({"a": 56, "b": 0}, "b", False),
        ({"a": 60, "b": 3}, "b", False), ({"a": 60, "b": 4}, "b", True), ({"a": 28, "b": 28}, "c", False),
    ],
)  # fmt: skip
def test_places_are_left_to_those_who_have_few(waiting, tenant, expected):
    assert full(waiting, tenant, 64) is expected


def test_a_short_queue_has_no_places_to_leave():
    assert not full({"a": 1, "b": 0}, "a", 2) and full({"a": 2}, "b", 2)
