"""Opens tensor files: safetensors, or a foreign .bin that holds tensors and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from inlay.errors import FormatError, InlayError

__all__ = ["check_numbers", "read_tensors"]

NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .bin or .pt file, on the CPU.

    Raises: InlayError where the file cannot be opened; FormatError where it is broken, holds anything but tensors, or a
    value is NaN or infinite.
    """
    try:
        path.open("rb").close()  # safetensors says of every file that does not open that it is not there
    except OSError as error:
        raise InlayError(f"{path} cannot be read ({error.strerror})", "Check the path and its permissions.") from None
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else _foreign(path)
    except SafetensorError as error:
        raise FormatError(f"{path} is not a whole safetensors file ({error})", "Copy or train it again.") from None
    except OSError as error:  # what opens and still is no file on a disk
        raise InlayError(f"{path} cannot be read ({error})", "Copy it into the folder.") from None
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            raise FormatError(f"{path} holds {key!r}, which is not a tensor", "Only tensors are read.")
    numbers = {key: value for key, value in loaded.items() if value.dtype in NUMBERS}
    if not bool(torch.nn.utils.get_total_norm([*numbers.values()]).isfinite()):  # one look at all is quicker than many
        for key, value in numbers.items():
            if not bool(value.isfinite().all()):
                raise FormatError(f"{path}: tensor {key!r} holds NaN or infinite values", "The adapter has diverged.")
    return loaded


def check_numbers(key: str, value: Tensor, where: str) -> None:
    """Raises: FormatError where the values of a parameter are whole, complex, or of fewer than 16 bits."""
    if value.dtype not in NUMBERS:
        kind = str(value.dtype).removeprefix("torch.")
        raise FormatError(f"{key!r} in {where} is of {kind}", "Parameters are float32, float16, bfloat16 or float64.")


def _foreign(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is wrong with a foreign file, its name is what the reader needs
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path} is not a plain file of tensors ({why})", "Pickles are never opened.") from None
    if not isinstance(loaded, dict):
        raise FormatError(f"{path} holds a {type(loaded).__name__}, not named tensors", "Only state dicts are read.")
    return {str(key): value for key, value in loaded.items()}
