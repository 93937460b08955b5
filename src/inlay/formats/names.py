"""The one place that knows by which names other code calls the modules of a base, and gives them their true ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from inlay.errors import FormatError
from inlay.methods.contract import Site, Structure

from .parts import BASE_LAYER, ROOT, SHORT_ROOT

__all__ = ["layers", "true_names", "without_adapter_name"]

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Modules that stand around another one and have no parameters: those of torch.compile, FSDP and checkpointing."""
PARALLEL = "module"
"""What DataParallel and DistributedDataParallel call the model inside."""
SAVED, ORIGINAL = "modules_to_save", "original_module"
"""Inside of HF PEFT's wrapper of a saved module: the adapter's own, below the adapter's name, and the base's."""
ODD = WRAPPERS | {SAVED, ORIGINAL, BASE_LAYER}


def layers(base: Structure) -> dict[str, Site]:
    """Linear layers, tables and norms by their paths: they hold no modules, so that what a key says behind two more
    parts of a name is never a weight of the base."""
    return {site.path: site for site in (*base.projections, *base.tables, *base.scales)}


def true_names(stored: Mapping[str, Tensor], base: Structure, where: str) -> dict[str, Tensor]:
    """`stored` with the base's own name of each module behind ROOT, whatever wrapped it when it was saved, and whatever
    an earlier release of transformers called it. Keys that belong to no module of the base keep theirs.

    A parameter that a module shares with one inside of it (BERT's head with its decoder) goes by the inner name.
    Raises: FormatError where two keys are of one name.
    """
    names, plain = _Names(base), layers(base)
    found: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for key, value in stored.items():
        name = key if _is_plain(key, plain) else names.of(key)
        if name is None:
            continue
        if name in found:
            raise FormatError(f"{where} holds {name!r} twice, as {first[name]!r} and as {key!r}", "Save one adapter.")
        found[name], first[name] = value, key
    return names.with_inner(found, plain)


def _is_plain(key: str, plain: Mapping[str, Site]) -> bool:
    """Whether a key is by the base's own name for sure: quick, since most are."""
    if not key.startswith(ROOT) or not ODD.isdisjoint(key.split(".")):
        return False
    inner = key[len(ROOT) :].rpartition(".")[0]
    return inner in plain or inner.rpartition(".")[0] in plain


def without_adapter_name(keys: Iterable[str], wanted: str, container: str, where: str) -> str | None:
    """The one of `keys` that is `wanted` but for an adapter's name behind `container`, a part of `wanted` that ends in
    the parameter's own ("lora_A"); None where there is none. Raises: FormatError where there are several."""
    rest = wanted.removeprefix(container)
    begin = container + "."
    named = {
        key: key[len(begin) : len(key) - len(rest)]
        for key in keys
        if key.startswith(begin) and key.endswith(rest) and len(key) > len(begin) + len(rest)
    }
    named = {key: name for key, name in named.items() if "." not in name}
    if len(named) > 1:
        names = ", ".join(sorted(named.values()))
        raise FormatError(
            f"{where} holds several adapters: {names}", "Save one: save_pretrained(selected_adapters=...)."
        )
    return next(iter(named), None)


class _Names:
    def __init__(self, base: Structure) -> None:
        self.base = base

    @cached_property
    def modules(self) -> set[str]:
        return {path for path, _ in self.base.model.named_modules(remove_duplicate=False)}

    @cached_property
    def parameters(self) -> dict[str, Any]:
        return dict(self.base.model.named_parameters(remove_duplicate=False))

    @cached_property
    def sites(self) -> set[str]:
        ends = (site.path for site in self.base.ends)
        return {*layers(self.base), *ends, *self.base.expert_modules}

    def of(self, key: str) -> str | None:
        """The true name of a stored key; None where it is the base's own copy of a module that the adapter has."""
        parts = [part for part in key.split(".") if part not in WRAPPERS]
        if ORIGINAL in parts:
            return None
        if SAVED in parts[:-2]:
            at = parts.index(SAVED)
            del parts[at : at + 2]
        plain = ".".join(parts)
        path = max(self._candidates(plain), key=self._fit)  # of equal ones, the first
        if not self._fit(path) and self.renamings:
            path = max((path, self._renamed(path)), key=self._fit)
        if not self._depth(path):
            return plain
        inner = path.replace(f".{BASE_LAYER}.", ".")
        return ROOT + (inner if inner in self.parameters else path)

    def _candidates(self, plain: str) -> list[str]:
        """What may be the path in the base: without what HF PEFT or a parallel wrapper puts before it."""
        found: list[str] = []
        for root in (ROOT, SHORT_ROOT, ""):
            outer = plain if PARALLEL in self.modules else plain.removeprefix(PARALLEL + ".")
            if outer.startswith(root):
                inner = outer[len(root) :]
                found.append(inner if PARALLEL in self.modules else inner.removeprefix(PARALLEL + "."))
        return found

    def _owner(self, path: str) -> str:
        """The innermost module that `path` goes into."""
        while path and path not in self.modules:
            path = path.rpartition(".")[0]
        return path

    def _depth(self, path: str) -> int:
        owner = self._owner(path)
        return owner.count(".") + 1 if owner else 0

    def _fit(self, path: str) -> int:
        """How deep the module lies that `path` goes into, if it is one that adapters act on."""
        return self._depth(path) if self._owner(path) in self.sites else 0

    @cached_property
    def renamings(self) -> list[Any]:
        """By what rules this transformers renames what its earlier releases saved."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming
        except ImportError:
            return []
        try:
            found = get_model_conversion_mapping(self.base.model, add_legacy=False)  # pyright: ignore
        except (AttributeError, TypeError):
            return []  # a model of another library
        return [rule for rule in found if isinstance(rule, WeightRenaming)]

    def _renamed(self, path: str) -> str:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(path, self.renamings, [])[0]

    def with_inner(self, named: dict[str, Tensor], plain: Mapping[str, Site]) -> dict[str, Tensor]:
        """Parameters of the base that a module shares with one inside of it, by the inner name."""
        if all(key.removeprefix(ROOT).rpartition(".")[0].rpartition(".")[0] in plain for key in named):
            return named
        parameters = {ROOT + name: p for name, p in self.parameters.items()}
        for key in [key for key in named if key in parameters]:
            around = key.rpartition(".")[0] + "."
            inner = (name for name, p in parameters.items() if p is parameters[key] and name.startswith(around))
            named[next((name for name in inner if name != key), key)] = named.pop(key)
        return named
