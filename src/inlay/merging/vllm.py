"""An adapter as the LoRA that vLLM serves: one rank and one scale at all modules, in HF PEFT's layout.

Where ranks or scales differ, the matrices are filled up with zeros and each B is multiplied by its own scale:

    y = W x + (s B 0) (A; 0) x        r the largest rank, alpha = r

so that no release of vLLM has to read patterns. vLLM itself multiplies B by the scale when it loads an adapter.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from inlay.bank.adapter import Adapter
from inlay.bank.merging import merged_parameters
from inlay.bases.hub import is_hub_id
from inlay.bases.load import Base
from inlay.errors import FormatError, UsageError
from inlay.formats.peft import CONFIG, FILES
from inlay.formats.vllm_rules import RANKS, RELEASE, model_refused, rank_for, refusals

from .as_lora import Lowered, as_lora

__all__ = ["as_vllm", "checked", "evened"]


def as_vllm(adapter: Adapter, base: Base, rank: int | None = None) -> Lowered:
    """`adapter` as one LoRA of one rank and scale; cut to `rank` where one is given.

    Raises: UsageError where vLLM has no LoRA beside the base, or the adapter is no LoRA: `inlay merge` or `inlay serve`
    is named, whichever can do it.
    """
    refused = model_refused(type(base.model).__name__, _vocabulary(base.model))
    if refused is not None:
        raise UsageError(f"the adapter cannot go to vLLM: {refused}", _instead(adapter))
    try:
        made = evened(as_lora(adapter, rank))
    except UsageError as error:
        near = "" if rank is not None or "--rank" not in error.remedy else " Or give --rank: the nearest LoRA of it."
        raise UsageError(f"vLLM serves LoRA alone, and {error.what}", _instead(adapter) + near) from None
    if rank_for(made.method.r) is None:
        what = f"vLLM takes ranks up to {RANKS[-1]}, and this one has {made.method.r}"
        raise UsageError(what, f"Give --rank {RANKS[-1]} or less: the nearest LoRA of it.")
    return made


def evened(lowered: Lowered) -> Lowered:
    """The same LoRA without patterns."""
    method = lowered.method
    if not method.rank_pattern and not method.alpha_pattern:
        return lowered
    rank = max(own["A"].shape[-2] for own in lowered.values.values())
    scales = {path: _scale(lowered, path) for path in lowered.values}
    values = {path: _filled(own, scales[path], rank) for path, own in lowered.values.items()}
    method = replace(method, r=rank, alpha=float(rank), use_rslora=False, rank_pattern={}, alpha_pattern={})
    return Lowered(method, values, lowered.errors)


def _scale(lowered: Lowered, path: str) -> float:
    method, own = lowered.method, lowered.values[path]["A"].shape[-2]
    alpha = method.alpha_pattern.get(re.escape(path), 2 * method.r if method.alpha is None else method.alpha)
    return alpha / own


def _filled(own: Mapping[str, Tensor], scale: float, rank: int) -> dict[str, Tensor]:
    """A (r, in) and B (out, r) with zeros behind their own rank, B times the scale."""
    more = rank - own["A"].shape[-2]
    return {"A": pad(own["A"], (0, 0, 0, more)), "B": pad(own["B"] * scale, (0, more))}


def checked(folder: Path, adapter: Adapter, base: Base, out: Path) -> dict[str, Any]:
    """Hold what was written to the rules of vLLM's loader; what it is served with, once it is called `out`.

    Raises: UsageError naming what vLLM would refuse.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
    with safe_open(folder / FILES[0], framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    found = refusals(config, shapes, type(base.model).__name__, _vocabulary(base.model))
    if found:
        raise UsageError(found[0], _instead(adapter))
    most = rank_for(config["r"])
    name = base.name if base.folder is None or is_hub_id(base.name) else str(base.folder.resolve())
    place = out.resolve()
    command = ["vllm", "serve", name, "--enable-lora", "--max-lora-rank", str(most), "--lora-modules"]
    return {"rules": f"vLLM {RELEASE}", "max_lora_rank": most, "command": shlex.join([*command, f"{out.name}={place}"])}


def _instead(adapter: Adapter) -> str:
    try:
        merged_parameters(adapter)
    except (UsageError, FormatError):
        return "Serve it with `inlay serve`, which takes any method."
    merged = "`inlay merge` writes base and adapter as one model, for any engine that has the base"
    return f"{merged}; `inlay serve` takes any method."


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
