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
from .adapterhub_heads import read_head
from .adapterhub_keys import HubFile, Written
from .adapterhub_linear import read_linear
from .adapterhub_linear_out import write_linear
from .adapterhub_reft import read_reft, write_reft
from .adapterhub_virtual import read_prefix, read_prompt, write_prefix, write_prompt
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


def write_adapterhub(folder: Path, name: str, parts: Sequence[SavedPart], base: Structure, base_name: str) -> None:
    """Write one adapter, so that AdapterHub's `load_adapter(folder)` opens it. The tensors come first.

    Raises: UsageError where AdapterHub has no place for a part, and says why.
    """
    label = re.sub(r"\W", "_", name)
    written = _written(parts, base)
    tensors: dict[str, Tensor] = {}
    for _, own in written:
        for (place, kind, end), value in own.items():
            key = ".".join(filter(None, (place, kind, label, end)))
            if key in tensors:
                titles = " and ".join(part.method.title for part in parts)
                raise UsageError(f"AdapterHub has one place for two of {titles} ({place})", 'Use format="peft".')
            tensors[key] = value.detach().cpu().contiguous().clone()
    configs = [config for config, _ in written]
    own = configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}
    model = base.model
    head = {
        "config": own, "hidden_size": getattr(model.config, "hidden_size", None),
        "model_class": type(model).__name__, "model_name": base_name or None,
        "model_type": getattr(model.config, "model_type", None), "name": label, "version": VERSION,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / FILES[0]) as path:
        save_file(tensors, path)
    write_json(folder / CONFIG, head)


def _written(parts: Sequence[SavedPart], base: Structure) -> list[Written]:
    """The config of each part and its tensors. A coupling of the embeddings is said in the config of a bottleneck."""
    if other := next((part.method for part in parts if part.method.replaces or part.method.uses), None):
        why = "own modules and adapters over others are not written for AdapterHub"
        raise UsageError(f"{other.title} is a part: {why}", 'Save it with format="peft".')
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
