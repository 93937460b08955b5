"""Checks a loaded model against its files: no weight missing or misshapen, none left over, all finite."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import FormatError

__all__ = ["check_finite", "check_keys"]

COMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|cos_cached|sin_cached)$")
"""Buffers that older releases of transformers saved and newer ones compute."""


def check_keys(model: nn.Module, report: dict[str, Any], where: str) -> tuple[str, ...]:
    """Check the keys of a loaded model by `report`, transformers' loading info.

    Returns: names of weights in the files that the model need not take: other heads, poolers, buffers.
    Raises: FormatError where weights of the model are missing from the files (transformers would start them at random)
    or have another shape, or where the files hold more than the model takes.
    """
    kind = type(model).__name__
    if missing := sorted(_reported(report, "missing_keys")):
        what = f"{where} lacks {len(missing)} weights of {kind}: {_some(missing)}"
        raise FormatError(what, "Name a base that was saved with them; they are not started at random.")
    if mismatched := sorted(_reported(report, "mismatched_keys")):
        shapes = [f"{key} {tuple(saved)}, not {tuple(wanted)}" for key, saved, wanted in mismatched]
        raise FormatError(f"{where} holds weights of another shape than its config says: {_some(shapes)}", "Mend it.")
    if errors := list(_reported(report, "error_msgs")):
        raise FormatError(f"{where} cannot be loaded ({str(errors[0]).splitlines()[0]})", "Copy it again.")
    unexpected = sorted(_reported(report, "unexpected_keys"))
    body = getattr(model, "base_model_prefix", "")
    modules = {name for name, _ in model.named_modules()}
    if lost := [key for key in unexpected if not _elsewhere(key, body, modules)]:
        what = f"{where} holds {len(lost)} weights that {kind} has no place for: {_some(lost)}"
        raise FormatError(what, "Its config.json does not fit its weights.")
    return tuple(unexpected)


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """Raises: FormatError naming weights of the base called `name` that hold NaN or infinity.

    One reading of all weights; quantized ones, and those that are not in memory, are passed over.
    """
    sums: dict[torch.device, dict[str, Tensor]] = {}
    for key, p in model.named_parameters():
        if p.is_floating_point() and p.element_size() > 1 and not p.is_meta:
            # NaN and infinity stay in a sum; a sum of finite numbers that outgrows float32 does not come of weights.
            sums.setdefault(p.device, {})[key] = p.sum(dtype=torch.promote_types(p.dtype, torch.float32))
    bad = [
        key for own in sums.values()
        for key, fine in zip(own, torch.stack([*own.values()]).isfinite().tolist(), strict=True) if not fine
    ]  # fmt: skip
    if bad:
        raise FormatError(f"base {name} holds NaN or infinity in {len(bad)} weights: {_some(bad)}", "Copy it again.")


def _elsewhere(key: str, body: str, modules: set[str]) -> bool:
    """Whether `key` belongs to a head that the model does not have, to a pooler, or to a buffer."""
    if COMPUTED.search(key) or "pooler" in key.split("."):
        return True
    top, owner = key.partition(".")[0], key.rpartition(".")[0]
    inside = top == body or (body not in modules and top in modules)  # a headless model has no prefix of its own
    return not inside and owner not in modules


def _reported(report: dict[str, Any], key: str) -> Iterable[Any]:
    return report.get(key) or ()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
