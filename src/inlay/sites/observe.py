"""What a base does, seen in one tiny forward of it alone.

Names and signatures say what a module may be; which modules are called, with what, and what becomes of what they give
is seen here, once for each base. Nothing of it stays on the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from .formulas import norm_offset, table_scale
from .recorder import Call, HeadShape, Recorder, first_tensor
from .rows import other_input, second_rows, whole_rows
from .scattered import scattered
from .site import Site
from .tiny import run_tiny

__all__ = ["Base", "Call", "HeadShape", "Observation", "attention_sites", "first_tensor", "observe", "uses_interface"]


class Base(Protocol):
    """A structure, as far as observing it needs one; see `inlay.sites.structure.Structure`."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def stacks(self) -> tuple[nn.Module, ...]: ...
    @property
    def blocks(self) -> dict[str, int]: ...
    @property
    def projections(self) -> list[Site]: ...
    @property
    def tables(self) -> list[Site]: ...
    @property
    def scales(self) -> list[Site]: ...
    @property
    def ends(self) -> list[Site]: ...
    @property
    def attentions(self) -> dict[nn.Module, Site]: ...
    @property
    def observed(self) -> Observation: ...


@dataclass(frozen=True, eq=False)
class Observation:
    """What one tiny forward showed; where none could be run, the maps are empty but for the last two.

    `ran`, and `why` not: the error's first line. `calls`: each module that was called, by path. `heads`: keys of the
    modules that compute attention through transformers' interface. `sublayers`: paths of the modules that give what a
    block's attention or MLP adds to the residual stream, by structure where none could be run. `streams`: for the path
    of a sublayer, the module whose first input is the residual stream that its output is added to. `same_input`: for
    the path of a linear layer, all of its block, in the order of calls, that read the very same tensor; itself is among
    them, and nobody is listed who reads alone. `unusable`: for the path of a linear layer or a table, why an adapter's
    hooks could not act there. `table_scale`: by what a table multiplies what it looks up. `norm_offset`: c of norms
    that give n(x) * (weight + c) + bias. Paths of modules whose rows lie otherwise than one after another:
    `second_rows` are given (tokens, rows, width), `whole_rows` several units of each row, `other_input` stand in
    models of images or sounds beside the text's, and `scattered` are experts, which get some of the tokens each.
    """

    ran: bool
    why: str
    calls: Mapping[str, Call]
    heads: Mapping[nn.Module, HeadShape]
    sublayers: tuple[str, ...]
    streams: Mapping[str, nn.Module]
    same_input: Mapping[str, tuple[str, ...]]
    unusable: Mapping[str, str]
    table_scale: Mapping[str, float]
    norm_offset: Mapping[str, float]
    second_rows: frozenset[str] = frozenset()
    whole_rows: frozenset[str] = frozenset()
    other_input: frozenset[str] = frozenset()
    scattered: frozenset[str] = frozenset()

    def silent(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that the forward did not call; none where it could not be run."""
        return [path for path in paths if path not in self.calls] if self.ran else []


def observe(base: Base) -> Observation:
    """Run the tiny forward; `base.observed` keeps what this gives."""
    recorder = Recorder(base.model, base.blocks, base.projections, base.tables, base.scales, base.ends)
    with recorder.watching():
        why = run_tiny(base.model, recorder.forget)
    scales = {site.path: table_scale(site.module) for site in base.tables}
    unusable = recorder.unusable() if not why else {}
    for path, scale in scales.items():
        if scale is None:
            unusable.setdefault(path, "gives something else than the rows of its ids")
    for site in base.projections if not why else ():
        call = recorder.calls.get(site.path)
        if call is not None and call.output_shape and call.output_shape[-1] != site.out_features:
            given = f"gives {call.output_shape[-1]} features where its weight makes {site.out_features}"
            unusable.setdefault(site.path, given)
    sublayers, streams = recorder.streams()
    offsets = {s.path: norm_offset(s.module, recorder.calls.get(s.path)) for s in base.scales}
    calls, inside = recorder.calls, {module for stack in base.stacks for module in stack.modules()}
    heads = {module: shape for module, shape in recorder.heads.items() if module in inside}  # a tower's are its own
    paths = {s.path for sites in (base.projections, base.tables, base.scales, base.ends) for s in sites} | {
        *base.blocks
    }
    return Observation(
        not why, why, calls, heads, tuple(sublayers), streams, recorder.same_input(), unusable,
        {path: scale for path, scale in scales.items() if scale is not None},
        {path: offset for path, offset in offsets.items() if offset is not None}, second_rows(calls),
        whole_rows(base.model, calls, paths), other_input(base.model, paths),
        scattered(base.model, base.blocks, calls),
    )  # fmt: skip


def uses_interface(base: Base) -> bool:
    """Whether attention goes through transformers' attention interface, so that it can be taken over for one call."""
    return bool(base.observed.heads)


def attention_sites(base: Base) -> list[Site]:
    """Self-attention sites in the order of the blocks, with heads, head_dim and value_dim of their keys and values.

    A model whose attention was not seen is described by its configuration, which says nothing of the towers beside
    its stacks.
    """
    seen = base.observed.heads
    inside = {*seen} or {module for stack in base.stacks for module in stack.modules()}
    sites = []
    paths = [site.path for site in base.attentions.values()]
    for module, site in base.attentions.items():
        if site.part == "cross-attention" or module not in inside:
            continue
        if not seen and any(p.startswith(site.path + ".") for p in paths):
            continue  # where nothing was seen, the innermost module is the one with keys
        shape = seen.get(module) or _configured(base.model, module)
        if shape is not None and shape.heads:
            repeats = shape.repeats if shape.heads // shape.repeats == _cached_heads(base.model) else 1
            dims = {"heads": shape.heads // repeats, "head_dim": shape.head_dim, "value_dim": shape.value_dim}
            sites.append(replace(site, keys_of=shape.keys_of, repeats=repeats, value_heads=shape.value_heads, **dims))
    return sites


def _cached_heads(model: Any) -> int:
    """The heads that a cache holds, by the configuration."""
    config = model.config.get_text_config(decoder=True) if hasattr(model, "config") else None
    return int(getattr(config, "num_key_value_heads", 0) or 0)


def _configured(model: nn.Module, module: nn.Module) -> HeadShape | None:
    config = getattr(module, "config", None) or getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", 0)
    if not isinstance(heads, int) or not heads:  # bases of several stages have a list
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        shared = 1
    return HeadShape(shared, int(width), int(width))
