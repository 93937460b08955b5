"""AdapterHub's fusions: adapter_fusion_config.json with model_adapter_fusion.safetensors or its .bin.

A fusion's own folder holds its matrices, and the names of the adapters that it is over. `save_adapter_setup` puts it
beside those, each in a folder of its own name, below an adapter_setup.json.

AdapterHub's fusion reads what the last of its adapters reads, and takes of each what its network gives, before a gate
or a norm: that is what the adapters add where `otherwise` finds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from inlay.errors import FormatError, UsageError
from inlay.methods.contract import Site, Structure
from inlay.methods.fusion import Fusion

from .adapterhub_bottleneck import spot_of
from .adapterhub_heads import read_head
from .adapterhub_keys import HubFile, block_of
from .adapterhub_places import check_compared
from .folder_kinds import FUSION, SETUP
from .parts import SavedPart
from .peft import Stored, read_config
from .tensors import read_tensors

__all__ = [
    "CONTAINER",
    "FILES",
    "OWN",
    "Used",
    "listed",
    "otherwise",
    "read_fusion",
    "reads_of",
    "setup_of",
    "sites_of",
]

FILES = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
CONTAINER = "adapter_fusion_layer"
OWN = ("key", "query", "value", "query_before_ln", "residual_before", "regularization")
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "static": dict.fromkeys(OWN, False) | {"key": True, "query": True},
    "dynamic": dict.fromkeys(OWN, True) | {"query_before_ln": False, "residual_before": False},
}
"""What AdapterHub's words for configs mean."""
PASSED = ("value_before_softmax", "value_initialized", "dropout_prob")
"""A sum of values is the value of the sum; how the matrix starts says nothing of one that is there."""
LOAD_THERE, NOT_WHOLE = "Load it with AdapterHub.", "The checkpoint is not whole."

Used = Mapping[str, Sequence[SavedPart]]
"""Names of adapters -> their parts."""


# ---- reading


def read_fusion(folder: Path, base: Structure, others: Used) -> list[Stored]:
    """The fusion in a folder, or in a folder of a setup, over adapters among the `others`; and the head beside it.

    Raises: UsageError naming an adapter that is not there; FormatError naming what AdapterHub computes otherwise, or
    what is missing, extra or misshapen.
    """
    own, where = folder, str(folder)
    names = setup_of(folder)
    if names:
        own = _fusion_over([Path(name).name for name in names], folder)
    config = read_config(own, FUSION)
    names = names or _names(config, where)
    if lost := [name for name in names if name not in others]:
        what = f"{where} is AdapterHub's fusion over {listed(names)}, and the bank has no {listed(lost)}"
        whole = "Commands take the folder of AdapterHub's save_adapter_setup, which holds them all."
        raise UsageError(what, f"Load them first, under these names: bank.load({lost[0]!r}, ...). {whole}")
    used = {name: others[name] for name in names}
    if why := otherwise(used):
        raise FormatError(f"{where} is a fusion over adapters where {why}", LOAD_THERE)
    method = _method(config, used, base, where)
    file = next((own / one for one in FILES if (own / one).is_file()), None)
    if file is None:
        raise UsageError(f"{own} holds no {FILES[0]}", "Name the folder that the fusion was saved to.")
    tensors = _without_others(read_tensors(file), str(config["name"]))
    values = _values(method, sites_of(used), HubFile(tensors, config, base, where))
    head = read_head(own, base)
    return [*([] if head is None else [head]), (method, values)]


def _names(config: Mapping[str, Any], where: str) -> list[str]:
    name, names = config.get("name"), config.get("adapter_names")
    if not isinstance(name, str):
        raise FormatError(f"{FUSION} of {where} holds no name", "Save it again.")
    names = name.split(",") if names is None else names
    names = names.split(",") if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(one, str) and one for one in names):
        raise FormatError(f"{FUSION} of {where} names no adapters: {names!r}", "Save it again.")
    return names


def setup_of(folder: Path) -> list[str]:
    """The folders of the adapters that the setup in `folder` holds; none where it is a fusion alone.

    Raises: FormatError where it is no fusion.
    """
    if not (folder / SETUP).is_file():
        return []
    config = read_config(folder, SETUP)
    setup = config.get("adapter_setup")
    kind, children = (setup.get("type"), setup.get("children")) if isinstance(setup, dict) else (None, None)
    if kind != "Fuse" or not isinstance(children, list) or not children:
        what = f"{folder} holds AdapterHub's setup of the type {kind!r}, which is no fusion"
        raise FormatError(what, "Load the adapters in its folders, and name them in the route: [first, second].")
    if config.get("head_setup"):
        what = f"{folder} holds a setup with heads of AdapterHub's own"
        raise FormatError(what, "Save it without head_setup, or load it with AdapterHub.")
    return [str(folder / _single(child, folder)) for child in children]


def _single(child: Any, folder: Path) -> str:
    """The name of an adapter that a fusion is over."""
    single = child.get("children") if isinstance(child, dict) and child.get("type") == "single" else None
    if not isinstance(single, list) or len(single) != 1 or not isinstance(single[0], str):
        raise FormatError(f"{folder} holds a fusion over more than adapters: {child!r}", LOAD_THERE)
    if Path(single[0]).name != single[0]:
        raise FormatError(f"{folder} names an adapter outside of it: {single[0]!r}", "Save it again.")
    return single[0]


def _fusion_over(names: Sequence[str], folder: Path) -> Path:
    """The folder in a setup that holds the fusion over `names`: AdapterHub lets it have any name."""
    for path in sorted(folder.glob(f"*/{FUSION}")):
        if _names(read_config(path.parent, FUSION), str(path.parent)) == [*names]:
            return path.parent
    raise FormatError(f"{folder} holds no fusion over {listed(names)}", NOT_WHOLE)


def _method(config: Mapping[str, Any], used: Used, base: Structure, where: str) -> Fusion:
    """Raises: FormatError naming a setting that is not had here."""
    given = config.get("config")
    given = KNOWN.get(given) if isinstance(given, str) else given
    if not isinstance(given, Mapping):
        raise FormatError(f'{FUSION} of {where} holds no settings under "config"', "Save it again.")
    if given.get("temperature"):
        what = f"{where} is a fusion with a temperature, which falls with each forward and is in no file"
        raise FormatError(what, "Train it with temperature=False.")
    for name, value in given.items():
        if name not in (*OWN, *PASSED, "temperature"):
            raise FormatError(f"{where} sets {name} to {value!r}, which Inlay does not know", LOAD_THERE)
    if lost := next((name for name in OWN if not isinstance(given.get(name), bool)), None):
        raise FormatError(f"{FUSION} of {where} has no true or false for {lost!r}", "Save it again.")
    settings, reads = {name: given[name] for name in OWN}, reads_of(used)
    check_compared(base, "fusions", where, behind=reads == "behind")
    if len(base.stacks) > 1:
        raise FormatError(f"{where} holds a fusion in an encoder-decoder", LOAD_THERE)
    settings["query_before_ln"] = settings["query_before_ln"] or reads == "output"
    dropout = given.get("dropout_prob") or getattr(base.model.config, "attention_probs_dropout_prob", None)
    try:
        return Fusion(adapters=[*used], dropout=dropout or 0.0, targets=[*sites_of(used)], **settings)
    except UsageError as error:
        raise FormatError(f"{FUSION} of {where} is wrong: {error.what}", "Save it again.") from None


def _values(method: Fusion, sites: Mapping[str, Site], file: HubFile) -> dict[str, dict[str, Tensor]]:
    """The matrices at each sublayer. Those of a sublayer without adapters are passed over: AdapterHub has them in every
    block, and computes nothing with them there."""
    wanted = {(block_of(path, file.base), site.part): path for path, site in sites.items()}
    every = {(block_of(site.path, file.base), site.part) for site in file.base.sublayers}
    found: dict[str, dict[str, Tensor]] = {}
    for place, stored in file.take(CONTAINER).items():
        spot = spot_of(place, file)
        if spot not in every:
            raise FormatError(f"{file.where} has a fusion at {place}, where the base has none", "Check its base.")
        if (path := wanted.pop(spot, None)) is not None:
            found[path] = _matrices(method, sites[path], stored, place, file.where)
    if lacking := [spot for spot, path in wanted.items() if method.peft_keys(sites[path])]:
        block, part = lacking[0]
        raise FormatError(f"{file.where} lacks the fusion behind the {part} of {block}", NOT_WHOLE)
    file.check_done()
    return {path: found.get(path, {}) for path in sites}


def _matrices(
    method: Fusion, site: Site, stored: Mapping[str, Tensor], place: str, where: str
) -> dict[str, Tensor]:  # fmt: skip
    left, found = dict(stored), dict[str, Tensor]()
    for name, (key, shape) in method.peft_keys(site).items():
        end = key.removeprefix(f"{CONTAINER}.")
        value = left.pop(end, None)
        if value is None or tuple(value.shape) != shape:
            got = "lacks it" if value is None else f"has {tuple(value.shape)}"
            what = f"{place}.{CONTAINER} ... {end} should be of shape {shape}; {where} {got}"
            raise FormatError(what, "Check its config.")
        found[name] = value
    if unread := [end for end in left if not end.startswith("dense.")]:  # which AdapterHub makes and never reads
        raise FormatError(f"{where} holds {place}.{CONTAINER} ... {unread[0]}, of no use", "Check its config.")
    return found


def _without_others(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors but for those of fusions whose names go on where this one's ends: AdapterHub saves them too."""
    more = re.compile(rf"(?:.+\.)?{CONTAINER}\.{re.escape(name)}[^.]+\..+")
    return {key: value for key, value in tensors.items() if not more.fullmatch(key)}


# ---- what AdapterHub does otherwise


def otherwise(used: Used) -> str | None:
    """Why AdapterHub's fusion over these adapters is not the one here, for "... over adapters where"; None where it is
    the same."""
    for name, parts in used.items():
        method: Any = parts[0].method
        if len(parts) > 1 or not hasattr(method, "original_ln_before"):
            return f"{name!r} is {' and '.join(part.method.title for part in parts)}, no bottleneck alone"
        if method.is_parallel:
            return f"{name!r} is parallel: AdapterHub's fusion adds the residual stream twice there"
        if method.use_gating or method.ln_after:
            what = "gate" if method.use_gating else "norm behind it"
            return f"{name!r} has a {what}, which AdapterHub's fusion leaves out"
        if not method.adds or not method.original_ln_after:
            return f"{name!r} does not just add to what the sublayer gives, and AdapterHub's fusion does that alone"
    if len({reads_of({name: parts}) for name, parts in used.items()}) > 1:
        return f"{listed(used)} do not read the same: AdapterHub's fusion lets all read what the last one does"
    if len({frozenset(part.sites) for parts in used.values() for part in parts}) > 1:
        return f"{listed(used)} do not act on the same sublayers: AdapterHub's fusion leaves out who is not there"
    return None


def reads_of(used: Used) -> str:
    last: Any = [*used.values()][-1][0].method
    return last.reads


def sites_of(used: Used) -> Mapping[str, Site]:
    return next(iter(used.values()))[0].sites


def listed(names: Sequence[str] | Used) -> str:
    return " and ".join(map(repr, names))
