"""A forward's beginning and end: what stands in for the forward of the base and of its backbones lays the batch out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bases.heads import can_write
from inlay.batch.forward import FORWARD, IN_MODEL, Forward, inside
from inlay.batch.noise import neftune
from inlay.batch.packed import PackedLayout
from inlay.batch.padded import PaddedLayout
from inlay.batch.paged import PastLayout
from inlay.batch.prefixes import Prefixes
from inlay.batch.route import Blend, Route
from inlay.errors import UsageError
from inlay.kernels.standin import StandIn
from inlay.sites.backbone import Backbone
from inlay.sites.observe import uses_interface
from inlay.sites.structure import Structure

from .caches import check_cache, filled_under, tag_caches
from .calls import contiguous, narrowed, output_layer, repeated, rows_of, without_cache
from .hooks import Hook, strip
from .lookup import Lookup
from .outside import Outside
from .pooling import Pooling
from .recompute import bind_checkpoints
from .shifting import shifting_hooks
from .steps import goes_on

__all__ = ["Entering"]


class Entering:
    """Lives as long as the bank is attached."""

    def __init__(
        self,
        base: Structure,
        backbones: Sequence[Backbone],
        bank: Lookup,
        on_training: Callable[[], None],
        check: Callable[[], None],
    ) -> None:
        self.base, self.bank, self._on_training, self._check = base, bank, on_training, check
        self.last_virtual_predicts = can_write(base.model)
        self._pooling = Pooling(base, backbones)
        self._modules = {backbone.module: frozenset(backbone.module.modules()) for backbone in backbones}
        self._checkpointed = [m for m in base.model.modules() if hasattr(m, "gradient_checkpointing")]
        self._backbones = backbones
        self._standins: list[StandIn] = []
        self._hooks: list[Hook] = []
        self._embedders: dict[nn.Module, Hook] = {}

    def install(self) -> None:
        """Put the hooks and what stands in for forwards in place."""
        if self.base.model not in {backbone.module for backbone in self._backbones}:
            self._standins += Outside(self.base.model, self.bank, self._checkpointed).standins()
        for backbone in self._backbones:
            self._standins.append(StandIn(backbone.module, self._entered(backbone)))
            self._hooks += shifting_hooks(backbone, self.bank)
            if backbone.pooler is not None:
                self._hooks.append(Hook.before(backbone.pooler, self._pool))
        for embedding in {b.embedding for b in self._backbones if b.embedding is not None}:
            self._embedders[embedding] = Hook.after(embedding, self._embed)
        head = output_layer(self.base.model)
        if head is not None:
            self._hooks.append(Hook.before(head, contiguous))

    def remove(self) -> None:
        for placed in (*self._hooks, *self._embedders.values(), *self._standins):
            placed.remove()
        strip(self.base.model)

    # ---- the model around its backbones, and each backbone

    def _entered(self, backbone: Backbone) -> Callable[..., Any]:
        def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            route = self.bank.route_here()
            if route is None:
                check_cache(backbone.arguments(args, kwargs).get(backbone.cache), [()], self.bank.adapters)
                with inside(None):
                    return original(*args, **kwargs)
            return self._routed(backbone, route, original, backbone.arguments(args, kwargs))

        return run

    def _routed(self, backbone: Backbone, route: Route, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        if any(route.blends) and filled_under(given.get(backbone.cache)) is None:
            self._check()
        values = self._values(given.get(backbone.cache)) if route.going is None else route.going.values
        layout = self._packed(backbone, route) if route.lengths else self._padded(backbone, route, given, values)
        check_cache(given.get(backbone.cache), layout.blends, self.bank.adapters)
        if self._recomputes and "use_cache" in backbone.signature.parameters:  # what is filled twice is wrong
            given["use_cache"] = False
        around, asked = FORWARD.get(), given.get(backbone.cache) is not None
        if isinstance(layout, PaddedLayout) and around is not None and around.before is not None:
            layout.outer_mask = around.before.given.get("attention_mask")
        given = layout.prepared(given)
        if backbone.part == "decoder" and not route.lengths:
            self._widen_cross_mask(given, route)
        cache = given.get(backbone.cache)
        bind_checkpoints(self._checkpointed)
        if torch.is_grad_enabled():
            self._on_training()
        training, own, watched = torch.is_grad_enabled(), self._modules[backbone.module], self.bank.watched(route)
        drops = training and self.base.model.training
        forward = Forward(self.bank, route, layout, own, training, drops, cache=values, watched=watched)
        forward.goes_on, forward.streamed = goes_on(forward), self.bank.streamed(route)
        if backbone.embedding is not None:  # what others do to embeddings (LoRA, NEFTune) is done to a row's own tokens
            self._embedders[backbone.embedding].stay_last()
        try:
            with inside(forward):
                if forward.training:
                    self.bank.compute_shared(route, forward.cache, drops)
                out = original(**given)
        finally:
            forward.release()
        self._behind(forward)
        if isinstance(layout, PastLayout):
            layout.advance()
        if out is None:
            return None
        if given.get("use_cache") is False and not asked:
            without_cache(out, backbone.cache)
        tag_caches(cache, out, layout.blends, self.bank.adapters, layout.prompt_lengths(), values)
        return out if backbone.part == "encoder" else narrowed(out, layout)

    @property
    def _recomputes(self) -> bool:
        return any(m.gradient_checkpointing and m.training for m in self._checkpointed)

    def _behind(self, forward: Forward) -> None:
        """Inside the model's own forward, what runs next is its head."""
        if IN_MODEL.get() is self.bank:  # a copy: blocks that are computed again are inside of the other still
            FORWARD.set(replace(forward, behind=True, goes_on=False))

    def _values(self, cache: Any) -> dict[Any, Any]:
        """What is computed once: once a forward in training and for a new prompt, so that no change of a parameter is
        ever missed (fused optimizers do not even count as writes); once for all steps that go on from a cache."""
        filled = filled_under(cache)
        return {} if filled is None or torch.is_grad_enabled() else filled.values

    # ---- how the batch lies

    def _padded(self, backbone: Backbone, route: Route, given: dict[str, Any], values: dict[Any, Any]) -> PaddedLayout:
        rows = rows_of(given)
        if rows % len(route.blends):
            raise UsageError(
                f"the route has {len(route.blends)} rows but the batch has {rows}", "Give one entry for each row."
            )
        each = rows // len(route.blends)
        blends = [blend for blend in route.blends for _ in range(each)]
        virtual = [0 if backbone.part == "decoder" else self.bank.virtual_length(b) for b in blends]
        self._pooling.check(virtual)
        prefixes = self._prefixes(backbone, blends, values)
        cache = given.get(backbone.cache)
        filled = filled_under(cache)
        own_attention = not uses_interface(self.base) if prefixes.longest else False
        if own_attention:
            self.bank.check_prefix_read(prefixes.lengths, given.get("input_ids"))
        self._check_padding(backbone, given.get("attention_mask"), own_attention, virtual, prefixes)
        decoder = backbone.part == "decoder"
        places = None if decoder or route.places is None else repeated(route.places, each)
        prompts = filled.prompts if filled is not None else None
        if prompts is None and route.prompts is not None:
            prompts = tuple(repeated(route.prompts, each))
        return PaddedLayout(
            blends, backbone, virtual, prefixes, self.bank.virtual_of, prefixes.longest > 0 and own_attention,
            filled is not None, places, self.last_virtual_predicts, prompts, self._pooling.first_virtual,
            route.prompts is not None,
        )  # fmt: skip

    def _check_padding(
        self, backbone: Backbone, mask: Any, own: bool, virtual: Sequence[int], prefixes: Prefixes
    ) -> None:
        if len(set(virtual)) > 1 and not self.bank.takes_padding(own):
            raise UsageError(
                "this base does not ignore padding: rows with different numbers of virtual tokens cannot share a batch",
                "Run them in batches of their own.",
            )
        if not own:
            return
        padded = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
        if padded and not self.bank.takes_padding(True):
            raise UsageError(
                "this base counts the padding between a prefix and a row's first token",
                "Pad on the right, or give rows of one length.",
            )
        if len(set(prefixes.lengths)) > 1 and "attention_mask" not in backbone.signature.parameters:
            raise UsageError(
                "this base takes no mask that could hide one row's prefix from another's", "Give all rows one prefix."
            )
        if self._recomputes:
            raise UsageError("this base drops prefixes under gradient checkpointing", "Switch checkpointing off.")

    def _packed(self, backbone: Backbone, route: Route) -> PackedLayout:
        assert route.lengths is not None
        virtual = [self.bank.virtual_length(b) for b in route.blends]
        if route.going is not None:
            prefixes = self.bank.prefixes(backbone, route.blends, self.base, [p.keys == 0 for p in route.going.pasts])
            return PastLayout(
                route.blends, route.lengths, backbone, virtual, prefixes, self.bank.virtual_of, route.going,
                self.last_virtual_predicts,
            )  # fmt: skip
        return PackedLayout(
            route.blends, route.lengths, backbone, virtual, self._prefixes(backbone, route.blends, {}),
            self.bank.virtual_of, route.places, self.last_virtual_predicts, route.prompts,
        )  # fmt: skip

    def _prefixes(self, backbone: Backbone, blends: Sequence[Blend], values: dict[Any, Any]) -> Prefixes:
        spot = "prefixes", backbone.part, len(blends)
        if spot not in values:
            values[spot] = self.bank.prefixes(backbone, blends, self.base)
        return values[spot]

    # ---- inside

    def _embed(self, module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor | None:
        forward = FORWARD.get()
        if forward is None or forward.owner is not self.bank or forward.behind:
            return None
        if module is not forward.layout.backbone.embedding:
            return None
        layout, noise = forward.layout, forward.route.noise
        filled = layout.embed(embedded)
        if noise is None or not any(noise.neftune) or forward.noisy or layout.backbone.part == "decoder":
            return filled
        forward.noisy = True
        filled = embedded if filled is None else filled
        return neftune(filled, layout.own_tokens(filled), noise)

    def _pool(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        forward = FORWARD.get()
        if forward is None or forward.owner is not self.bank or not isinstance(forward.layout, PaddedLayout):
            return None
        return (forward.layout.narrow(args[0]), *args[1:])

    # ---- encoder and decoder, caches

    def _widen_cross_mask(self, given: dict[str, Any], route: Route) -> None:
        """The encoder's output holds virtual tokens: the decoder's view of it gets their columns."""
        states = given.get("encoder_hidden_states")
        widest = max((self.bank.virtual_length(b) for b in route.blends), default=0)
        if states is None or not widest:
            return
        rows, columns = states.shape[:2]
        mask = given.get("encoder_attention_mask")
        if mask is None:
            mask = torch.ones(rows, columns - widest, dtype=torch.long, device=states.device)
        if mask.shape[1] == columns:
            return
        each = rows // len(route.blends)
        virtual = torch.tensor(repeated([self.bank.virtual_length(b) for b in route.blends], each), device=mask.device)
        first, length = mask.long().argmax(1)[:, None], mask.shape[1]
        column, virtual = torch.arange(columns, device=mask.device)[None], virtual[:, None]
        source = torch.where(column < first, column, column - virtual).clamp(0, length - 1)
        wide = torch.where((column >= first) & (column < first + virtual), 1, mask.gather(1, source))
        given["encoder_attention_mask"] = torch.where(column >= length + virtual, 0, wide)
