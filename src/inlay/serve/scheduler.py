"""Whose request is next: the tenant's that has been served least, and one tenant's requests come in order.

Every token that is read or written for a tenant is counted. A tenant that comes back does not catch up on the time
when it asked for nothing: its count begins where the least of those that are busy is.

    next = the waiting tenant of the least count        count += tokens of the prompt, then 1 for each token written

Whose turn it is does not say how long a step takes, and that is what others feel of a tenant that has many rows
(`heavy`): their own tokens come with its, and each of its prompts is read between two of them. So beside others it has
an even share of the rows at most, and its requests begin in groups, one in `EVERY` steps, of about `BURST` tokens; what
a long prompt takes beyond that is made up for by waiting. While it is alone, an eighth of the rows waits for others
that were there before.

Paper: Sheng et al. 2024, "Fairness in Serving Large Language Models" (arXiv:2401.00588), its virtual token counter.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["BURST", "EVERY", "HEAVY", "PRESENT", "Scheduler", "full"]

HEAVY = 4
"""How many times the rows of another a tenant has that is heavy."""
EVERY, BURST = 8, 256
"""Steps from one group of a heavy tenant's requests to the next, and tokens of prompts in a group."""
PRESENT = 64
"""Steps for which a tenant that has nothing to do still counts as there."""

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class _Waiting(Generic[T]):
    """A request, the tokens of its prompt, and its answers."""

    item: T
    cost: int
    rows: int


class Scheduler(Generic[T]):
    """Requests of many tenants: `push` lets one wait, `take` hands one over, `end` says that it has ended.

    `most` answers are written at once, in steps; where it is None they are written batch after batch, and nobody is
    heavy.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._waiting: dict[str, deque[_Waiting[T]]] = {}
        self._flying: dict[T, tuple[str, int]] = {}
        self._rows: Counter[str] = Counter()
        self._count: Counter[str] = Counter()
        self._least, self._seen, self._known = 0, dict[str, int](), set[str]()
        self._step = 0
        self._group, self._tokens = -EVERY, 0  # when requests of heavy tenants began, and with how many tokens

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def waiting(self) -> dict[str, int]:
        """How many requests each tenant has waiting."""
        return {name: len(own) for name, own in self._waiting.items()}

    def push(self, tenant: str, item: T, cost: int, rows: int = 1) -> None:
        """Let a request of a tenant wait, whose prompt has `cost` tokens and which gets so many answers."""
        if tenant not in self._waiting and not self._rows[tenant]:
            busy = [self._count[name] for name in self._busy()]
            self._count[tenant] = max(self._count[tenant], min(busy, default=self._least))
        self._waiting.setdefault(tenant, deque()).append(_Waiting(item, cost, rows))
        self._seen[tenant] = self._step
        self._known.add(tenant)

    def take(self, fits: Callable[[T], bool] = lambda item: True) -> T | None:
        """The request that is next, which leaves; None where nothing waits, or what is next has to. `fits` says whether
        a request could begin now: where the next cannot, nobody overtakes it, unless its tenant is heavy."""
        for name in sorted(self._waiting, key=lambda name: (self._count[name], self._rows[name])):
            heavy, first = self.heavy(name), self._waiting[name][0]
            if self._waits(name, first.rows, heavy):
                continue
            if fits(first.item):
                self._begin(name, first, heavy)
                return first.item
            if not heavy:
                return None
        return None

    def remove(self, tenant: str, item: T) -> bool:
        """Take a request out that waits; False where it does not."""
        own = self._waiting.get(tenant, deque())
        found = next((one for one in own if one.item is item), None)
        if found is None:
            return False
        own.remove(found)
        self._left(tenant)
        return True

    def charge(self, tokens: Mapping[str, int]) -> None:
        """So many tokens were written for each tenant."""
        self._count.update(tokens)

    def end(self, item: T) -> None:
        """A request that was taken has ended; nothing where it was not."""
        tenant, rows = self._flying.pop(item, ("", 0))
        if rows:
            self._rows[tenant] -= rows
            self._left(tenant)

    def stepped(self) -> None:
        """A step has been made for all that were taken."""
        self._step += 1
        if self._step % PRESENT == 0:
            self._forget()

    def heavy(self, tenant: str) -> bool:
        """Whether a tenant has many times the rows of another that is there."""
        others = [self._rows[name] for name in self._present() if name != tenant]
        return self.most is not None and bool(others) and self._rows[tenant] >= HEAVY * max(1, min(others))

    # ---- inside

    def _begin(self, name: str, first: _Waiting[T], heavy: bool) -> None:
        self._waiting[name].popleft()
        self._flying[first.item] = name, first.rows
        self._rows[name] += first.rows
        self._count[name] += first.cost
        if heavy:
            self._tokens = first.cost + (self._tokens if self._group == self._step else 0)
            self._group = self._step
        self._left(name)

    def _waits(self, name: str, rows: int, heavy: bool) -> bool:
        """Whether a tenant leaves what is free to others: some rows to those that are known, and may come back."""
        if self.most is None or len(self._known) < 2:
            return False
        share = self.most // len(self._present()) if heavy else self.most - self.most // 8
        over = self._rows[name] > 0 and self._rows[name] + rows > share
        return over or (heavy and not self._may_join())

    def _may_join(self) -> bool:
        """Whether requests of heavy tenants may begin in this step."""
        if self._group == self._step:
            return self._tokens < BURST
        return self._step - self._group >= max(EVERY, self._tokens * EVERY // BURST)

    def _present(self) -> list[str]:
        return [name for name, seen in self._seen.items() if self._there(name, seen)]

    def _there(self, name: str, seen: int) -> bool:
        return name in self._waiting or self._rows[name] > 0 or self._step - seen <= PRESENT

    def _busy(self) -> set[str]:
        return {*self._waiting, *(name for name, rows in self._rows.items() if rows > 0)}

    def _left(self, name: str) -> None:
        """A tenant may have nothing waiting any more, and nothing under way."""
        self._seen[name] = self._step
        if not self._waiting.get(name, True):
            del self._waiting[name]
        if name not in self._waiting and not self._rows[name]:
            self._least = max(self._least, self._count[name])

    def _forget(self) -> None:
        """Tenants that have not been there for long are not held: they come back with the count of the others."""
        gone = [name for name, seen in self._seen.items() if not self._there(name, seen)]
        for name in gone:
            del self._seen[name], self._count[name], self._rows[name]


def full(waiting: Mapping[str, int], tenant: str, most: int) -> bool:
    """Whether `most` requests wait, given how many of each tenant do. Of several tenants those that have an even share
    waiting leave an eighth of the places to the others."""
    share = most // max(2, sum(count > 0 for count in waiting.values()))
    left = most // 8 if len(waiting) > 1 and waiting.get(tenant, 0) >= share else 0
    return sum(waiting.values()) >= most - left
