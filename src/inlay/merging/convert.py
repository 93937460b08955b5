"""Writes an adapter in another library's format, or as LoRA, and checks what was written against it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from inlay.bank.adapter import Adapter
from inlay.bank.bank import Bank, attach
from inlay.bases.adapters import adapter_folder
from inlay.bases.load import Base, load_base
from inlay.data.prompting import prompting_of
from inlay.errors import UsageError
from inlay.formats.folders import base_of
from inlay.formats.loralib import write_loralib
from inlay.formats.notes import NOTES
from inlay.formats.peft import CONFIG
from inlay.formats.support import CONVERSIONS, PEFT_TYPES
from inlay.runs.tasking import head_of

from .as_lora import Lowered, as_lora
from .folders import whole_folder
from .merge import check_out, finite_logits, logits_of, probe
from .vllm import as_vllm, checked

__all__ = ["convert_to"]

LOWERED, VLLM = "lora", "vllm"
"""The ones of the `CONVERSIONS` that make LoRA of any adapter first."""
FILES = (".safetensors", ".pt", ".bin")
"""What a loralib state dict may be called."""
SOURCE, WRITTEN = "source", "written"


@torch.no_grad()
def convert_to(
    to: str, adapter: str, out: str, base: str | None = None, rank: int | None = None, alpha: float | None = None,
    enabled: Sequence[bool] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `adapter` to `out`, which is not there yet, in the format `to`; "lora" is LoRA in HF PEFT's layout, and
    "vllm" the same as vLLM opens it, by its published rules.

    `base` is the one that it was trained on, where its files do not say it. A `rank` makes LoRA of it first, cut to
    that rank. loralib's files do not say `alpha` and `enabled`.
    Returns: what was written, the largest difference of its logits from the adapter's own, the largest logit, for
    scale, and where LoRA was made of it, the relative Frobenius error by module; for vLLM, what it is served with.
    Raises: UsageError where the target has no place for the method, and says why; nothing is written then.
    """
    source, target = _source(adapter), Path(out).expanduser()
    _check_target(target, to)
    opened, bank = _opened(source, base, alpha, enabled)
    inputs = probe(bank.model)
    with bank.route([SOURCE]):
        expected = finite_logits(logits_of(bank.model, inputs), f"the adapter in {source}", "Train it again.")
    lowered = _lowered(bank.adapters[SOURCE], opened, to, rank)
    with _beside(target, to) as place:
        found = _write(bank, lowered, place, to, enabled, source)
        bank.load(WRITTEN, place, **found)
        with bank.route([WRITTEN]):
            made = finite_logits(logits_of(bank.model, inputs), f"what was made of {source}", "Keep it as it is.")
        served = _served(place, bank.adapters[SOURCE], opened, target, source) if to == VLLM else {}
    bank.detach()
    return {
        "written": str(target), "format": to, **{name: value for name, value in found.items() if name == "alpha"},
        "max_difference": float((made - expected).abs().max()), "largest_logit": float(expected.abs().max()),
        **({} if lowered is None else _errors(lowered)), **served,
    }  # fmt: skip


def _source(adapter: str) -> Path:
    """A folder's path, or that of a file with a loralib state dict."""
    path = Path(adapter).expanduser()
    return path if path.is_file() and path.suffix in FILES else adapter_folder(adapter)


def _check_target(target: Path, to: str) -> None:
    if to != "loralib":
        return check_out(target)
    if target.suffix not in FILES:
        raise UsageError(f"--out {target} is no file of tensors", "loralib's adapters are: name it out.safetensors.")
    if target.exists():
        raise UsageError(f"--out {target} exists", "Choose another file.")
    return check_out(target.parent / f".{target.name}")


def _lowered(adapter: Adapter, base: Base, to: str, rank: int | None) -> Lowered | None:
    """The LoRA that is written in the adapter's place; None where it is written as it is."""
    if to == VLLM:
        return as_vllm(adapter, base, rank)
    return as_lora(adapter, rank) if to == LOWERED or rank is not None else None


def _served(place: Path, adapter: Adapter, base: Base, target: Path, source: Path) -> dict[str, Any]:
    """What vLLM is started with, and whether the adapter has a template, which vLLM does not read."""
    return {**checked(place, adapter, base, target), "template": bool(_notes(source).get("template"))}


def _opened(
    source: Path, base: str | None, alpha: float | None, enabled: Sequence[bool] | None
) -> tuple[Base, Bank]:  # fmt: skip
    """The base with the adapter beside it. Raises: UsageError where nobody says which base."""
    name = base or ("" if source.is_file() else base_of(source))
    if not name:
        raise UsageError(f"{source} does not say its base", "Name the base it was trained on: --base.")
    prompting = None if source.is_file() else prompting_of([source])
    opened = load_base(name, "float32", head=None if prompting is None else head_of(prompting.template))
    bank = attach(opened.model)
    bank.load(SOURCE, source, alpha, enabled if source.is_file() else None)
    return opened, bank


@contextmanager
def _beside(target: Path, to: str) -> Iterator[Path]:
    """Where to write: what is there becomes `target` where all went well, and nothing is left where it did not."""
    if to != "loralib":
        with whole_folder(target) as folder:
            yield folder
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        yield Path(folder) / target.name
        (Path(folder) / target.name).rename(target)


def _write(
    bank: Bank, lowered: Lowered | None, place: Path, to: str, enabled: Sequence[bool] | None, source: Path
) -> dict[str, Any]:
    """Write the adapter, or what it became, to `place`; what `bank.load` has to be told to read it."""
    if lowered is not None:  # saved, never routed: it needs no hooks
        bank.adapters[SOURCE] = Adapter.of(SOURCE, [(lowered.method, lowered.values)], bank.base)
    if to == "loralib":
        return {"alpha": write_loralib(place, bank.adapters[SOURCE].parts, enabled), "enabled": enabled}
    bank.save(SOURCE, place, CONVERSIONS[to], _notes(source))
    if CONVERSIONS[to] == "peft":
        _check_peft(place, bank.adapters[SOURCE])
    return {}


def _notes(source: Path) -> dict[str, Any]:
    """What is noted beside the adapter: the template, for one. The base's fingerprint is noted anew."""
    file = source / NOTES
    notes = json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}
    return {name: value for name, value in notes.items() if name != "fingerprint"}


def _check_peft(folder: Path, adapter: Adapter) -> None:
    """Raises: UsageError where the layout is one that HF PEFT does not know."""
    kind = json.loads((folder / CONFIG).read_text(encoding="utf8"))["peft_type"]
    if kind not in PEFT_TYPES:
        titles = " beside ".join(method.title for method in adapter.methods)
        raise UsageError(f"HF PEFT has no {titles}", "Choose another --to: inlay convert --help lists them.")


def _errors(lowered: Lowered) -> dict[str, Any]:
    errors = [*lowered.errors.values()]
    worst = max(lowered.errors, key=lambda path: lowered.errors[path])
    ranks = [len(own["A"]) if own["A"].ndim == 2 else own["A"].shape[1] for own in lowered.values.values()]
    return {
        "rank": max(ranks),
        "error_largest": max(errors),
        "error_mean": sum(errors) / len(errors),
        "error_worst_module": worst,
        "errors": dict(lowered.errors),
    }
