"""AdapterHub's keys: a module of the base, a container of adapters in it, an adapter's name, a parameter.

    model.layers.0.self_attn.q_proj . loras . NAME . lora_A

A file is read by what its keys say, so that every model is read alike; the names of containers that stand in a block
itself, in no module of its, say which part of the block they are of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from inlay.errors import FormatError
from inlay.methods.contract import Site, Structure

from .tensors import check_numbers

__all__ = ["MATRICES", "HubFile", "HubKey", "Written", "block_of", "check_blocks", "check_settings", "model_prefix"]

MATRICES: tuple[str, ...] = ("q", "k", "v")
"""What AdapterHub calls the projections of attention, in the order of a fused weight."""

CONTAINERS = (
    "adapters", "loras", "refts", "prefix_tunings", "prefix_gates", "prompt_tunings", "invertible_adapters",
    "shared_parameters", "adapter_fusion_layer",
)  # fmt: skip
POOL = ".prefix_tuning.pool"
"""Where every attention shows again what the model has once."""


class HubKey(NamedTuple):
    """`place` is the path of the module that holds the container, `kind` the container's name."""

    place: str
    kind: str
    end: str


Written = tuple[dict[str, Any], dict[HubKey, Tensor]]
"""A config, and the tensors by their keys."""


class HubFile:
    """The tensors of one file by their keys; what is read is taken out.

    `own_heads` is whether it was saved from a model with AdapterHub's own heads.

    Raises: FormatError naming a tensor that is of no adapter called `name`, or of whole numbers.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: Structure, where: str) -> None:
        name = config["name"]
        self.base, self.where, self.version = base, where, str(config.get("version") or "")
        self.own_heads = str(config.get("model_class") or "").endswith("AdapterModel")
        self._prefix = str(getattr(base.model, "base_model_prefix", "") or "")
        self.left: dict[HubKey, Tensor] = {}
        pattern = re.compile(rf"(?:(.+?)\.)?({'|'.join(CONTAINERS)})\.{re.escape(name)}\.(.+)")
        for key, value in tensors.items():
            match = pattern.fullmatch(key)
            if match is None:
                what = f"{where} holds {key!r}, which is of no adapter called {name!r}"
                raise FormatError(what, "Check the name in its config.")
            check_numbers(key, value, where)
            place, kind, end = match.groups(default="")
            if not (kind == "prefix_tunings" and place.endswith(POOL)):
                self.left[HubKey(self.path(place), kind, end)] = value

    def take(self, kind: str) -> dict[str, dict[str, Tensor]]:
        """All tensors of one kind of container: path of the module around it -> end of the key -> value."""
        found: dict[str, dict[str, Tensor]] = {}
        for key in [key for key in self.left if key.kind == kind]:
            found.setdefault(key.place, {})[key.end] = self.left.pop(key)
        return found

    def take_shared(self, begin: str) -> dict[str, Tensor]:
        """What the model holds once, under names that begin so."""
        keys = [key for key in self.left if key.kind == "shared_parameters" and key.end.startswith(begin)]
        return {key.end: self.left.pop(key) for key in keys}

    def path(self, place: str) -> str:
        """The path in this base of a module that the file names from a model with a head, or from one without."""
        for path in (place, f"{self._prefix}.{place}", place.removeprefix(f"{self._prefix}.")):
            if block_of(path, self.base) is not None:
                return path
        return place

    def check_done(self) -> None:
        """Raises: FormatError naming a tensor that nobody has read."""
        if self.left:
            place, kind, end = next(iter(self.left))
            what = f"{self.where} holds {len(self.left)} tensors of no use, first {place}.{kind} ... {end}"
            raise FormatError(what, "Check its config.")


def block_of(path: str, base: Structure) -> str | None:
    """The repeated block that the module at `path` is, or stands in."""
    return next((block for block in base.blocks if path == block or path.startswith(block + ".")), None)


def check_blocks(sites: Iterable[Site], left_out: Iterable[int], base: Structure, where: str) -> None:
    """Raises: FormatError naming a block that lacks what others have, and is not among those that are left out."""
    blocks, out = list(base.blocks), frozenset(left_out)
    groups: dict[tuple[str, str], set[int]] = {}
    for site in sites:
        block = block_of(site.path, base)
        if block is None:
            raise FormatError(f"{where} adapts {site.path!r}, which is in no block", "Load it with AdapterHub.")
        spot = block.rpartition(".")[0], site.path[len(block) :]
        groups.setdefault(spot, set()).add(blocks.index(block))
    for (around, rest), found in groups.items():
        wanted = {i for i, block in enumerate(blocks) if block.rpartition(".")[0] == around} - out
        if lost := sorted(wanted - found):
            what = f"{where} holds nothing for {blocks[lost[0]]}{rest}"
            raise FormatError(what, "The checkpoint is not whole.")
        if more := sorted(found - wanted):
            what = f"{where} holds tensors for {blocks[more[0]]}{rest}, a block that its config leaves out"
            raise FormatError(what, "Check leave_out in its config.")


def model_prefix(base: Structure) -> str:
    """The path of the model without its head."""
    prefix = str(getattr(base.model, "base_model_prefix", "") or "")
    return prefix if hasattr(base.model, prefix) else ""


def check_settings(config: Mapping[str, Any], wanted: Mapping[str, Any], passed: Iterable[str], where: str) -> None:
    """Raises: FormatError naming a setting of AdapterHub's that is neither as `wanted` nor one of the `passed`."""
    free = frozenset(passed)
    for name, value in config.items():
        if name in free or (name in wanted and value == wanted[name]):
            continue
        why = "which Inlay does not have" if name in wanted else "which Inlay does not know"
        raise FormatError(f"{where} sets {name} to {value!r}, {why}", "Load it with AdapterHub.")
