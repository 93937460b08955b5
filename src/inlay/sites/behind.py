"""Sites that only the order of calls shows: the residual stream behind each block, and heads behind the last one."""

from __future__ import annotations

from torch import nn

from .hints import HEADS
from .observe import Base
from .site import Site

__all__ = ["block_sites", "head_sites"]


def block_sites(base: Base) -> list[Site]:
    """Each repeated block that gives states (rows, length, width), as a site of that width.

    Where the base could not be run, or did not call a block, its projections say the width.
    """
    found = []
    for path, layer in base.blocks.items():
        call = base.observed.calls.get(path)
        inside = [s for s in base.ends if s.path.startswith(path + ".")]
        width = inside[0].in_features if inside else 0
        if call is not None:
            width = call.output_shape[-1] if call.output_shape and len(call.output_shape) == 3 else 0
        if width:
            stack = inside[0].stack if inside else ""
            module = base.model.get_submodule(path)
            found.append(
                Site(path, "block", module, layer, "block", stack=stack, in_features=width, out_features=width)
            )
    return found


def head_sites(base: Base) -> list[Site]:
    """The outermost modules outside of backbone and blocks that hold linear layers and were called behind the last
    block, or have a head's name where nothing was called.
    """
    calls, found = base.observed.calls, []
    last = max((calls[path].turn for path in base.blocks if path in calls), default=0)
    for path, module in _outside(base, "", base.model):
        linear = [s for s in base.projections if s.path == path or s.path.startswith(path + ".")]
        called = [calls[s.path].turn for s in linear if s.path in calls]
        if linear and (min(called) > last if called and last else HEADS.search(path) is not None):
            found.append(
                Site(
                    path, "head", module, None, "head", in_features=linear[0].in_features,
                    out_features=linear[-1].out_features,
                )
            )  # fmt: skip
    return found


def _outside(base: Base, path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost modules that hold no block and are in no stack of the base."""
    if module in base.stacks:
        return []
    if path and not any(block == path or block.startswith(path + ".") for block in base.blocks):
        holds = {id(m) for m in module.modules()}
        return [] if any(id(stack) in holds for stack in base.stacks) else [(path, module)]
    found = []
    for name, child in module.named_children():
        found += _outside(base, f"{path}.{name}" if path else name, child)
    return found
