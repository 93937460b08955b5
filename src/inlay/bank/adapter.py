"""One adapter: its method, and its parameters at each site. It lives beside the base, never in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from inlay.methods.contract import Method, Params, Site, Structure

__all__ = ["Adapter", "stacked"]


class Adapter:
    """Trainable parameters of `method` on `base`, float32 (float64 over a float64 base), on the base's device.

    `params` maps the path of a site to its parameters by name; those that all sites share stand under "".
    """

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

    def at(self, path: str, dtype: torch.dtype | None = None) -> Params:
        """The parameters of one site in the dtype of the computation; gradients reach the float32 originals."""
        return Params(self.params[path], dtype)

    def __len__(self) -> int:
        return sum(p.numel() for p in self.parameters())


def stacked(adapters: Sequence[Adapter], path: str, dtype: torch.dtype) -> Params:
    """The parameters of several adapters of the same settings at one site, each (K, ...)."""
    own = [adapter.params[path] for adapter in adapters]
    return Params({key: torch.stack([params[key] for params in own]) for key in own[0]}, dtype)
