"""Turns a GGUF file into a transformers folder, once."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from inlay.errors import FormatError, InlayError

from .quiet import quiet

__all__ = ["CONVERSION", "convert"]

CONVERSION = 1
"""Raised when `convert` comes to write something else, so that folders converted before are not taken."""

DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Rules that take digits one by one, then split as GPT-2 does; transformers converts them without the digits."""
GPT2 = {"default", "gpt-2", "phi-2", "roberta-bpe", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"}
"""Rules that split as GPT-2 does, which is also what transformers takes for a rule that it does not know."""
SPECIAL = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "padding_token_id": "pad_token"}
PROBE = "In 2024:\n\n1. It's  12 345,67 — don't\t8\n   x=90; ٣4 naïve 漢字 <b>9</b>"


def convert(file: Path, folder: Path) -> None:
    """Write the model and tokenizer in `file` to `folder` as float32 safetensors, tokenizer and template checked.

    Peak memory: about twice the float32 weights. Raises: FormatError where the file is broken, of an architecture
    that transformers does not read, or holds something that would be lost on the way.
    """
    with quiet(), redirect_stderr(StringIO()):  # one of the bars asks no switch
        try:
            rule, special = _token_settings(file)
            model, tokenizer = _read(file)
            _split(tokenizer, rule, file)
            for name, number in special.items():  # some releases of transformers take one for another
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _check_saved(tokenizer, folder, file)
        except (InlayError, OSError):
            raise
        except Exception as error:  # whatever is wrong with the file, its name is what the reader needs
            why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise FormatError(
                f"{file} cannot be read as GGUF ({why})", "Copy it again, or name another base."
            ) from None


def _token_settings(file: Path) -> tuple[str | None, dict[str, int]]:
    """The rule by which the file's byte-level tokenizer splits text before its merges (None for other kinds), and the
    ids of its special tokens by their names in transformers.

    Raises: FormatError where the file holds what transformers would leave out.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)  # walks all headers, so that a truncated file fails here
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        what = f"{file} scales its rotary frequencies (rope_freqs.weight), which transformers leaves out"
        raise FormatError(what, "Use the model's transformers folder.")
    fields = {key: _content(reader.get_field(f"tokenizer.ggml.{key}")) for key in ("model", "pre", *SPECIAL)}
    special = {name: fields[key] for key, name in SPECIAL.items() if isinstance(fields[key], int)}
    if fields["model"] != "gpt2":
        return None, special
    return str(fields["pre"] or "default"), special


def _content(field: Any) -> Any:
    return None if field is None else field.contents()


def _read(file: Path) -> tuple[Any, Any]:
    """Model (float32, unquantized) and tokenizer as transformers reads them."""
    import transformers

    # Newer releases can keep the blocks packed where a kernel for them is installed.
    packed = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": packed(dequantize=True)} if packed else {}
    causal: Any = transformers.AutoModelForCausalLM
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model, report = causal.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True, **plain
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise FormatError(
            f"{file} lacks {len(missing)} weights of its model: {', '.join(missing[:3])}", "Copy it again."
        )
    model.hf_quantizer = None  # else the folder would say that it is quantized
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _split(tokenizer: Any, rule: str | None, file: Path) -> None:
    """Give the tokenizer the splitting rule that its merges were learned with.

    Raises: FormatError for a rule that neither transformers nor this module knows: the tokens would be wrong.
    """
    from tokenizers import pre_tokenizers

    if rule in DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    elif rule is not None and rule not in GPT2 | _known_to_transformers():
        what = f"{file} splits text by a rule that cannot be converted (tokenizer.ggml.pre = {rule!r})"
        raise FormatError(what, "Use the model's transformers folder.")


def _known_to_transformers() -> set[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # releases before had these two
        return {"llama-bpe", "qwen2"}
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _check_saved(tokenizer: Any, folder: Path, file: Path) -> None:
    """Open the saved tokenizer: some classes rebuild their splitting and drop what was set above."""
    import transformers

    again = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template")
    same = all(getattr(again, name) == getattr(tokenizer, name) for name in names)
    if not same or again.encode(PROBE) != tokenizer.encode(PROBE):
        raise FormatError(f"the tokenizer in {file} changes when saved", "Use the model's transformers folder.")
