"""One adapter: its method, and its parameters at each site. It lives beside the base, never in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from inlay.methods.contract import Method, Params, Site, Structure

from .flat import Flat, parts_of

__all__ = ["Adapter", "stacked"]


class Adapter:
    """Trainable parameters of `method` on `base`, float32 (float64 over a float64 base), on the base's device.

    `params` maps the path of a site to its parameters by name; those that all sites share stand under "". While it is
    trained, `flats` may hold them all.
    """

    flats: Sequence[Flat] = ()

    def __init__(self, name: str, method: Method, base: Structure, seed: int) -> None:
        self.name, self.method, self.seed = name, method, seed
        sites = method.sites(base)
        self.sites: dict[str, Site] = {site.path: site for site in sites}
        self.order: dict[nn.Module, tuple[Site, int]] = {site.module: (site, i) for i, site in enumerate(sites)}
        generator = torch.Generator().manual_seed(seed)
        like = next(base.model.parameters())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        created = {path: method.create(site, generator) for path, site in self.sites.items()}
        created[""] = method.shared(sites, generator)
        self.params: dict[str, dict[str, nn.Parameter]] = {
            path: {key: nn.Parameter(value.to(like.device, dtype)) for key, value in values.items()}
            for path, values in created.items()
            if values
        }

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trainable tensor, in the order of the base's modules."""
        for site in self.params.values():
            yield from site.values()

    def at(self, path: str, dtype: torch.dtype | None, held: dict[Any, Any]) -> Params:
        """The parameters of one site in the dtype of the computation; gradients reach the float32 originals.

        `held` keeps what one forward needs at many sites.
        """
        whole = _whole([self], dtype, held)
        return Params(self.params[path], dtype) if whole is None else Params(whole[path])

    def __len__(self) -> int:
        return sum(p.numel() for p in self.parameters())


def stacked(adapters: Sequence[Adapter], path: str, dtype: torch.dtype, held: dict[Any, Any]) -> Params:
    """The parameters of several adapters of the same settings at one site, each (K, ...); `held` as in `Adapter.at`."""
    whole = _whole(adapters, dtype, held)
    if whole is not None:
        return Params(whole[path])
    own = [adapter.params[path] for adapter in adapters]
    return Params({key: torch.stack([params[key] for params in own]) for key in own[0]}, dtype)


def _whole(
    adapters: Sequence[Adapter], dtype: torch.dtype | None, held: dict[Any, Any]
) -> dict[str, dict[str, torch.Tensor]] | None:
    """All parameters of adapters that are being trained, cast and laid out once a forward; None where they are not."""
    if not torch.is_grad_enabled() or not all(adapter.flats for adapter in adapters):
        return None
    spot = (*(adapter.name for adapter in adapters), dtype)
    if spot not in held:
        held[spot] = parts_of([adapter.flats for adapter in adapters], dtype)
    return held[spot]
