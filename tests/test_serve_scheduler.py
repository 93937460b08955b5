"""Whose turn it is: tokens are shared between tenants, and within one tenant the first that came is first."""

from __future__ import annotations

from collections import Counter

import pytest

from inlay.serve.scheduler import Scheduler


def taken(scheduler, most=10**6):
    found = []
    while len(found) < most and scheduler.peek() is not None:
        found.append(scheduler.pop())
    return found


def filled(quantum, **tenants):
    """A scheduler in which each tenant has some requests waiting: its costs, in order."""
    scheduler = Scheduler(quantum)
    for tenant, costs in tenants.items():
        for number, cost in enumerate(costs):
            scheduler.push(tenant, (tenant, number, cost), cost)
    return scheduler


def test_one_tenant_is_first_come_first_served():
    scheduler = filled(10, a=[500, 1, 30, 2])
    assert scheduler.peek() == scheduler.peek() == ("a", 0, 500)
    assert [number for _, number, _ in taken(scheduler)] == [0, 1, 2, 3]
    assert len(scheduler) == 0 and scheduler.peek() is None and scheduler.waiting() == {}
    with pytest.raises(IndexError):
        scheduler.pop()


def test_a_tenant_of_many_does_not_hold_up_another():
    scheduler = filled(100, heavy=[50] * 200)
    assert [tenant for tenant, _, _ in taken(scheduler, 5)] == ["heavy"] * 5
    scheduler.push("light", ("light", 0, 50), 50)
    assert "light" in {tenant for tenant, _, _ in taken(scheduler, 3)}


@pytest.mark.parametrize("quantum", [7, 64, 1000])
def test_tokens_are_shared_evenly_whatever_requests_cost(quantum):
    scheduler = filled(quantum, many=[10] * 400, few=[400] * 10, middle=[63] * 64)
    spent = Counter()
    while min(scheduler.waiting().get(name, 0) for name in ("many", "few", "middle")) > 0:
        tenant, _, cost = scheduler.pop()
        spent[tenant] += cost
    assert max(spent.values()) - min(spent.values()) <= 400 + 2 * quantum


def test_what_was_charged_too_much_is_given_back():
    scheduler = filled(100, a=[100] * 20, b=[100] * 20)
    assert [tenant for tenant, _, _ in taken(scheduler, 2)] == ["a", "b"]
    scheduler.repay("a", 90)
    scheduler.repay("a", 90)
    scheduler.repay("nobody", 90)
    found = Counter(tenant for tenant, _, _ in taken(scheduler, 9))
    assert found["a"] > found["b"]


def test_a_request_is_taken_out_wherever_it_stands():
    scheduler = filled(100, a=[30, 30, 30], b=[30])
    first, only = scheduler.peek(), ("b", 0, 30)
    assert not scheduler.remove("b", first) and not scheduler.remove("c", first)
    own = next(item for item, _ in scheduler._tenants["b"].waiting)
    assert own == only and scheduler.remove("b", own) and not scheduler.remove("b", own)
    assert scheduler.remove("a", first) and scheduler.waiting() == {"a": 2}
    assert [number for _, number, _ in taken(scheduler)] == [1, 2]


def test_no_credit_is_saved_up_by_having_nothing_to_do():
    scheduler = filled(1000, a=[10])
    taken(scheduler)
    scheduler.push("a", ("a", 1, 10), 10)
    assert scheduler._tenants["a"].credit == 0
