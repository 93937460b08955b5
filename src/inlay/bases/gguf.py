"""Turns a GGUF file into a transformers folder, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from inlay.errors import FormatError

__all__ = ["convert"]


def convert(file: Path, folder: Path) -> None:
    """Write the model and tokenizer in `file` to `folder` as float32 safetensors.

    Raises: FormatError where the file is broken or of an architecture that transformers does not read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # whatever is wrong with the file, its name is what the reader needs
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(f"{file} cannot be read as GGUF ({why})", "Copy it again, or name another base.") from None
    _repair_digits(tokenizer, file)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _repair_digits(tokenizer: Any, file: Path) -> None:
    """The conversion forgets that SmolLM's tokenizer takes digits one by one before anything else."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    kind = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
