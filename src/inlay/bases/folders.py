"""Checks a model folder before anything is loaded: are its files whole and safe, and which class opens it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.errors import FormatError, InlayError, UsageError

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_quantization",
    "checked_config",
    "has_tokenizer",
    "model_class",
    "stored_tensors",
    "weights_stored",
]

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
AGAIN = "Copy or save it again."


def checked_config(folder: Path) -> dict[str, Any]:
    """The settings in config.json of a folder whose weights are all there, as whole safetensors files.

    Only headers are read. Raises: UsageError where the folder is not a model's; FormatError naming the file that is
    missing, truncated or of a kind that is not opened; InlayError where a file may not be read.
    """
    try:
        next(folder.iterdir(), None)
        (folder / "config.json").is_file()
    except OSError as error:
        raise InlayError(f"base {folder} cannot be read ({error.strerror})", "Check its permissions.") from None
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no config.json", _instead(folder))
    if (folder / "adapter_config.json").exists():  # transformers would put that adapter into the model unasked
        what = f"{folder} holds an adapter beside the base"
        raise UsageError(what, "Move adapter_config.json to a folder of its own.")
    config = _json_object(folder / "config.json")
    for file in _weight_files(folder):
        _check_header(folder / file)
    return config


def has_tokenizer(folder: Path) -> bool:
    """Whether any file of a tokenizer is there (transformers makes an empty one up where there is none)."""
    return any(
        path.name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece"))
        or path.suffix in (".model", ".tiktoken")
        for path in folder.iterdir()
    )


def weights_stored(folder: Path) -> tuple[int, str | None]:
    """How many numbers the weights in `folder` are, and the dtype of most of them by torch's name (None for others).

    Only headers are read.
    """
    from safetensors import safe_open

    counts: Counter[str] = Counter()
    for file in _weight_files(folder):
        with safe_open(folder / file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(key)
                counts[part.get_dtype()] += math.prod(part.get_shape())
    most = max(counts, key=counts.__getitem__, default="")
    return counts.total(), FLOATS.get(most)


def stored_tensors(folder: Path, names: Mapping[str, Sequence[str]]) -> dict[str, torch.Tensor]:
    """By each of the `names` the tensor that the weights in `folder` hold under the first of its keys that is there."""
    from safetensors import safe_open

    found = {}
    for file in _weight_files(folder) if names else ():
        with safe_open(folder / file, framework="pt") as opened:
            there = set(opened.keys())
            for name, keys in names.items():
                key = next((key for key in keys if key in there), None)
                if key is not None and name not in found:
                    found[name] = opened.get_tensor(key).clone()
    return found


def check_quantization(config: dict[str, Any], folder: Path) -> None:
    """Raises: FormatError where the weights are quantized by a method that transformers would pass over, unread."""
    if "quantization_config" not in config:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    settings = config["quantization_config"]
    settings = settings if isinstance(settings, dict) else {"quant_method": settings}
    flagged = settings.get("load_in_4bit") or settings.get("load_in_8bit")  # how older bitsandbytes folders say it
    if not flagged and settings.get("quant_method") not in AUTO_QUANTIZER_MAPPING:
        what = f"{folder} is quantized by {settings.get('quant_method')!r}, which transformers does not know"
        raise FormatError(what, "Use an unquantized copy of the base.")


def model_class(config: dict[str, Any], folder: Path) -> Any:
    """The transformers class that the config's `architectures` names; a causal language model where it names none.

    Raises: FormatError where transformers has no such class: code that comes with a model is never run.
    """
    import transformers

    listed = config.get("architectures")
    named = [str(name) for name in listed] if isinstance(listed, list) else [listed] if isinstance(listed, str) else []
    for name in named:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.get("model_type") in causal and all(name.lower().endswith("causallm") for name in named):
        return transformers.AutoModelForCausalLM
    what = f"transformers {transformers.__version__} has no class {', '.join(named) or repr(config.get('model_type'))}"
    raise FormatError(
        f"{what}, which {folder} asks for", "Install a newer transformers; a model's own code is not run."
    )


def _instead(folder: Path) -> str:
    """What the user may have meant by a folder that is not a model's."""
    if (folder / "adapter_config.json").exists():
        return f"It is an adapter: give it as --adapter, and --base {_base_of(folder)}."
    if (folder / "adapter" / "adapter_config.json").exists():
        return f"It is a run's folder: give it as --adapter, and --base {_base_of(folder / 'adapter')}."
    gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
    return f"Name the file itself: {gguf}." if gguf else "Name a folder that transformers saved."


def _base_of(adapter: Path) -> str:
    """The base that an adapter says it is for."""
    try:
        named = _json_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    except InlayError:
        named = None
    return named if isinstance(named, str) and named else "the model it was trained on"


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights: one, or the shards that the index lists."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if index.is_file():
        files = _json_object(index).get("weight_map")
        if not isinstance(files, dict) or not files or any(Path(str(f)).name != f for f in files.values()):
            raise FormatError(f"{index} lists no weights", AGAIN)
        shards = sorted(set(files.values()))
        lost = [shard for shard in shards if not (folder / shard).is_file()]
        if lost:
            raise FormatError(f"{folder} lacks {len(lost)} of its {len(shards)} shards: {', '.join(lost[:3])}", AGAIN)
        return shards
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise FormatError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code",
            "Save it as safetensors where you trust it: model.save_pretrained(folder).",
        )
    raise FormatError(f"{folder} holds no weights (model.safetensors or its shards)", AGAIN)


def _check_header(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with open(file, "rb") as readable:  # the system's own reason is better than what the library makes of it
            readable.read(1)
        with safe_open(file, framework="numpy"):
            pass
    except OSError as error:
        raise InlayError(f"{file} cannot be read ({error.strerror or error})", "Check its permissions.") from None
    except SafetensorError as error:
        raise FormatError(f"{file} is not a whole safetensors file ({error})", AGAIN) from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise InlayError(f"{path} cannot be read ({error.strerror or error})", "Check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error})", AGAIN) from None
    if not isinstance(loaded, dict):
        raise FormatError(f"{path} holds no JSON object", AGAIN)
    return loaded
