"""Turns what people write as targets (names, groups, regexes, layers) into sites, and says what matched nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from inlay.errors import UsageError

from .site import Site
from .structure import Structure

__all__ = ["GROUPS", "Targets", "check_pattern", "endings", "parse_layers", "select_projections"]

Targets = str | Sequence[str]
Layers = str | int | Sequence[int] | None

GROUPS = ("all-linear", "attention", "mlp", "qv", "qkv")
"""Named groups. `qv` and `qkv` take the fused projection where q, k and v are one weight."""


def select_projections(base: Structure, targets: Targets, layers: Layers = None) -> list[Site]:
    """The projections and embeddings that `targets` name.

    `targets` is a group, a module name (matched as the last components of a path), a regular expression over the
    whole path, or a list of groups and names; `layers` keeps the sites of some blocks ("8-11", "last 4", [0, 3]).

    Modules on which hooks were seen not to act (`base.observed.unusable`) are left out.

    Raises: UsageError naming a target that matched nothing, with the candidates, or no module that can be used, and
    why.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise UsageError("targets are an empty list", f"Name modules, or a group: {', '.join(GROUPS)}.")
    chosen: dict[str, Site] = {}
    named, alone = _by_ending(base), isinstance(targets, str)
    for target in wanted:
        matched = _group(base, target) if target in GROUPS else _named(base, named, target, alone)
        if not matched:
            raise UsageError(f"target {target!r} matches no module of the base", _candidates(base, target))
        chosen.update({site.path: site for site in _usable(base, target, matched)})
    if layers is not None:
        kept = parse_layers(layers, 1 + max(base.blocks.values(), default=-1))
        chosen = {path: site for path, site in chosen.items() if site.layer in kept}
        if not chosen:
            raise UsageError(f"layers {layers!r} hold none of the targets {targets!r}", "Name other layers.")
    order = {s.path: i for i, s in enumerate([*base.tables, *base.projections])}
    return sorted(chosen.values(), key=lambda s: order[s.path])


def _usable(base: Structure, target: str, matched: list[Site]) -> list[Site]:
    """Those of `matched` on which hooks act, tables with their scale."""
    why, tables = {**base.observed.unusable, **base.idle_tables}, {site.path: site for site in base.embeddings}
    found = [tables.get(site.path, site) for site in matched if site.path not in why]
    if not found:
        path = matched[0].path
        raise UsageError(f"target {target!r} names {path}, which {why[path]}", _candidates(base, target))
    return found


def check_pattern(pattern: str, what: str) -> None:
    """Raises: UsageError where `pattern` is no regular expression; `what` says whose it is."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{what} holds {pattern!r}, which is no regular expression ({error})", "Mend it.") from None


def parse_layers(layers: str | int | Sequence[int], count: int) -> set[int]:
    """Layer numbers from 5, "8-11", "0,3,5-7", "last 4", "first 2" or a list; negative ones count from the end."""
    if isinstance(layers, int):
        layers = [layers]
    if not isinstance(layers, str):
        numbers = {int(n) + (count if int(n) < 0 else 0) for n in layers}
    elif ends := re.fullmatch(r"\s*(last|first)\s+(\d+)\s*", layers):
        n = min(int(ends[2]), count)
        numbers = set(range(count - n, count)) if ends[1] == "last" else set(range(n))
    else:
        numbers = set()
        for piece in layers.split(","):
            span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
            if not span:
                raise UsageError(f"layers {layers!r} cannot be read", 'Write "8-11", "0,3", "last 4" or "first 2".')
            numbers |= set(range(int(span[1]), int(span[2] or span[1]) + 1))
    if wrong := sorted(n for n in numbers if not 0 <= n < count):
        raise UsageError(f"layer {wrong[0]} does not exist", f"The base has layers 0 to {count - 1}.")
    return numbers


def _group(base: Structure, group: str) -> list[Site]:
    inside = [s for s in base.projections if s.layer is not None]
    if group == "all-linear":
        return inside or [s for s in base.projections if s.part != "head"]
    if group == "mlp":
        return [s for s in inside if s.part == "mlp"]
    attention = [s for s in inside if "attention" in s.part]
    if group == "attention":
        return attention
    return [s for s in attention if s.role == "qkv" or (s.role and s.role in group)]


def endings(path: str) -> list[str]:
    """What may name a module: its path, and the path's ends behind each dot."""
    names = path.split(".")
    return [".".join(names[n:]) for n in range(len(names))]


def _by_ending(base: Structure) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = {}
    for site in [*base.tables, *base.projections]:
        for name in endings(site.path):
            found.setdefault(name, []).append(site)
    return found


def _named(base: Structure, named: Mapping[str, list[Site]], target: str, alone: bool) -> list[Site]:
    found = named.get(target, [])
    if found or not alone:
        return found
    sites = [*base.tables, *base.projections]
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise UsageError(f"target {target!r} is not a regular expression: {error}", _candidates(base, target)) from None
    return [s for s in sites if pattern.fullmatch(s.path)]


def _candidates(base: Structure, target: str) -> str:
    unusable = {**base.observed.unusable, **base.idle_tables}
    names = sorted({s.name for s in [*base.tables, *base.projections] if s.path not in unusable})
    close = difflib.get_close_matches(target, [name for name in (*names, *GROUPS) if name != target], n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    held = ", ".join(dict.fromkeys(site.name for site in base.experts))
    experts = f' The parameters {held} hold experts: LoRA takes them by its target "experts".' if held else ""
    return f"{hint}Candidates: {', '.join(names)}; groups: {', '.join(GROUPS)}.{experts}"
