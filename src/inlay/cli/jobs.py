"""Whether the libraries of a plain installation do their job here, not only whether they are there."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

__all__ = ["JOBS", "pip_version"]


def _torch() -> None:
    import torch

    x = torch.eye(8, requires_grad=True)
    (x @ x).sum().backward()
    if x.grad is None or not bool(x.grad.isfinite().all()):
        raise ArithmeticError("its matrix products give NaN")


def _adapter() -> None:
    """A tiny model, with an adapter beside it, is run and trained for a step."""
    import torch
    import transformers

    from inlay.bank.bank import attach
    from inlay.methods.lora import LoRA

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    bank = attach(transformers.LlamaForCausalLM(config))
    bank.add("x", LoRA(r=2))
    with bank.route(["x", None]):
        loss = bank.model(input_ids=torch.ones(2, 4, dtype=torch.long)).logits.square().mean()
    loss.backward()
    if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in bank.parameters("x")):
        raise ArithmeticError("an adapter beside a tiny model gets no gradient")


def _tokenizers() -> None:
    from tokenizers import Tokenizer, models

    if Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a").ids != [0]:
        raise ArithmeticError("it encodes wrongly")


def _safetensors() -> None:
    import torch
    from safetensors.torch import load, save

    if load(save({"x": torch.ones(2)}))["x"].sum() != 2:
        raise ArithmeticError("it does not give back what it was given")


def _gguf() -> None:
    """A small file is written and read, and transformers finds what it needs to read one."""
    import numpy as np
    from gguf import GGUFReader, GGUFWriter
    from transformers.utils.import_utils import is_accelerate_available, is_gguf_available

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.gguf"
        writer = GGUFWriter(file, "llama")
        writer.add_tensor("x", np.ones((2, 2), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if len(GGUFReader(file).tensors) != 1:
            raise ArithmeticError("it does not read what it wrote")
    if not (is_gguf_available() and is_accelerate_available()):
        raise ImportError("transformers finds no gguf or accelerate that it can use")


def _accelerate() -> None:
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights():
        if not torch.nn.Linear(2, 2).weight.is_meta:
            raise ArithmeticError("it makes no empty weights")


def _pyarrow() -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file = BytesIO()
    parquet.write_table(pa.table({"x": [1, 2]}), file)
    if parquet.read_table(BytesIO(file.getvalue())).num_rows != 2:
        raise ArithmeticError("it does not read the parquet that it wrote")


JOBS: dict[str, Callable[[], None]] = {
    "torch": _torch, "transformers": _adapter, "tokenizers": _tokenizers, "safetensors": _safetensors, "gguf": _gguf,
    "accelerate": _accelerate, "pyarrow": _pyarrow,
}  # fmt: skip
"""By the library that is tried; each raises where it fails. The others are tried by importing them."""


def pip_version() -> str:
    """The version of the pip that fetches bases. Raises: RuntimeError where there is none."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=False, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode or not done.stdout.startswith("pip "):
        raise RuntimeError((done.stderr.strip().splitlines() or ["it does not start"])[-1])
    return done.stdout.split()[1]
