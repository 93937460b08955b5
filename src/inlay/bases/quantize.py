"""Loads a base in 4 bits a weight, so that a large one fits; what is trained stays whole beside it.

Paper: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.errors import UsageError

from .choices import QUANTIZATIONS
from .extras import require

__all__ = ["QUANTIZATIONS", "keep_layout", "quantization"]


def quantization(
    name: str | None, config: Mapping[str, Any], folder: Path, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load linear layers (but the head) quantized as `name` says; none for None.

    "4bit" is NF4 in blocks of 64 with quantized scales; products are computed in `dtype`. Raises: UsageError where
    there is no such quantization or the base in `folder` has one already; InlayError where its library is missing.
    """
    if name is None:
        return {}
    if name not in QUANTIZATIONS:
        raise UsageError(f"quantization {name!r} is not known", f"Choose {', '.join(QUANTIZATIONS)}, or leave it out.")
    if "quantization_config" in config:
        raise UsageError(f"{folder} is quantized already", "Leave --quantize out.")
    if dtype == torch.float64:
        raise UsageError("--quantize 4bit does not compute in float64", "Choose float32, bfloat16 or float16.")
    require("bitsandbytes", "--quantize 4bit", "quantize")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def keep_layout(model: nn.Module) -> None:
    """Keep quantized layers as they are: on some CPUs, bitsandbytes else rearranges and rounds them for good when one
    runs without gradients, and cannot take gradients through them any more."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.__dict__["support_avx512bf16_for_cpu"] = False
