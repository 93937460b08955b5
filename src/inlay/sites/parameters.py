"""Turns names of parameters that hold experts into sites, by HF PEFT's rule, and says why a name has none."""

from __future__ import annotations

from collections.abc import Sequence

from inlay.errors import UsageError

from .site import Site
from .structure import Structure
from .targets import Layers, Targets, parse_layers

__all__ = ["EXPERTS", "experts_left_out", "select_experts", "split_targets", "why_no_experts"]

EXPERTS = "experts"
"""The target that takes all parameters of experts."""


def split_targets(targets: Targets) -> tuple[Targets, bool]:
    """`targets` without the word for all experts, and whether it was among them."""
    if isinstance(targets, str):
        return ([], True) if targets == EXPERTS else (targets, False)
    return [target for target in targets if target != EXPERTS], EXPERTS in targets


def select_experts(base: Structure, names: Sequence[str], every: bool, layers: Layers = None) -> list[Site]:
    """The parameters of experts whose whole path, or its end behind a dot, is one of `names`; all with `every`.

    Raises: UsageError naming what is no such parameter, and why; or `layers` that hold none.
    """
    if every and not base.experts:
        why = next((f"{path} {reason}" for path, reason in base.unread_mixtures.items()), None)
        what = f"the base has no experts that LoRA can act on{'' if why is None else f': {why}'}"
        raise UsageError(what, "Leave the target 'experts' out.")
    chosen = {site.path: site for site in base.experts} if every else {}
    for name in names:
        found = [site for site in base.experts if matches(site.path, name)]
        if not found:
            raise UsageError(*why_no_experts(base, name))
        chosen.update((site.path, site) for site in found)
    if layers is not None and chosen:
        kept = parse_layers(layers, 1 + max(base.blocks.values(), default=-1))
        chosen = {path: site for path, site in chosen.items() if site.layer in kept}
        if not chosen:
            raise UsageError(f"layers {layers!r} hold none of the parameters {list(names)!r}", "Name other layers.")
    return [site for site in base.experts if site.path in chosen]


def matches(path: str, name: str) -> bool:
    """Whether `name` targets the parameter at `path`, as HF PEFT decides it."""
    return path == name or path.endswith(f".{name}")


def experts_left_out(base: Structure, targets: object, sites: Sequence[Site]) -> str | None:
    """A line that says what share of the base's weights lies in experts that a method at `sites` leaves alone, although
    its `targets` are the group of all layers or of all MLPs; None where there are none."""
    named = [targets] if isinstance(targets, str) else targets if isinstance(targets, (list, tuple)) else []
    group = next((name for name in ("all-linear", "mlp") if name in named), None)
    acting = {site.path for site in sites}
    held = {
        f"{path}.{name}": parameter
        for path, module in base.expert_modules.items()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }
    left = {path: parameter for path, parameter in held.items() if path not in acting}
    if group is None or not left:
        return None
    share = sum(p.numel() for p in left.values()) / sum(p.numel() for p in base.model.parameters())
    names = ", ".join(dict.fromkeys(".".join(path.split(".")[-2:]) for path in left))
    remedy = f"LoRA's target_parameters take them ({names})" if base.experts else "no method here acts on them"
    return f"{share:.0%} of the base's weights are parameters of experts, which {group} leaves out; {remedy}"


def why_no_experts(base: Structure, name: str) -> tuple[str, str]:
    """What is wrong with a target parameter `name` that is no parameter of experts, and the remedy."""
    found = [path for path, _ in base.model.named_parameters(remove_duplicate=False) if matches(path, name)]
    candidates = ", ".join(dict.fromkeys(site.name for site in base.experts)) or "none"
    if not found:
        return f"target parameter {name!r} matches no parameter of the base", f"Parameters of experts: {candidates}."
    module = found[0].rpartition(".")[0]
    if module in base.unread_mixtures:
        return (
            f"target parameter {name!r} names {found[0]}, whose module {base.unread_mixtures[module]}",
            "Leave it out.",
        )
    if any(site.path == module for site in base.projections):
        return f"target parameter {name!r} names the weight of the layer {module}", "Name the layer in targets."
    return (
        f"target parameter {name!r} names {found[0]}, which holds no experts",
        f"Parameters of experts: {candidates}.",
    )
