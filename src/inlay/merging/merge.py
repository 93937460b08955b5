"""Merges an adapter into its base, writes the result as a transformers folder and checks it from there."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.bank.bank import attach
from inlay.bases.adapters import adapter_folder
from inlay.bases.dtypes import dtype_name, pick_dtype
from inlay.bases.folders import weights_stored
from inlay.bases.load import Base, load_base, resolve
from inlay.bases.quiet import quiet
from inlay.data.prompting import prompting_of
from inlay.errors import InlayError, UsageError
from inlay.runs.tasking import head_of

from .folders import whole_folder

__all__ = ["check_out", "finite_logits", "logits_of", "merge_to_folder", "probe"]

OVERHEAD = 64 * 2**20
"""Bytes beside the weights: tokenizer, settings and the file system's own."""


@torch.no_grad()
def merge_to_folder(base: str, adapter: str, out: str, dtype: str = "float32") -> dict[str, Any]:
    """Write the merged model to the new folder `out`, whole or not at all; "auto" is the dtype of the base's files.

    Returns: the folder, the largest difference of logits between the adapter beside its base and the saved model
    opened again, the largest logit, for scale, and the dtype. Raises: UsageError where `out` cannot be made or the
    method has no weights; InlayError where the disk is too small or base or adapter give no numbers.
    """
    folder, source = Path(out).expanduser(), adapter_folder(adapter)
    check_out(folder)
    values, own = weights_stored(resolve(base))
    chosen = (own or "float32") if dtype == "auto" else dtype
    need = values * pick_dtype(chosen).itemsize + OVERHEAD
    _check_room(folder, need)
    prompting = prompting_of([source])
    opened = load_base(base, chosen, head=None if prompting is None else head_of(prompting.template))
    model: Any = opened.model
    bank = attach(model)
    bank.load("adapter", source)
    inputs = probe(model)
    finite_logits(logits_of(model, inputs), f"base {base}", "Use --dtype float32, or copy the base again.")
    with bank.route(["adapter"]):
        expected = finite_logits(
            logits_of(model, inputs), f"the adapter in {source}", "Train it again, or use its run's best."
        )
    bank.merge("adapter")
    bank.detach()
    difference = _written(opened, folder, inputs, expected, need)
    return {
        "merged": str(folder),
        "max_difference": difference,
        "largest_logit": float(expected.abs().max()),
        "dtype": dtype_name(opened.dtype),
    }


def _written(opened: Base, folder: Path, inputs: dict[str, Tensor], expected: Tensor, need: int) -> float:
    """Save the model as `folder`; returns how far the logits of what was saved are from `expected`."""
    model: Any = opened.model
    try:
        with whole_folder(folder) as beside:
            with quiet():
                model.save_pretrained(beside)
                if opened.tokenizer is not None:
                    opened.tokenizer.save_pretrained(beside)
            again: Any = load_base(str(beside), dtype_name(opened.dtype)).model
            difference = float((logits_of(again, inputs) - expected).abs().max())
    except UsageError:
        raise
    except Exception as error:  # safetensors' own error for a full disk is none of the system's
        if _full(error):
            raise _no_room(folder, need) from None
        raise
    return difference


def check_out(folder: Path) -> None:
    if folder.is_dir():
        if any(folder.iterdir()):
            raise UsageError(f"--out {folder} exists and is not empty", "Choose another folder.")
    elif folder.exists():
        raise UsageError(f"--out {folder} is a file", "Choose a new folder.")
    above = _existing(folder)
    if not above.is_dir():
        raise UsageError(f"--out {folder} lies below {above}, which is a file", "Choose another folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"--out {folder} cannot be made: {above} may not be written to", "Choose another folder.")


def _check_room(folder: Path, need: int) -> None:
    if shutil.disk_usage(_existing(folder)).free < need:
        raise _no_room(folder, need)


def _no_room(folder: Path, need: int) -> InlayError:
    above = _existing(folder)
    left = shutil.disk_usage(above).free
    what = f"{above} has {left / 2**20:,.0f} MB left, and the merged model needs {need / 2**20:,.0f} MB"
    return InlayError(what, "Choose an --out with more room.")


def _existing(folder: Path) -> Path:
    """The nearest folder above `folder`, or itself, that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The base's logits in float32, or its last states where it has no head."""
    return model(**inputs)[0].float()


def finite_logits(logits: Tensor, what: str, remedy: str) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise InlayError(f"{what} gives logits that are NaN or infinite", remedy)
    return logits


def probe(model: Any) -> dict[str, Tensor]:
    """One row of random ids (1, 32), or of random pixels, as the base takes it."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        high, wide = size if isinstance(size, (list, tuple)) else (size, size)
        pixels = torch.rand(1, model.config.num_channels, high, wide, generator=generator)
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (1, 32), generator=generator).to(model.device)
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
