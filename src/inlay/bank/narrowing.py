"""Adapters that only answer: what single layers compute in half precision is held in it, at half the memory."""

from __future__ import annotations

import torch

from inlay.methods.contract import Site

from .adapter import Adapter

__all__ = ["narrow"]

HALF, WIDE = (torch.float16, torch.bfloat16), (torch.float32, torch.float64)
KINDS = ("linear", "sublayer")
"""Sites that read their own parameters in the dtype of what they change, and nothing else does."""


def narrow(adapter: Adapter) -> None:
    """Hold the parameters of layers and sublayers in the base's dtype, where that is narrower: they are cast to it in
    every forward, so that no output changes by a bit. What methods keep exact, what several sites share, constants,
    and what acts before the layers stay as they are. Training such an adapter on would lose what was cut off."""
    for part in adapter.parts:
        for path, own in part.params.items():
            site = part.sites.get(path)
            if site is None or site.kind not in KINDS:
                continue
            dtype = _dtype(site)
            for name, value in own.items():
                if dtype in HALF and value.dtype in WIDE and name not in part.method.exact:
                    value.data = value.data.to(dtype)


def _dtype(site: Site) -> torch.dtype:
    return next(site.module.parameters()).dtype
