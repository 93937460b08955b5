"""Which modules of a base an adapter can have copies of."""

from __future__ import annotations

from torch import nn

from inlay.errors import UsageError

from .contract import Site, Structure

__all__ = ["check_own", "separate"]


def check_own(site: Site, base: Structure) -> None:
    """Raises: UsageError where a copy of the module could not be trained, or would not be what it is in the base."""
    if site.kind == "head" and any(_around(site.path, b) or _around(b, site.path) for b in base.blocks):
        raise UsageError(f"{site.path} is a part of the base's blocks", "Name linear layers, norms or heads.")
    if (inner := separate(site.path, site.module)) != [site.path]:
        raise UsageError(f"{site.path} holds one parameter under two names", f"Name modules in it: {', '.join(inner)}.")
    if held := sorted({*site.module.state_dict()} - {name for name, _ in site.module.named_parameters()}):
        raise UsageError(f"{site.path} holds {held[0]}, which is no parameter", "Name linear layers or norms in it.")
    silent = "is not called" if site.kind == "linear" and base.observed.silent([site.path]) else ""
    if why := base.observed.unusable.get(site.path, silent):
        raise UsageError(f"{site.path} {why}: a copy of it would not be used", "Name modules that the base calls.")
    if site.quantized or not all(p.is_floating_point() for p in site.module.parameters()):
        raise UsageError(f"{site.path} is quantized and cannot be trained", "Open the base without quantization.")


def separate(path: str, module: nn.Module) -> list[str]:
    """The outermost modules, `module` or inside of it, that hold each of their parameters under one name."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if len(names) == len([*module.parameters()]):
        return [path] if names else []
    return [inner for name, child in module.named_children() for inner in separate(f"{path}.{name}", child)]


def _around(path: str, other: str) -> bool:
    """Whether the module at `path` is the one at `other`, or holds it."""
    return other == path or other.startswith(path + ".")
