"""Finds every place in a model where an adapter can act, by what modules are and where they stand."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from .backbone import Backbone, observe_positions
from .behind import block_sites, head_sites
from .experts import Mixture, expert_modules, expert_sites, read_mixtures
from .hints import CROSS_ATTENTION, FUSED_EXPERTS, HEADS, IS_ATTENTION, role_of
from .observe import Observation, observe
from .site import Site, is_conv1d

__all__ = ["Structure", "find"]


_lock = threading.RLock()


@dataclass(frozen=True, eq=False)
class Structure:
    """A base as adapters see it. `layers` counts repeated blocks, those of an encoder before those of its decoder.

    `projections`, `tables`, `scales` (norms), `ends` (of attention or MLP) and `attentions` are what modules look like.
    What they were seen to do (`observed`) is in `embeddings` and `norms`, the tables and norms that adapters can act
    on; in `sublayers`, one for each part of a block; in `block_sites`, the residual stream behind each block; and in
    `heads`, which turn the last states into logits.
    """

    model: nn.Module
    stacks: tuple[nn.Module, ...]
    blocks: dict[str, int]
    projections: list[Site] = field(default_factory=list)
    tables: list[Site] = field(default_factory=list)
    scales: list[Site] = field(default_factory=list)
    ends: list[Site] = field(default_factory=list)
    attentions: dict[nn.Module, Site] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def observed(self) -> Observation:
        """What the base did in one tiny forward, which the first to ask runs."""
        with _lock:
            return self._observed

    @cached_property
    def _observed(self) -> Observation:
        return observe(self)

    @cached_property
    def embeddings(self) -> list[Site]:
        """Tables that give the rows of their ids, with their `table_scale`."""
        scale, unusable = self.observed.table_scale, self.observed.unusable
        return [replace(s, table_scale=scale[s.path]) for s in self.tables if s.path not in unusable]

    @cached_property
    def idle_tables(self) -> dict[str, str]:
        """By path, why nothing becomes of an adapter on a table that is not called while others look up its weight."""
        idle = {site.path: site.module.weight for site in self.tables if site.path in self.observed.silent([site.path])}
        called = [site for site in self.tables if site.path not in idle]
        found = {path: [s.path for s in called if s.module.weight is weight] for path, weight in idle.items()}
        return {path: f"is not called: {', '.join(by)} look up its weight" for path, by in found.items() if by}

    @cached_property
    def norms(self) -> list[Site]:
        """Norms of one input, with the `offset` of their weight."""
        offset = self.observed.norm_offset
        return [replace(s, offset=offset[s.path]) for s in self.scales if s.path in offset]

    @cached_property
    def sublayers(self) -> list[Site]:
        """What each attention and each MLP of a block adds to the residual stream."""
        return [site for site in self.ends if site.path in self.observed.sublayers]

    @cached_property
    def backbones(self) -> list[Backbone]:
        """One for each of `stacks`, with its rule of positions as tiny forwards show it: not to be asked for inside of
        a forward."""
        parts = ("encoder", "decoder") if len(self.stacks) == 2 else ("",)
        return [observe_positions(stack, part) for stack, part in zip(self.stacks, parts, strict=True)]

    @cached_property
    def block_sites(self) -> list[Site]:
        """One site for each repeated block."""
        return block_sites(self)

    @cached_property
    def expert_modules(self) -> dict[str, nn.Module]:
        """Modules inside of blocks that may be mixtures, by their path."""
        return expert_modules(self.model, self.blocks)

    @cached_property
    def _mixtures(self) -> tuple[dict[str, Mixture], dict[str, str]]:
        seen = self.observed
        return read_mixtures(self.model, self.blocks, seen.calls, seen.why)

    @cached_property
    def experts(self) -> list[Site]:
        """One site for each 3-D parameter of a mixture whose formula is known."""
        return list(expert_sites(self._mixtures[0], self.blocks))

    @property
    def mixtures(self) -> dict[nn.Module, Mixture]:
        """The formulas of modules that hold experts as 3-D parameters."""
        return {mixture.module: mixture for mixture in self._mixtures[0].values()}

    @property
    def unread_mixtures(self) -> dict[str, str]:
        """By the path of a module that holds other 3-D parameters, why it has no sites."""
        return self._mixtures[1]

    @cached_property
    def heads(self) -> list[Site]:
        """Whole modules behind the last block, outside of the backbone."""
        return head_sites(self)


def find(model: nn.Module) -> Structure:
    """Read the structure of a transformers model; nothing is run and nothing is changed."""
    structure = Structure(model, _stacks(model), _blocks(model))
    reader = _Reader(structure)
    for path, module in model.named_modules():
        reader.read(path, module)
    structure.ends.extend(reader.ends())
    return structure


def _stacks(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that turn ids into hidden states: one, or an encoder and a decoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder, decoder = model.get_encoder(), model.get_decoder()  # pyright: ignore[reportCallIssue]
        while any(module is encoder for module in decoder.modules()):
            inner = decoder.get_decoder()  # a whole model of text, behind one of images
            if inner is decoder:
                return (encoder,)  # without a decoder, as Whisper's for labels
            decoder = inner
        return (encoder, decoder)
    stack = getattr(model, "base_model", model)
    while inner := next((child for child in stack.children() if _same_inputs(child, stack, model)), None):
        stack = inner  # a wrapper, which a model with a head may not even call
    return (stack,)


def _same_inputs(child: nn.Module, stack: nn.Module, model: nn.Module) -> bool:
    """Whether `child` is a model of its own that embeds the ids for `stack`, or for `model` where that cannot tell."""
    own = _ids_table(child)
    outer = _ids_table(stack)
    return own is not None and own is (_ids_table(model) if outer is None else outer)


def _ids_table(module: Any) -> nn.Embedding | None:
    try:
        table = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return table if isinstance(table, nn.Embedding) else None


def _blocks(model: nn.Module) -> dict[str, int]:
    """Path of each repeated block, and its number: the elements of the outermost module lists that hold projections."""
    blocks: dict[str, int] = {}
    outer: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(o + ".") for o in outer):
            continue
        if all(any(_is_projection(m) for m in child.modules()) for child in module) and len(module):
            outer.append(path)
            for index in range(len(module)):
                blocks[f"{path}.{index}"] = index
    return blocks


def _is_projection(module: nn.Module) -> bool:
    """Linear layers, quantized ones and transformers' Conv1D."""
    return is_conv1d(module) or isinstance(module, nn.Linear) or (
        hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight")
    )  # fmt: skip


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if "Norm" not in type(module).__name__ or weight is None or weight.ndim != 1:
        return False
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return len([p for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) == 1  # no gated norms


class _Reader:
    """One walk over the modules; remembers what stands around the one being read."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.modules = dict(structure.model.named_modules(remove_duplicate=False))
        # An encoder's own modules, to tell its blocks from its decoder's.
        self.encoder = {id(m) for m in structure.stacks[0].modules()} if len(structure.stacks) == 2 else set()

    def read(self, path: str, module: nn.Module) -> None:
        block = self.block_of(path)
        layer = self.structure.blocks.get(block) if block is not None else None
        stack = "" if not self.encoder else ("encoder" if id(module) in self.encoder else "decoder")
        part = self.part_of(path, block)
        if block is not None and IS_ATTENTION.search(type(module).__name__) and not _is_norm(module):
            self.structure.attentions[module] = Site(path, "attention", module, layer, part, stack=stack)
        if isinstance(module, nn.Embedding):
            rows, width = int(module.num_embeddings), int(module.embedding_dim)
            self.structure.tables.append(
                Site(path, "embedding", module, layer, "embedding", stack=stack, in_features=rows, out_features=width)
            )
        elif _is_projection(module):
            n_in, n_out = _features(module)
            role = role_of(path.rpartition(".")[2]) if "attention" in part else ""
            site = Site(path, "linear", module, layer, part, role, stack, n_in, n_out)
            self.structure.projections.append(site)
        elif _is_norm(module):
            width = int(module.weight.shape[0])  # pyright: ignore
            self.structure.scales.append(
                Site(path, "norm", module, layer, "norm", stack=stack, in_features=width, out_features=width)
            )

    def block_of(self, path: str) -> str | None:
        return next((b for b in self.structure.blocks if path == b or path.startswith(b + ".")), None)

    def part_of(self, path: str, block: str | None) -> str:
        if block is None:
            return "head" if HEADS.search(path) else ""
        inside = path[len(block) + 1 :].split(".") if path != block else []
        for depth, part in enumerate(inside, 1):
            holder = self.modules[".".join([block, *inside[:depth]])]
            kind = type(holder).__name__
            attends = IS_ATTENTION.search(part) or IS_ATTENTION.search(kind)
            if attends and not _is_projection(holder) and not _is_norm(holder):
                crossed = any(CROSS_ATTENTION.search(name) for name in (kind, *inside))
                return "cross-attention" if crossed else "attention"
        return "mlp"

    def ends(self) -> list[Site]:
        """What may give what an attention or an MLP adds to the residual stream: projections of the stream's width."""
        found: list[Site] = []
        for block, layer in self.structure.blocks.items():
            inside = [s for s in self.structure.projections if s.path.startswith(block + ".")]
            width = max((s.out_features for s in inside if s.role == "o"), default=0) or self.width(block)
            for part in ("attention", "cross-attention", "mlp"):
                mixture = self.mixture(block, part)
                wide = [s for s in inside if s.part == part and s.out_features == width]
                for site in wide if mixture is None else [mixture]:
                    found.append(
                        Site(
                            site.path, "sublayer", site.module, layer, part, stack=site.stack, in_features=width,
                            out_features=width, norm=self.norm_after(site.path),
                        )
                    )  # fmt: skip
        return found

    def width(self, block: str) -> int:
        """That of the residual stream by the configuration of the module nearest around `block` that says it."""
        names = block.split(".")
        for around in (self.modules[".".join(names[:n])] for n in range(len(names), -1, -1)):
            width = getattr(getattr(around, "config", None), "hidden_size", 0)
            if isinstance(width, int) and width:
                return width
        return 0

    def mixture(self, block: str, part: str) -> Site | None:
        """The module around a mixture's experts: their weighted sum is what the block adds."""
        for path, module in self.modules.items():
            if path.startswith(block + ".") and path.rpartition(".")[2] in FUSED_EXPERTS:
                around = path.rpartition(".")[0]
                if around != block and self.part_of(path, block) == part:  # an attention may be a mixture too
                    return Site(around, "sublayer", self.modules[around] or module, part=part)
        return None

    def norm_after(self, path: str) -> nn.Module | None:
        """The norm that a post-norm output module applies to `projection(x) + residual` (BERT and its family)."""
        holder = self.modules[path.rpartition(".")[0]]
        if len(inspect.signature(holder.forward).parameters) != 2:
            return None
        return next((m for m in holder.children() if _is_norm(m)), None)


def _features(module: nn.Module) -> tuple[int, int]:
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]  # pyright: ignore
    return int(module.in_features), int(module.out_features)  # pyright: ignore[reportArgumentType]
