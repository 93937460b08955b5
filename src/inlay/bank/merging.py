"""What an adapter's parts make of the base's own parameters, where they can be written into them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.methods.form import merged

from .adapter import Adapter, Part

__all__ = ["merged_parameters"]


@torch.no_grad()
def merged_parameters(adapter: Adapter) -> list[tuple[nn.Module, str, Tensor]]:
    """Modules of the base, names of their parameters, and the values that make them do what the adapter does.

    Raises: UsageError naming a part that has no such values, or weights that are quantized.
    """
    if any(site.quantized for part in adapter.parts for site in part.sites.values()):
        raise UsageError(
            f"{adapter.name!r} cannot be merged into quantized weights",
            "Merge it into the base as it was: `inlay merge`.",
        )
    at: dict[str, list[Part]] = {}
    for part in adapter.parts:
        for path in part.sites:
            at.setdefault(path, []).append(part)
    found = []
    for path, parts in at.items():
        values = _values(path, parts)
        for key, value in values.items():
            inner, _, name = key.rpartition(".")  # a head's parameters may be those of modules inside of it
            found.append((parts[0].sites[path].module.get_submodule(inner), name, value.detach()))
    return found


def _values(path: str, parts: list[Part]) -> dict[str, Tensor]:
    first = parts[0]
    if len(parts) == 1:
        return first.method.merge(first.at(path, None, {}), first.sites[path])
    for part in parts:
        if not part.method.has_form():
            part.method.merge(part.at(path, None, {}), part.sites[path])  # says why it cannot be, if it cannot
            others = " and ".join(other.method.title for other in parts if other is not part)
            raise UsageError(f"{part.method.title} and {others} meet at {path}, and cannot be merged there", "Keep it.")
    return merged([part.form(path, None, {}) for part in parts], first.sites[path])
