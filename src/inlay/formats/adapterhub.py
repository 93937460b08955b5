"""AdapterHub's folders: adapter_config.json with "config", and adapter.safetensors or pytorch_adapter.bin.

Which method a config is follows from its `architecture` and flags; which module of the base a tensor is of, from its
key. The adapter's name stands in the keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.files import write_json, written_beside
from inlay.methods.contract import Structure

from .adapterhub_bottleneck import read_bottleneck
from .adapterhub_bottleneck_out import write_bottleneck, write_coupling
from .adapterhub_fusion import FILES as FUSION_FILES
from .adapterhub_fusion_out import labels_of, write_fusion
from .adapterhub_heads import read_head
from .adapterhub_keys import HubFile, HubKey, Written
from .adapterhub_linear import read_linear
from .adapterhub_linear_out import write_linear
from .adapterhub_reft import read_reft, write_reft
from .adapterhub_virtual import read_prefix, read_prompt, write_prefix, write_prompt
from .folder_kinds import FUSION, SETUP
from .parts import SavedPart
from .peft import CONFIG, Stored
from .support import unread_architecture
from .tensors import read_tensors

__all__ = ["is_adapterhub", "read_adapterhub", "write_adapterhub"]

FILES = ("adapter.safetensors", "pytorch_adapter.bin")
VERSION = "adapters.1.3.0"
READERS: Mapping[str, Callable[[Mapping[str, Any], HubFile], list[Stored]]] = {
    "bottleneck": read_bottleneck,
    "lora": read_linear,
    "prefix_tuning": read_prefix,
    "prompt_tuning": read_prompt,
    "reft": read_reft,
}
"""By `architecture`; a config without one is a bottleneck's."""
WRITERS: Mapping[str, Callable[[SavedPart, Structure], Written]] = {
    "sublayer": write_bottleneck,
    "attention": write_prefix,
    "tokens": write_prompt,
    "block": write_reft,
}
"""By the kind of site that a method acts on, where it is no linear layer."""
LINEAR = {"linear", "embedding"}


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is AdapterHub's."""
    return "peft_type" not in config and "config" in config


def read_adapterhub(folder: Path, config: Mapping[str, Any], base: Structure) -> list[Stored]:
    """The parts of the adapter in a folder, and the head beside it, with their tensors, checked against `base`.

    Raises: UsageError where the file of tensors is not there; FormatError naming a method or setting that Inlay does
    not have, or what is missing, extra or misshapen.
    """
    own, name, where = config["config"], config.get("name"), str(folder)
    if not isinstance(own, dict) or not isinstance(name, str):
        raise FormatError(f'{CONFIG} of {where} holds no settings under "config", or no name', "Save it again.")
    file = next((folder / one for one in FILES if (folder / one).is_file()), None)
    if file is None:
        raise UsageError(f"{folder} holds no {FILES[0]}", "Name the folder that the adapter was saved to.")
    stored = HubFile(read_tensors(file), config, base, where)
    try:
        found = _parts(own, stored)
    except KeyError as error:
        raise FormatError(f"{CONFIG} of {where} lacks the field {error}", "Save the adapter again.") from None
    except (UsageError, ValueError, TypeError, AttributeError) as error:
        why = error.what if isinstance(error, UsageError) else str(error) or type(error).__name__
        raise FormatError(f"{CONFIG} of {where} is wrong: {why}", "Save the adapter again.") from None
    stored.check_done()
    head = read_head(folder, base)
    return found if head is None else [head, *found]


def _parts(config: Mapping[str, Any], file: HubFile) -> list[Stored]:
    kinds = config["configs"] if config.get("architecture") == "union" else [config]
    found: list[Stored] = []
    for kind in kinds:
        name = kind.get("architecture") or "bottleneck"
        if name not in READERS:
            raise FormatError(f"{file.where} holds {unread_architecture(name)}", "Load it with AdapterHub.")
        found += READERS[name](kind, file)
    return found


def write_adapterhub(
    folder: Path, name: str, parts: Sequence[SavedPart], base: Structure, base_name: str,
    used: Mapping[str, Sequence[SavedPart]] | None = None,
) -> None:  # fmt: skip
    """Write one adapter, so that AdapterHub's `load_adapter(folder)` opens it; or a fusion over the adapters `used`,
    with those, so that `load_adapter_setup(folder)` does. The tensors come first.

    Raises: UsageError where AdapterHub has no place for a part, and says why.
    """
    if used:
        _write_setup(folder, parts, base, base_name, used)
        return
    label = re.sub(r"\W", "_", name)
    _put(folder, CONFIG, FILES[0], _made(label, parts, base), {"name": label, **_described(base, base_name)})


def _made(label: str, parts: Sequence[SavedPart], base: Structure) -> Written:
    """The config of an adapter that AdapterHub calls `label`, and its tensors by whole keys."""
    written = _written(parts, base)
    tensors: dict[HubKey, Tensor] = {}
    for _, own in written:
        if twice := next((key for key in own if key in tensors), None):
            titles = " and ".join(part.method.title for part in parts)
            raise UsageError(f"AdapterHub has one place for two of {titles} ({twice.place})", 'Use format="peft".')
        tensors |= own
    configs = [config for config, _ in written]
    return configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}, tensors


def _put(folder: Path, config_file: str, file: str, made: Written, head: Mapping[str, Any]) -> None:
    """Write one folder: the tensors, and the config under what is said about it in `head`."""
    config, own = made
    tensors: dict[str, Tensor] = {}
    for (place, kind, end), value in own.items():
        key = ".".join(filter(None, (place, kind, head["name"], end)))
        tensors[key] = value.detach().cpu().contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / file) as path:
        save_file(tensors, path)
    write_json(folder / config_file, {"config": config, **head})


def _described(base: Structure, base_name: str) -> dict[str, Any]:
    model = base.model
    return {
        "hidden_size": getattr(model.config, "hidden_size", None), "model_class": type(model).__name__,
        "model_name": base_name or None, "model_type": getattr(model.config, "model_type", None), "version": VERSION,
    }  # fmt: skip


def _write_setup(
    folder: Path, parts: Sequence[SavedPart], base: Structure, base_name: str, used: Mapping[str, Sequence[SavedPart]]
) -> None:
    """A fusion with its adapters, each in a folder of its own; what says that they are one comes last."""
    if len(parts) > 1:
        titles = " and ".join(part.method.title for part in parts)
        raise UsageError(f"AdapterHub has no place for {titles} in one adapter", 'Save it with format="peft".')
    if (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds another adapter", "Choose a new folder: a fusion is written as several.")
    labels, fusion = labels_of([*used]), write_fusion(parts[0], base, used)
    adapters = {label: _made(label, own, base) for label, own in zip(labels, used.values(), strict=True)}
    described, name = _described(base, base_name), ",".join(labels)
    for label, made in adapters.items():
        _put(folder / label, CONFIG, FILES[0], made, {"name": label, **described})
    _put(folder / name, FUSION, FUSION_FILES[0], fusion, {"name": name, "adapter_names": labels, **described})
    children = [{"type": "single", "children": [label]} for label in labels]
    setup = {"adapter_setup": {"type": "Fuse", "children": children}, "head_setup": None, "version": VERSION}
    write_json(folder / SETUP, setup)


def _written(parts: Sequence[SavedPart], base: Structure) -> list[Written]:
    """The config of each part and its tensors. A coupling of the embeddings is said in the config of a bottleneck."""
    if other := next((part.method for part in parts if part.method.replaces), None):
        what = f"{other.title} is a part: own modules are not written for AdapterHub"
        raise UsageError(what, 'Save it with format="peft".')
    coupled = [part for part in parts if hasattr(part.method, "inv_adapter")]
    linear = [part for part in parts if {site.kind for site in part.sites.values()} <= LINEAR and part not in coupled]
    found = [write_linear(linear, base)] if linear else []
    found += [_writer(part)(part, base) for part in parts if part not in coupled and part not in linear]
    for part in coupled:
        fields, tensors = write_coupling(part, base)
        activation = fields["non_linearity"]
        hosts = (own for own in found if "inv_adapter" in own[0] and own[0]["non_linearity"] == activation)
        host = next(hosts, None)
        if host is None:
            what = f"AdapterHub has {part.method.title} beside a bottleneck of the same non_linearity alone"
            raise UsageError(what, 'Save it with format="peft".')
        host[0].update(fields)
        host[1].update(tensors)
    return found


def _writer(part: SavedPart) -> Callable[[SavedPart, Structure], Written]:
    kinds = {site.kind for site in part.sites.values()}
    kind = kinds.pop() if len(kinds) == 1 else ""
    if kind not in WRITERS:
        raise UsageError(f"AdapterHub has no {part.method.title}", 'Save it with format="peft".')
    return WRITERS[kind]
