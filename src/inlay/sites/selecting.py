"""Parts of a base in words ("layers 8-11 heads 0,3; mlp of last 4"), as sites with the weights that are meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from inlay.errors import UsageError

from .head_features import MIXED, HeadFeatures, head_features
from .site import Site
from .structure import Structure
from .targets import parse_layers

__all__ = ["PartSite", "select_parts"]

EXAMPLES = 'Write "layers 8-11 heads 0,3", "mlp of last 4", "attention of first 2" or "layers 0,3 norms".'
_LIST = r"\d+(?:\s*-\s*\d+)?(?:\s*,\s*\d+(?:\s*-\s*\d+)?)*"
_WORDS = re.compile(
    rf"""(?:of\s+|in\s+|and\s+)?(?:the\s+)?(?:
    (?P<ends>(?:last|first)\s+\d+)(?:\s+layers?)?
    | layers?\s+(?P<layers>{_LIST})
    | (?P<which>query\s+|kv\s+)?heads?\s+(?P<heads>{_LIST})
    | (?P<kind>attention|cross-attention|mlp|norms?)
    | (?P<stack>encoder|decoder)
    )(?![\w-])[\s,]*""",
    re.VERBOSE,
)
KINDS = ("attention", "cross-attention", "mlp", "norms")


@dataclass(frozen=True, eq=False)
class PartSite(Site):
    """A site of which the `rows` or the `columns` of the weight (out, in) are meant, in order; all where both are
    None."""

    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None

    @classmethod
    def of(cls, site: Site, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> PartSite:
        own: dict[str, Any] = {f.name: getattr(site, f.name) for f in fields(Site)}
        chosen = [None if numbers is None else tuple(numbers) for numbers in (rows, columns)]
        return cls(**own, rows=chosen[0], columns=chosen[1])


@dataclass(eq=False)
class _Clause:
    """What stands between two semicolons; `layers` is None where all are meant."""

    text: str
    layers: set[int] | None
    kinds: tuple[str, ...]
    heads: tuple[tuple[str, str], ...]
    stack: str

    def holds(self, site: Site) -> bool:
        there = self.layers is None or (site.layer is not None and site.layer in self.layers)
        return there and (not self.stack or site.stack == self.stack)


def select_parts(base: Structure, text: str) -> list[PartSite]:
    """The sites that `text` names, clauses joined by ";": linear layers with their weights and biases, norms, and the
    rows and columns of heads.

    Raises: UsageError naming a word that cannot be read, what is not there, a parameter of a named part that no site
    holds, or heads that share keys and values with others that are not named.
    """
    whole: dict[str, Site] = {}
    rows: dict[str, set[int]] = {}
    columns: dict[str, set[int]] = {}
    known = {site.path: site for site in _usable(base)}
    for clause in _clauses(base, text):
        found = [site for site in known.values() if clause.holds(site) and _kind(site) in clause.kinds]
        if clause.kinds and not found:
            raise UsageError(f"{clause.text!r} names no linear layer or norm of the base", EXAMPLES)
        _check_all_held(base, clause, known)
        whole.update((site.path, site) for site in found)
        if clause.heads:
            _add_heads(base, clause, rows, columns)
    if lost := next((path for path in (*rows, *columns) if path not in known), None):
        raise UsageError(f"heads of {lost} cannot be trained: {base.observed.unusable[lost]}", "Name other parts.")
    if both := next((path for path in rows if path in columns and path not in whole), None):
        raise UsageError(f"heads choose rows and columns of {both}", "Name whole layers.")
    return [
        PartSite.of(site) if path in whole else PartSite.of(
            site, sorted(rows[path]) if path in rows else None, sorted(columns[path]) if path in columns else None
        )
        for path, site in known.items() if path in whole or path in rows or path in columns
    ]  # fmt: skip


def _usable(base: Structure) -> list[Site]:
    inside = [site for site in base.projections if site.layer is not None]
    return [*(site for site in inside if site.path not in base.observed.unusable), *base.norms]


def _kind(site: Site) -> str:
    return "norms" if site.kind == "norm" else site.part


def _clauses(base: Structure, text: str) -> Iterator[_Clause]:
    pieces = [piece.strip() for piece in text.split(";") if piece.strip()]
    if not pieces:
        raise UsageError("no part of the base is named", EXAMPLES)
    for piece in pieces:
        yield _clause(piece, 1 + max(base.blocks.values(), default=-1))


def _clause(text: str, count: int) -> _Clause:
    layers: set[int] | None = None
    kinds: list[str] = []
    heads: list[tuple[str, str]] = []
    stack, at = "", 0
    while at < len(text):
        found = _WORDS.match(text, at)
        if found is None:
            raise UsageError(f"{text[at:]!r} in {text!r} cannot be read", EXAMPLES)
        at = found.end()
        if spec := found["ends"] or found["layers"]:
            if layers is not None:
                raise UsageError(f"{text!r} names layers twice", 'Part what is meant of each by ";".')
            layers = parse_layers(spec, count)
        elif found["heads"]:
            heads.append(((found["which"] or "").strip(), found["heads"]))
        elif found["kind"]:
            kinds.append("norms" if found["kind"].startswith("norm") else found["kind"])
        else:
            stack = found["stack"]
    return _Clause(text, layers, tuple(kinds) if kinds or heads else KINDS, tuple(heads), stack)


def _check_all_held(base: Structure, clause: _Clause, known: dict[str, Site]) -> None:
    """Raises: UsageError where a part that is named whole has a parameter that would stay as it is."""
    norms = {site.path for site in base.scales}
    for name, _ in base.model.named_parameters():
        block = next((path for path in base.blocks if name.startswith(path + ".")), None)
        owner = name.rpartition(".")[0]
        if block is None or owner in known:
            continue
        inside = [site for site in base.attentions.values() if f"{owner}.".startswith(site.path + ".")]
        kind = "norms" if owner in norms else inside[-1].part if inside else "mlp"
        there = clause.layers is None or base.blocks[block] in clause.layers
        if there and kind in clause.kinds:
            what = (
                f"{clause.text!r} would leave {name} as it is: it belongs to no linear layer or norm that can be told"
            )
            raise UsageError(what, "Name other parts, such as norms or heads.")


# ---- heads


def _add_heads(base: Structure, clause: _Clause, rows: dict[str, set[int]], columns: dict[str, set[int]]) -> None:
    part = "cross-attention" if "cross-attention" in clause.kinds else "attention"
    seen = [own for own in head_features(base) if own.site.part == part and clause.holds(own.site)]
    if not seen:
        what = f"{clause.text!r} names heads, and no {part} there goes through transformers' interface"
        raise UsageError(what, "Heads are seen there alone: name layers, attention or mlp.")
    for own in seen:
        queries, keys, outputs = _numbers(own, clause)
        _add(rows, own.queries, queries, own.site, "queries")
        _add(rows, own.keys, keys, own.site, "keys and values")
        _add(columns, own.outputs, outputs, own.site, "output")


def _numbers(own: HeadFeatures, clause: _Clause) -> tuple[set[int], set[int], set[int]]:
    """The heads of queries, of keys and values, and of outputs."""
    queries: set[int] = set()
    keys: set[int] = set()
    plain: set[int] = set()
    for which, listed in clause.heads:
        there = own.shared if which == "kv" else own.heads
        numbers = _parsed(listed, there, own.site.path, f"{which} heads".strip())
        if which == "kv":
            keys |= numbers
        else:
            queries |= numbers
            plain |= numbers if not which else set()
    for head in plain:
        if lacking := own.group(head) - queries:
            others = ",".join(map(str, sorted(lacking)))
            what = f"head {head} of {own.site.path} shares its keys and values with heads {others}"
            raise UsageError(
                what, f'Name them too, or write "query heads {head}" to leave keys and values as they are.'
            )
        keys.add(head * own.shared // own.heads)
    return queries, keys, queries


def _parsed(listed: str, count: int, path: str, what: str) -> set[int]:
    numbers: set[int] = set()
    for piece in listed.split(","):
        first, _, last = piece.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    if wrong := [n for n in sorted(numbers) if n >= count]:
        raise UsageError(f"{path} has no {what} {wrong[0]}", f"It has {count}, counted from 0.")
    return numbers


def _add(found: dict[str, set[int]], owners: dict[str, Tensor] | Any, heads: set[int], site: Site, what: str) -> None:
    for head in heads:
        if mixed := next((path for path, owner in owners.items() if bool((owner == MIXED).any())), None):
            raise UsageError(
                f"several heads of {site.path} depend on one feature of {mixed}", "Name layers or attention."
            )
        there = {path: torch.nonzero(owner == head).flatten().tolist() for path, owner in owners.items()}
        if not any(there.values()):
            raise UsageError(
                f"the {what} of head {head} of {site.path} depend on no feature of its own", "Name layers."
            )
        for path, numbers in there.items():
            if numbers:
                found.setdefault(path, set()).update(numbers)
