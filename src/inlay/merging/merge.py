"""Merges an adapter into its base, writes the result as a transformers folder and checks it from there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from inlay.bank.bank import attach
from inlay.bases.load import load_base
from inlay.errors import UsageError

__all__ = ["merge_to_folder"]


@torch.no_grad()
def merge_to_folder(base: str, adapter: str, out: str, dtype: str = "float32") -> dict[str, Any]:
    """Write the merged model to the new folder `out`, whole or not at all.

    Returns: the folder, the largest difference of logits between the adapter beside its base and the saved model
    opened again, and the largest logit, for scale. Raises: UsageError where `out` exists or the method has no weights.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists and is not empty", "Choose another folder.")
    opened = load_base(base, dtype)
    model: Any = opened.model
    bank = attach(model)
    bank.load("adapter", adapter)
    inputs = _probe(model)
    with bank.route(["adapter"]):
        expected = model(**inputs).logits.float()
    bank.merge("adapter")
    bank.detach()
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(beside)
        if opened.tokenizer is not None:
            opened.tokenizer.save_pretrained(beside)
        again: Any = load_base(str(beside), dtype).model
        difference = float((again(**inputs).logits.float() - expected).abs().max())
        folder.rmdir() if folder.exists() else None
        os.chmod(beside, 0o755)
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {
        "merged": str(folder),
        "max_difference": difference,
        "largest_logit": float(expected.abs().max()),
        "dtype": dtype,
    }


def _probe(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (1, 32), generator=generator).to(model.device)
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
