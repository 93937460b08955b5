"""Modules to save: an adapter has its own copy of whole modules of the base, a classification head for one.

    y = module(x; W')          W' starts at the base's own parameters

Heads of models for classification are drawn at random and mean nothing until they are trained, so that they travel with
the adapter, as `modules_to_save` of HF PEFT. Shapes are those of the module's parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from inlay.errors import UsageError
from inlay.sites.site import bare
from inlay.values import Help

from .contract import Method, Params, Site, Structure, Tokens
from .own_modules import check_own, separate
from .peft_fields import LORA_FIELDS

__all__ = ["ModulesToSave"]

NO_TARGETS = "dummy-target-modules"
"""What a LoRA config of HF PEFT targets where an adapter is saved modules alone."""


@dataclass(frozen=True)
class ModulesToSave(Method):
    """Settings: `targets` are endings of module paths; None is every head, or parts of one that has a parameter twice.

    Linear layers, tables and norms may stand anywhere in the base. Modules of several layers stand outside of its
    blocks, and see whole rows.
    """

    title = "Modules to save"
    paper = "modules_to_save of HF PEFT"
    peft_type = ""  # a field of other methods' configs there, no type of its own
    peft_fields = LORA_FIELDS  # alone, it stands in a config of that type
    replaces = True
    lr = 0.001

    targets: Annotated[Sequence[str] | None, Help("endings of modules' paths; every head where unset")] = None

    def sites(self, base: Structure) -> list[Site]:
        """Raises: UsageError where a name matches no module, or a module that cannot be trained apart from others."""
        heads = [path for site in base.heads for path in separate(site.path, site.module)]
        wanted = heads if self.targets is None else list(self.targets)
        paths = {m: p for p, m in base.model.named_modules() if any(True for _ in m.parameters())}
        named = {m: p for m, p in paths.items() if any(p == t or p.endswith("." + t) for t in wanted)}
        missing = [t for t in wanted if not any(p == t or p.endswith("." + t) for p in named.values())]
        if missing or not named:
            what = ", ".join(missing) or "head"
            remedy = f"Its heads: {', '.join(heads) or 'none'}. transformers' AutoModelFor... classes say which it has."
            raise UsageError(f"the base has no module {what}, which the adapter has its own of", remedy)
        known = {s.module: s for s in [*base.embeddings, *base.norms, *base.projections]}
        sites = [known.get(module) or Site(path, "head", module, part="head") for module, path in named.items()]
        for site in sites:
            check_own(site, base)
        return sites

    def create(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: value.detach().clone().float() for name, value in site.module.named_parameters()}

    def output(self, params: Params, x: Tensor, y: Tensor, site: Site, tokens: Tokens) -> Tensor:
        made = _bare(site.module, params)(x)
        if site.kind != "embedding":
            return made
        return torch.where(tokens.position[:, None] < 0, y, made)  # virtual tokens have no row in the table

    def whole(self, params: Params, site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return _bare(site.module, params)(*args, **kwargs)

    def merge(self, params: Params, site: Site) -> dict[str, Tensor]:
        return {name: params[name] for name, _ in site.module.named_parameters()}

    def peft_keys(self, site: Site) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (name, tuple(value.shape)) for name, value in site.module.named_parameters()}

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        return config.get("target_modules") == NO_TARGETS

    def fields_beside(self, host: Method, sites: Sequence[Site]) -> Mapping[str, Any] | None:
        return {"modules_to_save": [site.path for site in sites]}

    @classmethod
    def read_beside(cls, config: Mapping[str, Any], keys: Collection[str]) -> Method | None:
        """The modules that hold `keys`; for some tasks HF PEFT lists names that the base need not have."""
        names = tuple(config.get("modules_to_save") or ())
        paths = (next((p for p in _prefixes(key) if p.endswith(names)), "") for key in keys) if names else ()
        found = [path for path in dict.fromkeys(paths) if path]
        return cls(targets=found) if found else None

    def to_peft(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {"peft_type": "LORA", "target_modules": NO_TARGETS, **(self.fields_beside(self, sites) or {})}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], paths: list[str]) -> ModulesToSave:
        return cls(targets=paths)


def _prefixes(key: str) -> list[str]:
    """Paths of the modules around the parameter `key`, the outermost first."""
    parts = key.split(".")[:-1]
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _bare(module: nn.Module, params: Params, path: str = "") -> nn.Module:
    """`module` without hooks, with `params` in the place of its own, in their dtypes, which need not be that of what it
    gives; it shares nothing that a call could change."""
    own = {n: params.get(path + n, p).to(p.dtype) for n, p in module._parameters.items() if p is not None}
    made = bare(module, own)
    made.__dict__["_modules"] = {
        name: child if child is None else _bare(child, params, f"{path}{name}.")
        for name, child in module._modules.items()
    }
    return made
