"""Which rows are trained on, which choose the best adapter, and which are scored once at the end.

Rows are told apart by what they say, spaces and case aside: equal ones stay on one side, whatever their order. A label
has its share on each side, and a group, where there are any, is never parted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from inlay.errors import UsageError

__all__ = ["HELDOUT_ROWS", "Parts", "content_key", "equal_rows", "halved", "label_numbers", "split_share"]

HELDOUT_ROWS = 1000
"""Rows at most that a share of the data holds out: half of them choose, half are scored at the end."""

Keys = NDArray[np.uint64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Parts:
    """Places of rows, each ascending (int64).

    `wanted` is how many were to be held out; groups may make it others. `unused` are those of a large group, of which
    HELDOUT_ROWS are enough to be scored.
    """

    train: Index
    choosing: Index
    final: Index
    wanted: int
    unused: Index


def content_key(text: str) -> int:
    """64 bits that are equal for texts that differ in spaces and case alone; never 0."""
    plain = " ".join(text.casefold().split()).encode("utf8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "little") or 1


def equal_rows(keys: Keys) -> int:
    """How many rows are equal to an earlier one."""
    return len(keys) - len(np.unique(keys))


def split_share(keys: Keys, share: float, labels: NDArray[np.int64] | None = None, groups: Keys | None = None) -> Parts:
    """Hold out `share` of the rows, HELDOUT_ROWS at most, and part those in two halves.

    `keys` (n,) are those of `content_key`; `labels` (n,) number each row's label from 0; `groups` (n,) are keys of the
    groups' names, 0 for a row that is in none. Raises: UsageError for a share outside [0, 1), or where nothing is left.
    """
    if not 0 <= share < 1:
        raise UsageError(f"the held-out share is {share}", "Give a number from 0 to below 1, or a file.")
    wanted = min(int(share * len(keys) + 0.5), HELDOUT_ROWS)
    units = _Units.of(keys, labels, groups)
    held = units.chosen(wanted) if wanted else np.zeros(len(keys), bool)
    if wanted and not held.any() and units.count > 1:
        held = units.smallest()  # every group is larger than what is asked for
    if len(keys) and held.all():
        raise UsageError(f"no row is left of {len(keys)} to train on", "Hold out fewer.")
    places = np.flatnonzero(held)
    halves = halved(keys[held], None if labels is None else labels[held], None if groups is None else groups[held])
    (choosing, idle), (final, over) = (_enough(places[half], keys) for half in halves)
    return Parts(np.flatnonzero(~held), choosing, final, wanted, np.sort(np.concatenate([idle, over])))


def halved(keys: Keys, labels: NDArray[np.int64] | None = None, groups: Keys | None = None) -> tuple[Index, Index]:
    """Places of the rows that choose and of those for the end, which have the odd one; see `split_share`.

    A single row, or rows that must not be parted, are all for the end.
    """
    units = _Units.of(keys, labels, groups, salt=1)
    if units.count < 2:
        return np.zeros(0, np.int64), np.arange(len(keys))
    chosen = units.chosen(len(keys) // 2)
    if not chosen.any() or chosen.all():
        chosen = units.smallest()
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def _enough(places: Index, keys: Keys) -> tuple[Index, Index]:
    """HELDOUT_ROWS of the rows at `places`, drawn by their content, and the others."""
    order = places[np.argsort(_mixed(keys[places]), kind="stable")]
    return np.sort(order[:HELDOUT_ROWS]), np.sort(order[HELDOUT_ROWS:])


@dataclass
class _Units:
    """Rows that must not be parted are one unit; `of_row` (n,) numbers each row's, in an order that chance decides."""

    of_row: Index
    labels: NDArray[np.int64]
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = int(self.of_row.max()) + 1 if len(self.of_row) else 0

    @classmethod
    def of(cls, keys: Keys, labels: NDArray[np.int64] | None, groups: Keys | None, salt: int = 0) -> _Units:
        names = keys if groups is None else _joined(keys, groups)
        # A bijection, so that names stay apart; the salt makes the order of halves another one than that of shares.
        _, of_row = np.unique(_mixed(names + np.uint64(salt)), return_inverse=True)
        return cls(of_row.astype(np.int64), np.zeros(len(keys), np.int64) if labels is None else labels)

    def smallest(self) -> NDArray[np.bool_]:
        """The rows of the smallest unit, the first of several."""
        return self.of_row == int(np.bincount(self.of_row).argmin())

    def chosen(self, rows: int) -> NDArray[np.bool_]:
        """About `rows` rows, of each label its share: units are taken in their order wherever that comes nearer."""
        left = _quotas(np.bincount(self.labels), rows)
        taken: list[int] = []
        for unit, own in self._contents():
            if sum(abs(left[n] - count) for n, count in own) < sum(abs(left[n]) for n, _ in own):
                taken.append(unit)
                for label, count in own:
                    left[label] -= count
                if not any(left):
                    break
        chosen = np.zeros(self.count, bool)
        chosen[taken] = True
        return chosen[self.of_row]

    def _contents(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Each unit with the labels of its rows and how many each has."""
        many = int(self.labels.max()) + 1 if len(self.labels) else 1
        pairs, counts = np.unique(self.of_row * many + self.labels, return_counts=True)
        unit, own = -1, list[tuple[int, int]]()
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            here, label = divmod(pair, many)
            if here != unit and own:
                yield unit, own
                own = []
            unit = here
            own.append((label, count))
        if own:
            yield unit, own


def _quotas(counts: NDArray[np.int64], rows: int) -> list[int]:
    """`rows` shared out by `counts` (labels,), each share rounded up or down; the largest remainders go up."""
    exact = counts * (rows / max(int(counts.sum()), 1))
    found = np.floor(exact).astype(np.int64)
    up = np.argsort(found - exact, kind="stable")[: rows - int(found.sum())]
    found[up] += 1
    return found.tolist()


def _joined(keys: Keys, groups: Keys) -> Keys:
    """The name (n,) of what each row belongs to: its group, or its own key; groups that share a text are one."""
    names = np.where(groups == 0, keys, groups)
    pairs = np.unique(np.stack([keys, names]), axis=1)
    texts, counts = np.unique(pairs[0], return_counts=True)
    shared = pairs[:, np.isin(pairs[0], texts[counts > 1])]
    parent: dict[int, int] = {}

    def root(name: int) -> int:
        while (up := parent.get(name, name)) != name:
            parent[name] = parent.get(up, up)
            name = parent[name]
        return name

    first: dict[int, int] = {}
    for key, name in zip(*shared.tolist(), strict=True):
        one, other = root(first.setdefault(key, name)), root(name)
        parent[max(one, other)] = min(one, other)
    if not parent:
        return names
    known = np.array(sorted(parent), np.uint64)
    roots = np.array([root(int(name)) for name in known], np.uint64)
    at = np.minimum(np.searchsorted(known, names), len(known) - 1)
    return np.where(known[at] == names, roots[at], names)


def _mixed(values: Keys) -> Keys:
    """splitmix64's last steps (Steele et al. 2014), a bijection."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def label_numbers(labels: Sequence[str]) -> NDArray[np.int64]:
    """Labels as numbers from 0, by their order as words."""
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    return np.fromiter((numbers[label] for label in labels), np.int64, len(labels))
