"""One adapter: its method, and its parameters at each site. It lives beside the base, never in it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from inlay.methods.contract import Method, Site, Structure

__all__ = ["Adapter"]


class Adapter:
    """Trainable parameters of `method` on `base`, float32 (float64 over a float64 base), on the base's device."""

    def __init__(self, name: str, method: Method, base: Structure, seed: int) -> None:
        self.name, self.method = name, method
        self.sites: dict[str, Site] = {site.path: site for site in method.sites(base)}
        generator = torch.Generator().manual_seed(seed)
        like = next(base.model.parameters())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.params: dict[str, dict[str, nn.Parameter]] = {
            path: {key: nn.Parameter(value.to(like.device, dtype)) for key, value in created.items()}
            for path, created in ((path, method.create(site, generator)) for path, site in self.sites.items())
        }

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trainable tensor, in the order of the base's modules."""
        for site in self.params.values():
            yield from site.values()

    def at(self, path: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parameters of one site in the dtype of the computation; gradients reach the float32 originals."""
        return {key: value.to(dtype) for key, value in self.params[path].items()}

    def __len__(self) -> int:
        return sum(p.numel() for p in self.parameters())
