"""Whose request is next: tenants take turns by their tokens, and one tenant's requests come in order.

Paper: Shreedhar and Varghese 1995, "Efficient Fair Queueing Using Deficit Round Robin".
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["QUANTUM", "Scheduler"]

QUANTUM = 256
"""Tokens that a tenant may take in one turn."""

T = TypeVar("T")


@dataclass
class _Tenant(Generic[T]):
    """What one tenant has waiting, each with its cost, and the tokens that it may take now."""

    waiting: deque[tuple[T, int]] = field(default_factory=deque)
    credit: int = 0


class Scheduler(Generic[T]):
    """Requests of many tenants, each of some cost in tokens.

    Tenants that have something waiting stand in a round. The one whose turn it is gets `quantum` tokens of credit, and
    its requests are next as long as its credit covers them; what is left is for its next turn. So a tenant takes as
    many tokens as any other while both have something waiting, however many requests it has, and one that comes waits
    for one turn of each other at most. A tenant with nothing waiting has no credit.
    """

    def __init__(self, quantum: int = QUANTUM) -> None:
        self.quantum = quantum
        self._tenants: dict[str, _Tenant[T]] = {}
        self._round: deque[str] = deque()
        self._begun = False  # whether the first of the round has had its credit

    def __len__(self) -> int:
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    def waiting(self) -> dict[str, int]:
        """How many requests each tenant has waiting."""
        return {name: len(tenant.waiting) for name, tenant in self._tenants.items()}

    def push(self, tenant: str, item: T, cost: int) -> None:
        """Let a request of a tenant wait; it will cost so many tokens."""
        if tenant not in self._tenants:
            self._tenants[tenant] = _Tenant()
            self._round.append(tenant)
        self._tenants[tenant].waiting.append((item, cost))

    def peek(self) -> T | None:
        """The request that is next, which stays; None where nothing waits."""
        while self._round:
            tenant = self._tenants[self._round[0]]
            if not self._begun:
                tenant.credit += self.quantum
                self._begun = True
            item, cost = tenant.waiting[0]
            if tenant.credit >= cost:
                return item
            self._round.rotate(-1)
            self._begun = False
        return None

    def pop(self) -> T:
        """Take the request that is next. Raises: IndexError where nothing waits."""
        if self.peek() is None:
            raise IndexError("nothing waits")
        name = self._round[0]
        tenant = self._tenants[name]
        item, cost = tenant.waiting.popleft()
        tenant.credit -= cost
        self._leave(name)
        return item

    def remove(self, tenant: str, item: T) -> bool:
        """Take a request out, wherever it stands; False where it does not wait."""
        own = self._tenants.get(tenant)
        found = None if own is None else next((pair for pair in own.waiting if pair[0] is item), None)
        if own is None or found is None:
            return False
        own.waiting.remove(found)
        self._leave(tenant)
        return True

    def repay(self, tenant: str, tokens: int) -> None:
        """Give back what a request was charged and did not take, to a tenant that has more waiting."""
        if tenant in self._tenants:
            self._tenants[tenant].credit += tokens

    def _leave(self, name: str) -> None:
        """A tenant leaves the round when nothing of it waits."""
        if self._tenants[name].waiting:
            return
        if self._round[0] == name:
            self._begun = False
        self._round.remove(name)
        del self._tenants[name]
