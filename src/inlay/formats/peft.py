"""HF PEFT's folders: adapter_config.json and adapter_model.safetensors. How a method maps to them is its own fact."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.files import write_json, written_beside
from inlay.methods.contract import Method, Params, Site, Structure
from inlay.methods.table import METHODS

from .tensors import read_tensors

__all__ = ["read_peft", "write_peft"]

CONFIG, ROOT = "adapter_config.json", "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_model.bin")

Tensors = dict[str, dict[str, Tensor]]
"""Tensors of an adapter: module path -> parameter name -> value."""


def write_peft(
    folder: Path,
    method: Method,
    sites: list[Site],
    params: Mapping[str, Mapping[str, Tensor]],
    base_name: str,
    task: str | None = None,
) -> None:
    """Write one adapter so that `peft.PeftModel.from_pretrained(base, folder)` opens it; the tensors come first."""
    folded, shared = method.folded(Params(params.get("", {})), sites)
    params = {**params, "": shared}
    tensors = {}
    for key, (path, name, shape) in _keys(folded, sites).items():
        tensors[key] = params[path][name].detach().reshape(shape).cpu().contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / FILES[0]) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
    config = {"peft_type": method.peft_type, "base_model_name_or_path": base_name, "inference_mode": True}
    write_json(folder / CONFIG, config | {"task_type": task} | folded.to_peft(sites))


def _keys(method: Method, sites: Sequence[Site]) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Key in the file -> path of the site ("" for shared parameters), name and shape of the parameter."""
    keys = {key: ("", name, shape) for name, (key, shape) in method.shared_keys(sites).items()}
    for site in sites:
        for name, (end, shape) in method.peft_keys(site).items():
            keys[f"{ROOT}{site.path}.{end}"] = (site.path, name, shape)
    return keys


def read_peft(folder: Path, base: Structure) -> tuple[Method, Tensors]:
    """The method and tensors of a PEFT folder, checked against `base`.

    Raises: UsageError where there is no adapter; FormatError naming what is missing, extra or misshapen.
    """
    config = _config(folder)
    kind = next((m for m in METHODS.values() if m.peft_type == config.get("peft_type")), None)
    if kind is None:
        known = ", ".join(m.peft_type for m in METHODS.values())
        raise FormatError(f"{folder} holds a {config.get('peft_type')!r} adapter", f"Known here: {known}.")
    file = next((folder / f for f in FILES if (folder / f).is_file()), None)
    if file is None:
        raise UsageError(f"{folder} holds no {FILES[0]}", "Name the folder that the adapter was saved to.")
    stored = read_tensors(file)
    try:
        if kind.shared_only:
            method, sites = kind.from_peft(config, []), None
        else:
            method, sites = _placed(kind, config, stored, base, folder, file.name)
    except KeyError as error:
        raise FormatError(f"{folder / CONFIG} lacks the field {error}", "Save the adapter again.") from None
    except (UsageError, ValueError, TypeError, AttributeError, re.error, RecursionError) as error:
        why = error.what if isinstance(error, UsageError) else str(error) or type(error).__name__
        raise FormatError(f"{folder / CONFIG} holds what cannot be: {why}", "Save the adapter again.") from None
    return method, _fitted(method, method.sites(base) if sites is None else sites, stored, folder)


def _placed(
    kind: type[Method],
    config: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    base: Structure,
    folder: Path,
    file: str,
) -> tuple[Method, list[Site]]:
    """The method and its sites, from the modules that the stored keys name."""
    sites = {s.path: s for s in [*base.sublayers, *base.embeddings, *base.projections, *base.norms]}
    owners = {key: _owner(key, sites) for key in stored}
    if strangers := sorted(key for key, owner in owners.items() if owner is None):
        raise FormatError(
            f"{file} of {folder} names {len(strangers)} modules that the base lacks, first {strangers[0]!r}",
            "The adapter was trained on another base.",
        )
    paths = [path for path in sites if path in set(owners.values())]
    _all_targets_there(config, sites, set(paths), folder)
    return kind.from_peft(config, paths), [sites[p] for p in paths]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise UsageError(f"{folder} holds no {CONFIG}", "Name the folder that the adapter was saved to.")
    try:
        config = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error})", "Save the adapter again.") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} holds no JSON object", "Save the adapter again.")
    for name in ("modules_to_save", "bias", "exclude_modules", "layers_pattern"):
        if config.get(name) not in (None, [], "none"):
            raise FormatError(f"{path} sets {name}, which is not supported", "Load it with peft.")
    return config


def _owner(key: str, sites: Mapping[str, Site]) -> str | None:
    """The module that a stored key belongs to: the longest known path that the key goes on from."""
    path = key.removeprefix(ROOT)
    while path and path not in sites:
        path = path.rpartition(".")[0]
    return path or None


def _all_targets_there(config: Mapping[str, Any], sites: Mapping[str, Site], found: set[str], folder: Path) -> None:
    """Modules that the config targets but the file has nothing for would be silently untrained."""
    targets = config.get("target_modules") or []
    layers = config.get("layers_to_transform")
    kept = {layers} if isinstance(layers, int) else set(layers) if layers else None
    for path, site in sites.items():
        if isinstance(targets, str):
            named = re.fullmatch(targets, path) is not None
        else:
            named = any(path == t or path.endswith("." + t) for t in targets)
        if named and path not in found and (kept is None or site.layer in kept):
            raise FormatError(f"{folder} targets {path!r} but holds no tensor for it", "The checkpoint is not whole.")


def _fitted(method: Method, sites: list[Site], stored: Mapping[str, Tensor], folder: Path) -> Tensors:
    """Every tensor in its place, in this library's shape; none missing, none left over."""
    tensors: Tensors = {}
    left = set(stored)
    for key, (path, name, shape) in _keys(method, sites).items():
        if key not in stored:
            raise FormatError(f"{folder} lacks the tensor {key!r}", "The checkpoint is not whole.")
        if tuple(stored[key].shape) != shape:
            raise FormatError(
                f"{key!r} in {folder} has shape {tuple(stored[key].shape)}, the base needs {shape}",
                "The adapter was trained on another base, or its config was edited.",
            )
        tensors.setdefault(path, {})[name] = stored[key]
        left.discard(key)
    if left:
        raise FormatError(
            f"{folder} holds {len(left)} tensors of no use, first {sorted(left)[0]!r}", "Check its config."
        )
    return tensors
