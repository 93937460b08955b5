"""LoRA of experts that were modules of their own when it was trained, as LoRA of the parameters that hold them now.

An earlier transformers had a linear layer for each expert: `experts.3.gate_proj`, or `experts.3.w1`. How their weights
became one parameter is read off transformers' own conversion of such bases. Where gate and up became one matrix, so do
their products, exactly:

    [Wg + s Bg Ag; Wu + s Bu Au] = [Wg; Wu] + s [Bg 0; 0 Bu] [Ag; Au]

of the rank of both together. Experts and matrices that the file has nothing for get zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.errors import FormatError
from inlay.methods.common import patterned
from inlay.methods.contract import Site, Structure

from .parts import ROOT

__all__ = ["join_experts"]

KEY = re.compile(r"(?P<around>.+)\.(?P<number>\d+)\.(?P<name>\w+)\.lora_(?P<side>[AB])(\.\w+)?\.weight")
REMEDY = "Load it with HF PEFT and the transformers that it was trained with."


class Place(NamedTuple):
    """Where the matrix of one name goes: the parameter, and which of the `parts` equal ones of its rows it is."""

    site: Site
    part: int
    parts: int


Sides = dict[str, Tensor]
Found = dict[str, dict[int, dict[int, Sides]]]
"""Path of a parameter -> part -> expert -> A and B."""


def join_experts(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], base: Structure, where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config` and `stored` (by true names) with the tensors of single experts joined: A (E, R, in), B (E, out, R).

    They have no dropout then, which only training would feel. Raises: FormatError where they cannot be joined.
    """
    keys = _keys(stored, base)
    if not keys:
        return dict(config), dict(stored)
    rest = {key: value for key, value in stored.items() if key not in keys}
    places: dict[tuple[str, str], Place] = {}
    found: Found = {}
    scales: dict[tuple[str, int, int], float] = {}
    for key, match in keys.items():
        spot = match["around"], match["name"]
        place = places[spot] = places.get(spot) or _place(*spot, base, where)
        number = int(match["number"])
        if number >= place.site.experts:
            raise FormatError(f"{where} holds {key!r}, the base {place.site.experts} experts", "It is of another base.")
        found.setdefault(place.site.path, {}).setdefault(place.part, {}).setdefault(number, {})[match["side"]] = stored[
            key
        ]
        scales[place.site.path, place.part, number] = _scale(config, f"{match['around']}.{number}.{match['name']}")
    ranks, alphas, sites = {}, {}, {place.site.path: place for place in places.values()}
    for path, parts in found.items():
        own = {spot[1:]: scale for spot, scale in scales.items() if spot[0] == path}
        scale = next(iter(own.values()))
        a, b = _joined(sites[path], parts, {spot: s / scale for spot, s in own.items()}, where)
        rest |= {f"{ROOT}{path}.lora_A.weight": a, f"{ROOT}{path}.lora_B.weight": b}
        rank = ranks[re.escape(path)] = a.shape[1]
        alphas[re.escape(path)] = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
    return {
        **config,
        "lora_dropout": 0.0,
        "target_parameters": [*(config.get("target_parameters") or ()), *found],
        "rank_pattern": ranks | (config.get("rank_pattern") or {}),
        "alpha_pattern": alphas | (config.get("alpha_pattern") or {}),
    }, rest


def _keys(stored: Mapping[str, Tensor], base: Structure) -> dict[str, re.Match[str]]:
    """Keys of single experts of a module that holds them as parameters here."""
    keys = {key: match for key in stored if (match := KEY.fullmatch(key.removeprefix(ROOT))) is not None}
    around = {site.path.rpartition(".")[0] for site in base.experts} if keys else set()
    return {key: match for key, match in keys.items() if match["around"] in around}


def _joined(
    place: Place, parts: dict[int, dict[int, Sides]], scales: Mapping[Any, float], where: str
) -> tuple[Tensor, Tensor]:
    """A (E, R, in) and B (E, out, R) of one parameter; R is the sum of the ranks of its parts."""
    site = place.site
    rows = site.out_features // place.parts
    ranks = {part: max(len(sides.get("A", ())) for sides in own.values()) for part, own in sorted(parts.items())}
    like = next(iter(next(iter(parts.values())).values()))
    dtype = next(iter(like.values())).dtype
    a = torch.zeros(site.experts, sum(ranks.values()), site.in_features, dtype=dtype)
    b = torch.zeros(site.experts, site.out_features, sum(ranks.values()), dtype=dtype)
    first = 0
    for part, rank in ranks.items():
        for expert, sides in parts[part].items():
            down, up = sides.get("A"), sides.get("B")
            if down is None or up is None:
                raise FormatError(f"{where} lacks A or B of expert {expert} of {site.path}", "It is not whole.")
            if down.shape != (len(down), site.in_features) or up.shape != (rows, len(down)):
                shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
                raise FormatError(
                    f"A and B of expert {expert} of {site.path} in {where} are {shapes}", "Another base's."
                )
            a[expert, first : first + len(down)] = down
            b[expert, part * rows : (part + 1) * rows, first : first + len(down)] = up * scales[part, expert]
        first += rank
    return a, b


def _scale(config: Mapping[str, Any], path: str) -> float:
    """alpha / r, or alpha / sqrt(r), of the layer that was at `path`."""
    r = patterned(config.get("rank_pattern") or {}, path, config["r"])
    alpha = patterned(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _place(around: str, name: str, base: Structure, where: str) -> Place:
    """Raises: FormatError where transformers does not say that the matrix became a part of a parameter's rows."""
    sites = {site.path: site for site in base.experts}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        rules = [rule for rule in get_model_conversion_mapping(base.model) if isinstance(rule, WeightConverter)]  # pyright: ignore
        path, pattern = rename_source_key(f"{around}.0.{name}.weight", [], rules)
    except (ImportError, AttributeError, TypeError):
        rules, path, pattern = [], "", None
    rule = next((rule for rule in rules if pattern in rule.source_patterns), None)
    made = [] if rule is None else [(type(op).__name__, getattr(op, "dim", None)) for op in rule.operations]
    plain = made in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    if rule is None or pattern is None or path not in sites or not plain or sites[path].stored_transposed:
        what = f"{where} holds LoRA of single experts, {around}.0.{name} for one, which the base holds as parameters"
        raise FormatError(what, REMEDY)
    return Place(sites[path], rule.source_patterns.index(pattern), len(rule.source_patterns))
