"""HF PEFT's folders: adapter_config.json and adapter_model.safetensors. How a method maps to them is its own fact."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.files import write_json, written_beside
from inlay.methods.contract import Method, Site, Structure
from inlay.methods.starts import began_inside
from inlay.methods.table import METHODS

from .experts import stacked_keys, unstacked_keys
from .fields import check_fields, with_task
from .matching import Named, holds_name
from .names import true_names, without_adapter_name
from .parts import PARTS, ROOT, SHORT_ROOT, SavedPart, Written, beside, numbered, split_parts
from .rewriting import spared_rewriting
from .support import unread_type
from .tensors import check_numbers, read_tensors
from .weights import check_shape, taken_weights

__all__ = ["CONFIG", "CONSTANTS", "FILES", "Stored", "read_config", "read_peft", "write_peft"]

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
CONSTANTS = ":constants"
"""In the place of a site's path: what is read for a method's `constants`."""
KINDS: tuple[type[Method], ...] = (*METHODS.values(),)
"""Every method, imported here so that the first checkpoint opens as fast as the next."""

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors of a part: module path -> parameter name -> value; "" for shared ones, CONSTANTS for constants."""

Stored = tuple[Method, Tensors]

# ---- writing


def write_peft(
    folder: Path, parts: Sequence[SavedPart], base: Structure, base_name: str, task: str | None = None
) -> None:
    """Write one adapter, so that `peft.PeftModel.from_pretrained(base, folder)` opens it where HF PEFT has a layout for
    its parts; see `inlay.formats.parts` for where it has none. The tensors come first.
    """
    written = [_written(part) for part in parts]
    config, tensors = written[0] if len(parts) == 1 else beside(parts, written) or numbered(written)
    config = spared_rewriting(config, base)
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / FILES[0]) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    head = {"peft_type": config["peft_type"], "base_model_name_or_path": base_name, "inference_mode": True}
    write_json(folder / CONFIG, head | {"task_type": task} | config)


def _written(part: SavedPart) -> Written:
    sites = list(part.sites.values())
    compact, own = part.method.compacted(part.params, sites)
    method, shared = compact.export(own.get("", {}), sites)
    values = {**own, "": shared, CONSTANTS: part.constants}
    keys = _keys(method, sites).items()
    tensors = {key: _plain(values[path][name]).reshape(shape) for key, (path, name, shape) in keys}
    whole = [key for key, (_, name, _) in keys if name in method.whole_numbers]
    tensors |= {key: tensors[key].to(torch.int32) for key in whole}
    return {"peft_type": method.peft_type, **method.to_peft(sites)}, unstacked_keys(tensors, sites)


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


def read_peft(folder: Path, base: Structure, task: int | None = None) -> list[Stored]:
    """The methods of a folder, the parts of one adapter, with their tensors, checked against `base`; `task` is which of
    the tasks of a prompt that has several.

    Raises: UsageError where there is no adapter; FormatError naming what is missing, extra or misshapen.
    """
    config = with_task(read_config(folder), task, str(folder))
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


def read_config(folder: Path, file: str = CONFIG) -> dict[str, Any]:
    """The adapter_config.json of a folder, whoever wrote it, or another `file` of settings.

    Raises: UsageError where there is none; FormatError.
    """
    path = folder / file
    if not path.exists():
        raise UsageError(f"{folder} holds no {file}", "Name the folder that the adapter was saved to.")
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
    raise FormatError(f"{where} holds {unread_type(config.get('peft_type'))}", "`inlay methods` lists what it has.")


class _Reading:
    """One config with the tensors of its method, and of those that it describes in fields of its own."""

    def __init__(
        self, config: Mapping[str, Any], stored: Mapping[str, Tensor], base: Structure, where: str, file: str
    ) -> None:
        self.config, self.base, self.where, self.file = config, base, where, file
        self.kind = _kind(config, where)
        check_fields(config, self.kind, where)
        began_inside(config, where)  # a start that cannot be found again is said first
        self.config, self.stored = stacked_keys(config, true_names(stored, base, where), base, where)

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
        """A module that the adapter has of its own comes first: the others add to what it gives."""
        beside = self._beside()
        self._check_beside(beside)
        own = None
        if self.kind.peft_fields is not None and not self.kind.replaces:  # other files hold no weights of the base
            had = {f"{path}.{name}" for _, values in beside for path, of in values.items() for name in of}
            own = taken_weights(self.stored, self.base, self.where, had)
        method, sites = self._host()
        values = self._fitted(method, sites)
        host = method.beside_whole_base(self.config, values, sites)
        return [host, *beside] if own is None else [own, host, *beside]

    def _beside(self) -> list[Stored]:
        """The methods beside that of the config; each takes its tensors before the next is asked, saved modules with
        their biases before BitFit."""
        found: list[Stored] = []
        keys: list[str] = []
        for kind in reversed(KINDS):
            if len(keys) != len(self.stored):
                keys = [key.removeprefix(ROOT).removeprefix(SHORT_ROOT) for key in self.stored]
            method = None if kind is self.kind else kind.read_beside(self.config, keys)
            if method is not None:
                found.append((method, self._fitted(method, method.sites(self.base), beside=True)))
        return found

    def _check_beside(self, beside: Sequence[Stored]) -> None:
        """Raises: FormatError naming a saved module, or biases of the base, that the config has and the file lacks."""
        if not self.config.get("modules_to_save") and self.config.get("bias") in (None, "none"):
            return
        had = {f"{path}.{name}" for _, values in beside for path, own in values.items() for name in own}
        had |= {key.removeprefix(ROOT) for key in self.stored}
        saved = tuple(self.config.get("modules_to_save") or ())
        names = [name for name, _ in self.base.model.named_parameters()]
        lost = [name for name in names if name not in had and any(holds_name(name, one) for one in saved)]
        bias = self.config.get("bias") or "none"
        if bias not in ("none", "all") and not bias.endswith("_only"):
            what = f"{CONFIG} of {self.where} sets bias to {bias!r}"
            raise FormatError(what, 'HF PEFT knows "none", "all" and "lora_only".')
        if bias == "all" and not any(name.endswith(".bias") for name in had):
            lost += [name for name in names if name.endswith(".bias")]
        if lost:
            raise FormatError(f"{self.where} lacks {lost[0]!r}, which its config names", "The checkpoint is not whole.")

    def _host(self) -> tuple[Method, list[Site]]:
        """The method of the config and its sites, where need be from the modules that the stored keys name."""
        if self.kind.placed_by_settings:
            method = self.kind.from_peft(self.config, [])
            return method, method.sites(self.base)
        base = self.base
        sites = {s.path: s for s in [*base.heads, *base.sublayers, *base.embeddings, *base.projections, *base.norms]}
        experts = self.config.get("target_parameters")
        sites |= {s.path: s for s in base.experts if s.path in experts} if experts else {}
        paths = self._paths(sites)
        return self.kind.from_peft(self.config, paths), [sites[path] for path in paths]

    def _paths(self, sites: Mapping[str, Site]) -> list[str]:
        owners = {key: _owner(key, sites) for key in self.stored if key.startswith(ROOT)}  # constants have no module
        if strangers := sorted(key for key, owner in owners.items() if owner is None):
            raise FormatError(
                f"{self.file} of {self.where} names {len(strangers)} modules that the base lacks, "
                f"first {strangers[0]!r}",
                "The adapter was trained on another base.",
            )
        held = {owner for owner in owners.values() if owner is not None}
        if self.kind.replaces:  # whole modules: what stands inside of one belongs to it
            held = {path for path in held if not any(path.startswith(f"{around}.") for around in held)}
        found = {path: site for path, site in sites.items() if path in held}
        self._check_targets([path for path, site in sites.items() if not site.experts], found)
        return [*found]

    def _check_targets(self, modules: Sequence[str], found: Collection[str]) -> None:
        """Raises: FormatError naming a module that the config targets and the file has nothing for; or, where the
        config names modules of the file at all, one of the file's that it does not target."""
        names = Named(self.config)
        targets = {path: names(path) for path in modules}
        if lost := next((path for path in modules if targets[path] and path not in found), None):
            raise FormatError(
                f"{self.where} targets {lost!r} but holds no tensor for it", "The checkpoint is not whole."
            )
        if self._names_more() or not any(targets.get(path) for path in found):
            return  # an earlier release's names, or none
        if more := next((path for path in found if not targets.get(path)), None):
            what = f"{self.where} holds tensors for {more!r}, which its config does not target"
            raise FormatError(what, "HF PEFT would leave them out: mend target_modules, or take them out of the file.")

    def _names_more(self) -> bool:
        """Whether fields beside target_modules say what an adapter acts on."""
        return bool(self.config.get("target_parameters") or self.config.get("ensure_weight_tying"))

    def _fitted(self, method: Method, sites: Sequence[Site], beside: bool = False) -> Tensors:
        """Every tensor of one method in its place, in this library's shape; they are taken out of `stored`."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for own, (path, name, shape) in _keys(method, sites).items():
            wanted = method.key_beside(own) if beside else own
            key = self._stored_key(wanted, path)
            value = self.stored.pop(key)
            check_shape(key, tuple(value.shape), shape, self.base, self.where)
            if path != CONSTANTS and name not in method.whole_numbers:
                check_numbers(key, value, self.where)
            tensors.setdefault(path, {})[name] = value if path == CONSTANTS else method.own_shape(name, value)
        common = {**tensors.get("", {}), **tensors.get(CONSTANTS, {})}
        for site in sites:
            for end, name in method.copied_keys(site).items():
                key = f"{ROOT}{site.path}.{end}"
                if key in self.stored and not torch.equal(self.stored.pop(key), common[name]):
                    raise FormatError(f"{key!r} in {self.where} is not what all sites share", "Save the adapter again.")
        return tensors

    def _stored_key(self, wanted: str, path: str) -> str:
        """By what key the file has the tensor `wanted` of the module at `path`; raw state dicts hold the adapter's name
        too. Raises: FormatError where it has none."""
        for key in (wanted, wanted.replace(ROOT, SHORT_ROOT, 1)):
            if key in self.stored:
                return key
        inside = f"{ROOT}{path}." if wanted.startswith(f"{ROOT}{path}.") else ""
        container = inside + wanted.removeprefix(inside).partition(".")[0]
        key = without_adapter_name(self.stored, wanted, container, self.where)
        if key is None:
            raise FormatError(f"{self.where} lacks the tensor {wanted!r}", "The checkpoint is not whole.")
        return key


def _owner(key: str, sites: Mapping[str, Site]) -> str | None:
    """The module that a stored key belongs to: the longest known path that the key goes on from."""
    path = key.removeprefix(ROOT)
    while path and path not in sites:
        path = path.rpartition(".")[0]
    return path or None
