"""LoftQ: LoRA that begins as what quantization took from a weight.

    s B A = the nearest product of rank r to W - Q        W is the whole weight, Q what the quantized base holds of it

The base stays as it was quantized: this is the paper's last step, as HF PEFT takes it on a base of 4 bits (its
`replace_lora_weights_loftq`), whose numbers these are where s is 1. There A and B do not know of s, so that the product
overshoots by it.

Paper: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models" (arXiv:2310.08659).
Shapes: W and Q are (out, in); A is (r, in), B (out, r).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.sites.site import Site

__all__ = ["FullWeights", "loftq"]


def loftq(r: int, scale: float, whole: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """A and B, float32 on the CPU."""
    rest = whole.float().cpu() - quantized.float().cpu()
    u, values, v = torch.linalg.svd(rest, full_matrices=False)
    root = (values[:r] / scale).sqrt()
    return (root[:, None] * v[:r]).contiguous(), (u[:, :r] * root).contiguous()


class FullWeights:
    """The weights of a base before it was quantized, in the safetensors files of `folder`."""

    def __init__(self, folder: str | None, model: Any) -> None:
        config = getattr(model, "config", None)
        self.folder = Path(folder or getattr(config, "_name_or_path", "") or "")
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self.files: dict[str, str] = json.loads(index.read_text(encoding="utf8"))["weight_map"]
        elif (self.folder / "model.safetensors").is_file():
            self.files = {}
        else:
            what = f"init=loftq needs the base's whole weights, and {self.folder} holds no model.safetensors"
            raise UsageError(what, "Name the folder of the base that was not quantized: loftq_weights.")

    def of(self, site: Site) -> Tensor:
        """(out, in). Raises: FormatError where the files have none of the site's shape."""
        names = [f"{site.path}.weight", f"{site.path}.weight".removeprefix(self.prefix)]
        for name in names:
            file = self.folder / self.files.get(name, "model.safetensors")
            try:
                with safe_open(file, "pt") as opened:
                    found: Tensor = opened.get_tensor(name)
            except (SafetensorError, OSError):  # not there, or by its other name
                continue
            found = found.mT if site.transposed else found
            if found.shape == (site.out_features, site.in_features):
                return found
        raise FormatError(f"{self.folder} holds no whole weight of {site.path}", "Name the base's own folder.")
