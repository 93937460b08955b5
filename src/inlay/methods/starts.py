"""LoRA that began inside of the base's weights (PiSSA, OLoRA), as LoRA beside the base as it is.

    W x + s (B A - B0 A0) x = (W - s B0 A0) x + s B A x

While such an adapter is trained, HF PEFT takes its start s B0 A0 out of the weight, and does it again when the adapter
is loaded; its file holds A and B alone. B0 and A0 follow from the weight: its largest singular values with their
vectors (PiSSA, Meng et al. 2024, arXiv:2404.02948), or a QR decomposition (OLoRA, Büyükakyüz 2024, arXiv:2406.01775).
The difference of both products has rank 2r. Its factors are made anew, so that B A and B0 A0, which are nearly equal,
are not subtracted in the dtype of the computation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from inlay.errors import FormatError
from inlay.sites.site import Site

__all__ = ["began_inside", "difference", "doubled", "doubled_settings", "start_of"]

OUTSIDE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base as it is."""
DRAWN = re.compile(r"pissa_niter_(\d+)")
CLOSE = 2.0**-9
"""By what share of a weight two random starts may differ: that of its rounding to bfloat16."""
CONVERT = "Convert it where it was trained: save_pretrained(path_initial_model_for_weight_conversion=...)."


class Ranked(Protocol):
    """What is asked of LoRA."""

    def rank(self, site: Site) -> int: ...
    def scale(self, site: Site) -> float: ...


def began_inside(config: Mapping[str, Any], where: str = "the adapter") -> bool:
    """Whether the adapter began inside of the base's weights.

    Raises: FormatError naming a start that cannot be found again from the base's weights.
    """
    start = config.get("init_lora_weights")
    if start in OUTSIDE:
        return False
    if start in ("pissa", "olora") or (isinstance(start, str) and DRAWN.fullmatch(start)):
        return True
    what = f"{where} began with init_lora_weights={start!r}, which changes the base by what its file does not hold"
    raise FormatError(what, CONVERT)


def doubled(own: Mapping[str, Tensor], config: Mapping[str, Any], method: Ranked, site: Site) -> dict[str, Tensor]:
    """`own`, the values at one site, with A (2r, in) and B (out, 2r) that give with the same scale on the base as it is
    what those of `own` give on one without its start. Raises: FormatError where the start cannot be found again."""
    b0, a0 = _start(str(config["init_lora_weights"]), method, site)
    return {**own, **difference({**own, "A0": a0, "B0": b0})}


def difference(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A (2r, in) and B (out, 2r), float64 on the CPU, of the product B A - B0 A0 of `own`."""
    a, b, a0, b0 = (own[name].detach().double().cpu() for name in ("A", "B", "A0", "B0"))
    down, up = _factored(torch.cat([a, a - a0]), torch.cat([b - b0, b0], 1), 2 * len(a0))
    return {"A": down, "B": up}


def doubled_settings(
    r: int, alpha: float | None, rank_pattern: Mapping[str, int], alpha_pattern: Mapping[str, float], root: bool
) -> dict[str, Any]:
    """The settings that give doubled ranks the same scale; `root`: alpha is divided by the root of r."""
    grown = math.sqrt(2) if root else 2.0
    return {
        "r": 2 * r,
        "alpha": grown * (2 * r if alpha is None else alpha),
        "rank_pattern": {name: 2 * own for name, own in rank_pattern.items()},
        "alpha_pattern": {name: grown * own for name, own in alpha_pattern.items()},
    }


def _start(kind: str, method: Ranked, site: Site) -> tuple[Tensor, Tensor]:
    """B0 (out, r) and A0 (r, in) of one site, float64 on the CPU, where they can be found again."""
    if site.kind != "linear" or site.quantized:
        what = "quantized here" if site.quantized else "no linear layer"
        raise FormatError(f"the adapter began inside of the weight of {site.path}, which is {what}", CONVERT)
    if kind in ("pissa", "olora"):
        return start_of(kind, method, site)
    weight, r, scale = site.weight().float().cpu(), method.rank(site), method.scale(site)
    rounds = int(kind.rpartition("_")[2])
    one, other = (_split(*_drawn(weight, r, rounds, seed), scale) for seed in (0, 1))
    apart = float((one[0] @ one[1] - other[0] @ other[1]).norm()) * scale / float(weight.norm())
    if apart > CLOSE:
        what = (
            f"the adapter began with {kind}, a start drawn at random that its file does not hold: two draws differ by"
        )
        raise FormatError(f"{what} {apart:.1%} of {site.path}", CONVERT)
    return one


def start_of(kind: str, method: Ranked, site: Site) -> tuple[Tensor, Tensor]:
    """B0 (out, r) and A0 (r, in) of "pissa" or "olora", float64 on the CPU; found in float32, as HF PEFT does."""
    weight, r, scale = site.weight().float().cpu(), method.rank(site), method.scale(site)
    if kind == "olora":
        q, upper = torch.linalg.qr(weight.t() if site.transposed else weight)  # of the weight as it is stored
        b0, a0 = q[:, :r].double(), upper[:r].double()
        return (a0.t(), b0.t()) if site.transposed else (b0, a0)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return _split(u[:, :r], s[:r], v[:r], scale)


def _drawn(weight: Tensor, r: int, rounds: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, r, niter=rounds)
    return u, s, v.t()


def _split(u: Tensor, s: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    root = (s.double() / scale).sqrt()
    return u.double() * root, root[:, None] * v.double()


def _factored(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k) of the same product B A, which are as small as the product is."""
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.t())
    u, s, v = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    root = s.sqrt()
    down, up = root[:, None] * (v @ right.t()), (left @ u) * root
    return _widened(down, k, 0), _widened(up, k, 1)


def _widened(factor: Tensor, k: int, dim: int) -> Tensor:
    """`factor` with zeros up to k along `dim`: a product of more than the weight's rank needs fewer."""
    lacking = k - factor.shape[dim]
    if not lacking:
        return factor.contiguous()
    shape = [lacking if d == dim else n for d, n in enumerate(factor.shape)]
    return torch.cat([factor, factor.new_zeros(shape)], dim)
