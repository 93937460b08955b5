"""The rows of a run: those to train on, those held out, and facts about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inlay.data.choose import Columns, check_columns, choose_template
from inlay.data.choose_head import head_template
from inlay.data.conflicts import conflict_notices
from inlay.data.encode import PIECE
from inlay.data.labels import label_notices
from inlay.data.prompting import adapted_template
from inlay.data.split import content_key, equal_rows, halved, label_numbers, split_share
from inlay.data.table import Rows, Table, duplicates, read_table, shuffled
from inlay.data.template import Template
from inlay.errors import DroppedRow, UsageError
from inlay.evaluation.intervals import FEW

from .settings import Settings

__all__ = ["Dataset", "lengths", "load_dataset"]

NAMED = 5
"""Rows or labels that a message names before it counts the rest."""

CHUNK = 1024
"""Rows between two reports of progress."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Dataset:
    """Rows to train on; rows held out that choose the best adapter, and those that are scored once at the end.

    `template` is for all of them, `digests` name the files' content, `labels` count those of the training rows.
    `duplicates` rows are the same as an earlier one, `equal` ones the same up to spaces and case; `shared` are rows of
    a held-out file that are equal to one trained on. `notices` are sentences for people.
    """

    rows: Rows
    choosing: Rows
    final: Rows
    template: Template
    digests: dict[str, str]
    labels: dict[str, int]
    duplicates: int
    equal: int
    shared: int
    notices: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        held = {"choosing_rows": len(self.choosing), "final_rows": len(self.final)}
        counts: dict[str, Any] = {**self.digests, "rows": len(self.rows), "heldout_rows": sum(held.values()), **held}
        counts |= {"duplicates": self.duplicates, "equal_rows": self.equal, "heldout_in_training": self.shared}
        return counts | ({"labels": self.labels} if self.labels else {})

    def where(self, samples: Sequence[int]) -> str:
        """The files and lines of the training rows that some examples come from, for people."""
        chosen = list(dict.fromkeys(sample % (1 << PIECE) for sample in samples))
        named = [row.where for row in self.rows.numbered(chosen[:NAMED])]
        return "; ".join(named) + (f" and {len(chosen) - NAMED} more" if len(chosen) > NAMED else "")


@dataclass(frozen=True)
class _Facts:
    """What the split needs of rows (n,): the keys of their content and groups, and their labels.

    They are those at the places `good` of all rows, those at `bad` being of no use: they are trained on, which counts
    them by reason.
    """

    good: NDArray[np.int64]
    bad: NDArray[np.int64]
    keys: NDArray[np.uint64]
    labels: list[str] | None
    groups: NDArray[np.uint64] | None

    @property
    def numbers(self) -> NDArray[np.int64] | None:
        return None if self.labels is None else label_numbers(self.labels)


def load_dataset(
    settings: Settings, template: Template | None = None, on_progress: OnProgress | None = None
) -> Dataset:
    """Read the files of `settings` and split their rows; `template` is used where they choose none.

    `on_progress` is called with the rows read so far and of how many. Raises: UsageError and DataError as reading and
    templates do.
    """
    table = read_table(settings.data, settings.split)
    template = _template(settings, table, template)
    rows = shuffled(table.rows, settings.seed)[: settings.limit]
    facts = _facts(table, rows, template, settings.group, on_progress)
    notices, digests = list(table.notices), {"digest": table.digest}
    try:
        share = float(settings.heldout)
    except ValueError:
        return _beside(settings, table, rows, facts, template)
    parts = split_share(facts.keys, share, facts.numbers, facts.groups)
    held = len(parts.choosing) + len(parts.final)
    if facts.groups is not None and held != parts.wanted:
        notices.append(f"{held} rows are held out in place of {parts.wanted}, because --group keeps rows together")
    labels = None if facts.labels is None else [facts.labels[n] for n in parts.train.tolist()]
    train = np.sort(np.concatenate([facts.good[parts.train], facts.bad]))
    choosing, final = (rows.take(facts.good[part]) for part in (parts.choosing, parts.final))
    return Dataset(
        rows.take(train), choosing, final, template, digests, _counted(labels),
        duplicates(rows), equal_rows(facts.keys), 0, (*notices, *_conflicts(rows, facts), *_notices(labels, held)),
    )  # fmt: skip


def _beside(settings: Settings, table: Table, rows: Rows, facts: _Facts, template: Template) -> Dataset:
    """A dataset whose held-out rows are in a file of their own."""
    other = read_table(settings.heldout, settings.split)
    check_columns(template, other)
    theirs = _facts(other, other.rows, template, settings.group, None)
    choosing, final = halved(theirs.keys, theirs.numbers, theirs.groups)
    shared = int(np.isin(theirs.keys, facts.keys).sum())
    notices = [*table.notices, *other.notices, *_conflicts(rows, facts), *_notices(facts.labels, len(other.rows))]
    if len(theirs.bad):
        notices.append(f"{len(theirs.bad)} of the {len(other.rows)} held-out rows are of no use: no text or no label")
    if shared:
        notices.append(f"{shared} of the {len(other.rows)} held-out rows are trained on too: their scores flatter")
    digests = {"digest": table.digest, "heldout_digest": other.digest}
    halves = (other.rows.take(theirs.good[half]) for half in (choosing, final))
    return Dataset(
        rows, *halves, template=template, digests=digests, labels=_counted(facts.labels),
        duplicates=duplicates(rows), equal=equal_rows(facts.keys), shared=shared, notices=tuple(notices),
    )  # fmt: skip


def lengths(sizes: NDArray[Any]) -> dict[str, Any]:
    """How long examples are, by their `sizes` (n,) in tokens: counts between edges, the mean and the longest."""
    longest = int(sizes.max())
    width = max(1, -(-longest // 16))
    counts = np.bincount(sizes // width).tolist()
    edges = [n * width for n in range(len(counts) + 1)]
    return {"edges": edges, "counts": counts, "mean": float(sizes.mean()), "longest": longest}


# ---- what rows say


def _template(settings: Settings, table: Table, given: Template | None) -> Template:
    if given is not None:
        found = adapted_template(given, table, settings.template, settings.verbalizer, settings.columns)
        check_columns(found, table)
        return found
    if settings.task not in (None, "generate"):
        if settings.verbalizer is not None:
            raise UsageError(f"a verbalizer is for answers in words, and the task is {settings.task}", "Leave it out.")
        return head_template(table, settings.task, Columns(**settings.columns), settings.template)
    return choose_template(table, Columns(**settings.columns), settings.template, settings.verbalizer)


def _facts(table: Table, rows: Rows, template: Template, group: str | None, on_progress: OnProgress | None) -> _Facts:
    """One pass over the rows. Raises: DataError naming a row whose label has no words."""
    if group is not None and group not in table.columns:
        raise UsageError(f"there is no column {group!r} to group by", f"Columns: {', '.join(table.columns)}.")
    keys, groups = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64)
    labels: list[str] = []
    for n, row in enumerate(rows):
        try:
            label = template.label_of(row) if template.kind == "label" else ""
            keys[n] = content_key(template.content_of(row))
        except DroppedRow:
            continue
        labels.append(label)
        if group is not None and (name := str(row.values.get(group) or "").strip()):
            groups[n] = content_key(f"\0{name}")
        if on_progress is not None and n % CHUNK == 0:
            on_progress(n, len(rows))
    good = keys != 0  # no key is 0
    known = labels if template.kind == "label" else None
    own = None if group is None else groups[good]
    return _Facts(np.flatnonzero(good), np.flatnonzero(~good), keys[good], known, own)


def _counted(labels: list[str] | None) -> dict[str, int]:
    """How many rows each label has; nothing for rows without labels."""
    return dict(sorted(Counter(labels or ()).items()))


def _conflicts(rows: Rows, facts: _Facts) -> list[str]:
    """What should be known of equal texts with different labels; nothing for rows without labels."""
    return [] if facts.labels is None else conflict_notices(rows.take(facts.good), facts.keys, facts.labels)


def _notices(labels: list[str] | None, held: int) -> list[str]:
    """What should be known of labels and counts before any training."""
    notices = label_notices(_counted(labels))
    if len(notices) > NAMED:
        notices = [*notices[:NAMED], f"and {len(notices) - NAMED} more labels are as rare"]
    if 0 < held < 2 * FEW:
        notices.append(f"{held} rows are held out: too few for scores that say much")
    return notices
