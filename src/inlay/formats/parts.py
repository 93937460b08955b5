"""Several methods in one folder: one in the config of another where HF PEFT has fields for it, else a layout of ours.

Ours is an adapter_config.json of the type "PARTS", whose `parts` hold the config of each, in order; the tensors of part
i stand in the one file under "i." and the keys that they would have alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from inlay.errors import FormatError
from inlay.methods.contract import Method, Site

__all__ = ["BASE_LAYER", "PARTS", "ROOT", "SHORT_ROOT", "SavedPart", "Written", "beside", "numbered", "split_parts"]

PARTS = "PARTS"
ROOT, SHORT_ROOT = "base_model.model.", "base_model."
"""What HF PEFT writes before the path of a module; the short one beside prompts and prefixes."""

BASE_LAYER = "base_layer"
"""By what HF PEFT calls a module of the base inside of its wrapper."""

Written = tuple[dict[str, Any], dict[str, Tensor]]
"""A config, and the tensors by their keys."""


class SavedPart(Protocol):
    """One method of an adapter with its values; see `inlay.bank.adapter.Part`."""

    @property
    def method(self) -> Method: ...
    @property
    def sites(self) -> Mapping[str, Site]: ...
    @property
    def params(self) -> Mapping[str, Mapping[str, Tensor]]: ...
    @property
    def constants(self) -> Mapping[str, Tensor]: ...


def beside(parts: Sequence[SavedPart], written: Sequence[Written]) -> Written | None:
    """All parts in the config of one of them, in whose fields HF PEFT describes the rest; None where it cannot."""
    found = (_hosted(parts, written, host) for host in range(len(parts)))
    return next((config for config in found if config is not None), None)


def _hosted(parts: Sequence[SavedPart], written: Sequence[Written], host: int) -> Written | None:
    config, tensors = dict(written[host][0]), dict(written[host][1])
    method = parts[host].method
    short = method.prefix_length or method.virtual_length
    for number, part in enumerate(parts):
        if number == host:
            continue
        wraps = part.method.replaces or type(part.method).key_beside is not Method.key_beside
        if wraps and parts[host].sites.keys() & part.sites.keys():
            return None  # HF PEFT takes no target among the modules that it wraps for these
        fields = part.method.fields_beside(method, list(part.sites.values()))
        own = {part.method.key_beside(key): value for key, value in written[number][1].items()}
        own = {key.replace(ROOT, SHORT_ROOT, 1) if short else key: value for key, value in own.items()}
        own = {_wrapped(key, parts[host].sites): value for key, value in own.items()}
        if fields is None or tensors.keys() & own.keys():
            return None
        if any(config.get(name) not in (None, [], "none") for name in fields):
            return None  # the host itself or a third part has said it
        config |= fields
        tensors |= own
    return config, tensors


def _wrapped(key: str, sites: Mapping[str, Site]) -> str:
    """The key of a tensor of the base itself: HF PEFT wraps the modules that the host acts on."""
    path, _, name = key.removeprefix(ROOT).rpartition(".")
    return f"{ROOT}{path}.{BASE_LAYER}.{name}" if path in sites else key


def numbered(written: Sequence[Written]) -> Written:
    """Each part with a config of its own, its tensors under its number."""
    tensors = {f"{i}.{key}": value for i, (_, own) in enumerate(written) for key, value in own.items()}
    return {"peft_type": PARTS, "parts": [config for config, _ in written]}, tensors


def split_parts(config: Mapping[str, Any], stored: Mapping[str, Tensor], where: str) -> list[Written]:
    """The inverse of `numbered`. Raises: FormatError where a config is none, or a tensor belongs to no part."""
    parts = config.get("parts")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise FormatError(f"{where} has no list of configs under 'parts'", "Save the adapter again.")
    if any(part.get("peft_type") == PARTS for part in parts):
        raise FormatError(f"{where} has parts that have parts", "Save the adapter again.")
    own: list[dict[str, Tensor]] = [{} for _ in parts]
    for key, value in stored.items():
        number, _, rest = key.partition(".")
        if not (number.isascii() and number.isdigit() and str(int(number)) == number and int(number) < len(parts)):
            raise FormatError(f"{where} holds the tensor {key!r}, which is of no part", "Check its config.")
        own[int(number)][rest] = value
    return list(zip(parts, own, strict=True))
