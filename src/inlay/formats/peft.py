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
from inlay.methods.contract import Method, Site, Structure
from inlay.methods.table import METHODS
from inlay.sites.targets import endings

from .parts import BASE_LAYER, PARTS, ROOT, SHORT_ROOT, SavedPart, Written, beside, numbered, split_parts
from .tensors import read_tensors

__all__ = ["CONFIG", "CONSTANTS", "Stored", "read_peft", "write_peft"]

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
CONSTANTS = ":constants"
"""In the place of a site's path: what is read for a method's `constants`."""
FOREIGN = ("modules_to_save", "bias", "exclude_modules", "layers_pattern")
"""Fields that mean more than the method of the config alone."""
KINDS: tuple[type[Method], ...] = (*METHODS.values(),)
"""Every method, imported here so that the first checkpoint opens as fast as the next."""

Tensors = dict[str, dict[str, Tensor]]
"""Tensors of a part: module path -> parameter name -> value; "" for shared ones, CONSTANTS for constants."""

Stored = tuple[Method, Tensors]

# ---- writing


def write_peft(folder: Path, parts: Sequence[SavedPart], base_name: str, task: str | None = None) -> None:
    """Write one adapter, so that `peft.PeftModel.from_pretrained(base, folder)` opens it where HF PEFT has a layout for
    its parts; see `inlay.formats.parts` for where it has none. The tensors come first.
    """
    written = [_written(part) for part in parts]
    config, tensors = written[0] if len(parts) == 1 else beside(parts, written) or numbered(written)
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / FILES[0]) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    head = {"peft_type": config["peft_type"], "base_model_name_or_path": base_name, "inference_mode": True}
    write_json(folder / CONFIG, head | {"task_type": task} | config)


def _written(part: SavedPart) -> Written:
    sites = list(part.sites.values())
    method, shared = part.method.export(part.params.get("", {}), sites)
    values = {**part.params, "": shared, CONSTANTS: part.constants}
    keys = _keys(method, sites).items()
    tensors = {key: _plain(values[path][name]).reshape(shape) for key, (path, name, shape) in keys}
    return {"peft_type": method.peft_type, **method.to_peft(sites)}, tensors


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()


def _keys(method: Method, sites: Sequence[Site]) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Key in the file -> path of the site ("" for shared parameters), name and shape of the parameter."""
    keys = {key: ("", name, shape) for name, (key, shape) in method.shared_keys(sites).items()}
    keys |= {key: (CONSTANTS, name, shape) for name, (key, shape) in method.constant_keys(sites).items()}
    for site in sites:
        for name, (end, shape) in method.peft_keys(site).items():
            keys[f"{ROOT}{site.path}.{end}"] = (site.path, name, shape)
    return keys


# ---- reading


def read_peft(folder: Path, base: Structure) -> list[Stored]:
    """The methods of a folder, the parts of one adapter, with their tensors, checked against `base`.

    Raises: UsageError where there is no adapter; FormatError naming what is missing, extra or misshapen.
    """
    config = _config(folder)
    if config.get("peft_type") != PARTS:
        _kind(config, str(folder))  # a type that nobody knows is said before a file is opened
    file = next((folder / f for f in FILES if (folder / f).is_file()), None)
    if file is None:
        raise UsageError(f"{folder} holds no {FILES[0]}", "Name the folder that the adapter was saved to.")
    stored = read_tensors(file)
    if config.get("peft_type") != PARTS:
        return _Reading(config, stored, base, str(folder), file.name).parts()
    found: list[Stored] = []
    for number, (own, tensors) in enumerate(split_parts(config, stored, str(folder / CONFIG))):
        found += _Reading(own, tensors, base, f"part {number} of {folder}", file.name).parts()
    return found


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
    return config


def _kind(config: Mapping[str, Any], where: str) -> type[Method]:
    """The class that reads a config: of those that do, the one that is no base of another."""
    found = [kind for kind in KINDS if kind.claims(config)]
    for kind in found:
        if not any(other is not kind and issubclass(other, kind) for other in found):
            return kind
    known = ", ".join(dict.fromkeys(kind.peft_type for kind in KINDS))
    raise FormatError(f"{where} holds a {config.get('peft_type')!r} adapter", f"Known here: {known}.")


class _Reading:
    """One config with the tensors of its method, and of those that it describes in fields of its own."""

    def __init__(
        self, config: Mapping[str, Any], stored: Mapping[str, Tensor], base: Structure, where: str, file: str
    ) -> None:
        self.config, self.base, self.where, self.file = config, base, where, file
        self.stored = _own_keys(stored, base)
        self.kind = _kind(config, where)

    def parts(self) -> list[Stored]:
        try:
            found = self._parts()
        except KeyError as error:
            raise FormatError(f"{CONFIG} of {self.where} lacks the field {error}", "Save the adapter again.") from None
        except (UsageError, ValueError, TypeError, AttributeError, re.error, RecursionError) as error:
            why = error.what if isinstance(error, UsageError) else str(error) or type(error).__name__
            raise FormatError(f"{CONFIG} of {self.where} is wrong: {why}", "Save the adapter again.") from None
        if self.stored:
            count, first = len(self.stored), sorted(self.stored)[0]
            raise FormatError(f"{self.where} holds {count} tensors of no use, first {first!r}", "Check its config.")
        return found

    def _parts(self) -> list[Stored]:
        beside = self._beside()
        method, sites = self._host()
        self._check_fields(method, [other for other, _ in beside])
        return [(method, self._fitted(method, sites)), *beside]

    def _check_fields(self, method: Method, others: Sequence[Method]) -> None:
        """Raises: FormatError where the config asks for more than is read."""
        known = {name for other in (method, *others) for name in other.fields_beside(method, []) or ()}
        for name in FOREIGN:
            if self.config.get(name) not in (None, [], "none") and name not in known:
                raise FormatError(f"{CONFIG} of {self.where} sets {name}, which is not supported", "Load it with peft.")

    def _beside(self) -> list[Stored]:
        """The methods beside that of the config; each takes its tensors before the next is asked, saved modules with
        their biases before BitFit."""
        found: list[Stored] = []
        for kind in reversed(KINDS):
            keys = [key.removeprefix(ROOT).removeprefix(SHORT_ROOT) for key in self.stored]
            method = None if kind is self.kind else kind.read_beside(self.config, keys)
            if method is not None:
                found.append((method, self._fitted(method, method.sites(self.base))))
        return found

    def _host(self) -> tuple[Method, list[Site]]:
        """The method of the config and its sites, where need be from the modules that the stored keys name."""
        if self.kind.placed_by_settings:
            method = self.kind.from_peft(self.config, [])
            return method, method.sites(self.base)
        base = self.base
        sites = {s.path: s for s in [*base.heads, *base.sublayers, *base.embeddings, *base.projections, *base.norms]}
        method = self.kind.from_peft(self.config, self._paths(sites))
        return method, [sites[path] for path in self._paths(sites)]

    def _paths(self, sites: Mapping[str, Site]) -> list[str]:
        owners = {key: _owner(key, sites) for key in self.stored if key.startswith(ROOT)}  # constants have no module
        if strangers := sorted(key for key, owner in owners.items() if owner is None):
            raise FormatError(
                f"{self.file} of {self.where} names {len(strangers)} modules that the base lacks, "
                f"first {strangers[0]!r}",
                "The adapter was trained on another base.",
            )
        found = set(owners.values())
        self._check_targets(sites, {path for path in found if path is not None})
        return [path for path in sites if path in found]

    def _check_targets(self, sites: Mapping[str, Site], found: set[str]) -> None:
        """Modules that the config targets but the file has nothing for would be silently untrained."""
        targets = self.config.get("target_modules") or []
        layers = self.config.get("layers_to_transform")
        kept = {layers} if isinstance(layers, int) else set(layers) if layers else None
        whole = tuple(self.config.get("modules_to_save") or ())  # HF PEFT takes no target inside of those
        listed = frozenset(() if isinstance(targets, str) else targets)
        for path, site in sites.items():
            if whole and any(around.endswith(whole) for around in _around(path)):
                continue
            if isinstance(targets, str):
                named = re.fullmatch(targets, path) is not None
            else:
                named = not listed.isdisjoint(endings(path))
            if named and path not in found and (kept is None or site.layer in kept):
                raise FormatError(
                    f"{self.where} targets {path!r} but holds no tensor for it", "The checkpoint is not whole."
                )

    def _fitted(self, method: Method, sites: Sequence[Site]) -> Tensors:
        """Every tensor of one method in its place, in this library's shape; they are taken out of `stored`."""
        tensors: Tensors = {}
        for key, (path, name, shape) in _keys(method, sites).items():
            key = key if key in self.stored else key.replace(ROOT, SHORT_ROOT, 1)
            if key not in self.stored:
                raise FormatError(f"{self.where} lacks the tensor {key!r}", "The checkpoint is not whole.")
            value = self.stored.pop(key)
            if tuple(value.shape) != shape:
                raise FormatError(
                    f"{key!r} in {self.where} has shape {tuple(value.shape)}, the base needs {shape}",
                    "The adapter was trained on another base, or its config was edited.",
                )
            tensors.setdefault(path, {})[name] = value if path == CONSTANTS else method.own_shape(name, value)
        return tensors


def _own_keys(stored: Mapping[str, Tensor], base: Structure) -> dict[str, Tensor]:
    """Tensors of the base itself by the base's own names, without HF PEFT's wrapper; a parameter that a module shares
    with one inside of it (BERT's head with its decoder) by the inner name."""
    plain = {key.replace(f".{BASE_LAYER}.", "."): value for key, value in stored.items()}
    parameters = {ROOT + name: p for name, p in base.model.named_parameters(remove_duplicate=False)}
    for key in [key for key in plain if key in parameters]:
        around = key.rpartition(".")[0] + "."
        inner = (name for name, p in parameters.items() if p is parameters[key] and name.startswith(around))
        plain[next((name for name in inner if name != key), key)] = plain.pop(key)
    return plain


def _around(path: str) -> list[str]:
    """Paths of the modules around the one at `path`, and its own."""
    names = path.split(".")
    return [".".join(names[: n + 1]) for n in range(len(names))]


def _owner(key: str, sites: Mapping[str, Site]) -> str | None:
    """The module that a stored key belongs to: the longest known path that the key goes on from."""
    path = key.removeprefix(ROOT)
    while path and path not in sites:
        path = path.rpartition(".")[0]
    return path or None
