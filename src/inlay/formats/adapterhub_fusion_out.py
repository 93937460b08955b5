"""Writes AdapterFusion as AdapterHub's fusion; see `inlay.formats.adapterhub_fusion`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from inlay.errors import UsageError
from inlay.methods.contract import Structure

from .adapterhub_fusion import CONTAINER, OWN, Used, listed, otherwise, reads_of, sites_of
from .adapterhub_keys import HubKey, Written, block_of
from .adapterhub_places import places_of
from .parts import SavedPart

__all__ = ["labels_of", "write_fusion"]

INSTEAD = 'Save it with format="peft".'


def write_fusion(part: SavedPart, base: Structure, used: Used) -> Written:
    """The settings of a fusion over the adapters `used`, and its tensors.

    Raises: UsageError where AdapterHub has no place for it, or would compute otherwise.
    """
    method: Any = part.method
    if not hasattr(method, "query_before_ln"):
        raise UsageError(f"AdapterHub has no {method.title}", INSTEAD)
    _check(part, base, used)
    places = places_of(base)
    held = {"attention": places.attention, "mlp": places.mlp}
    tensors: dict[HubKey, Tensor] = {}
    for path, site in part.sites.items():
        if site.part not in held:
            raise UsageError(f"AdapterHub has no place behind {path}", INSTEAD)
        for name, (key, _) in method.peft_keys(site).items():
            place = f"{block_of(path, base)}.{held[site.part]}"
            tensors[HubKey(place, CONTAINER, key.removeprefix(f"{CONTAINER}."))] = part.params[path][name]
    settings = {name: getattr(method, name) for name in OWN}
    more = {"temperature": False, "value_before_softmax": True, "value_initialized": method.value}
    return {**settings, **more, "dropout_prob": method.dropout or None}, tensors


def _check(part: SavedPart, base: Structure, used: Used) -> None:
    method: Any = part.method
    if why := otherwise(used):
        raise UsageError(f"{method.title} is over adapters where {why}", INSTEAD)
    title, places, reads = method.title, places_of(base), reads_of(used)
    if len(base.stacks) > 1:
        raise UsageError(f"{title} in an encoder-decoder is not written for AdapterHub", INSTEAD)
    if part.sites.keys() != sites_of(used).keys():
        what = f"{title} is at some of the sublayers of its adapters, and AdapterHub's at all of them"
        raise UsageError(what, f"Leave targets out. {INSTEAD}")
    if reads == "output" and not method.query_before_ln:
        what = f"{title} asks with the stream, where AdapterHub asks with what its adapters read"
        raise UsageError(what, f"Train it with query_before_ln=true. {INSTEAD}")
    if reads == "behind" and places.other_stream:
        raise UsageError(f"{title} reads the stream that AdapterHub computes otherwise in this model", INSTEAD)


def labels_of(names: Sequence[str]) -> list[str]:
    """What AdapterHub is to call the adapters of these names, or of these folders: words without signs.

    Raises: UsageError where two of them would be called alike.
    """
    for called in ([Path(name).name for name in names], names):
        labels = [re.sub(r"\W", "_", one) for one in called]
        if len(set(labels)) == len(labels):
            return labels
    raise UsageError(f"AdapterHub would call two of {listed(names)} alike", "Give them other names.")
