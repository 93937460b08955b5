"""The bank: many adapters beside one frozen base, and which rows each of them touches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.bases.adapters import adapter_folder
from inlay.bases.fingerprint import fingerprint, same_base
from inlay.batch.noise import Noise
from inlay.batch.route import Blend, Route, RowSpec, normalise
from inlay.errors import FormatError, UsageError
from inlay.files import write_json
from inlay.formats.loralib import read_loralib, write_loralib
from inlay.formats.notes import NOTES, read_notes
from inlay.formats.peft import read_peft, write_peft
from inlay.methods.contract import Method
from inlay.sites.attention import unwatch, watch
from inlay.sites.structure import find

from .adapter import Adapter
from .applying import SiteHooks
from .entering import Entering
from .fusing import Fusing
from .lookup import Lookup
from .merging import merged_parameters
from .packing import isolates_segments, padding_invariant
from .plain import NotCopied, mark_attached, not_compiled, peft_task, plain_model, unmark_attached
from .rates import groups_of, warn_of_rates
from .recompute import recomputing, unbind_checkpoints
from .routing import Opened
from .tying import untie
from .unchanged import Unchanged

__all__ = ["Bank", "attach"]


def attach(model: nn.Module) -> Bank:
    """Freeze `model` and return an empty bank beside it; the model's own state dict and forward stay as they are.

    A compiled model (`torch.compile`) is attached to as what it was compiled from. Raises: UsageError where the model
    is another library's wrapper, or has a bank already.
    """
    return Bank(plain_model(model))


class Bank(NotCopied):
    """Adapters by name over one frozen base.

    The ordinary call `model(input_ids=..., attention_mask=...)` and `model.generate` follow the route in force. Routes
    belong to the context (the thread, the asyncio task) that opened them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.base = model, find(model)
        self.adapters: dict[str, Adapter] = {}
        self._merged = False
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        with not_compiled(model):  # seen before anything stands in the way
            _, backbones = self.base.observed, self.base.backbones
        _ = self.fingerprint  # so that the first adapter loads as fast as the next
        self._unchanged = Unchanged(model)
        self._lookup = Lookup(self.adapters, partial(padding_invariant, self.base, self.alone))
        self._fusing = Fusing(model, self.alone)
        self._sites = SiteHooks(self.base, self._lookup)
        self._entering = Entering(self.base, backbones, self._lookup, self._fusing.install, self._unchanged.check)
        try:
            model.requires_grad_(False)
            watch(model)
            self._entering.install()
            mark_attached(model)
        except BaseException:  # an interruption too leaves the model as it was
            self.detach()
            raise

    # ---- adapters

    def add(self, name: str, method: Method | Sequence[Method], seed: int | None = None) -> Adapter:
        """Make a fresh adapter of one method, or of several as its parts; `seed` sets its start (without one, torch's
        global generator does).

        Raises: UsageError where the name is taken, a method finds nothing to act on, or parts write to one place.
        """
        self._check_free(name)
        given = [method] if isinstance(method, Method) else list(method)
        methods = [part for one in given for part in one.parts()]
        if not methods:
            raise UsageError(f"adapter {name!r} has no parts", "Give a method, or a list of methods.")
        start = int(torch.randint(2**31, ())) if seed is None else seed
        with self.alone():  # what looks at the base by running it must see the base alone
            return self._keep(Adapter.fresh(name, methods, self.base, start))

    def load(
        self, name: str, path: str | Path, alpha: float | None = None, enabled: Sequence[bool] | None = None
    ) -> Adapter:
        """Read an adapter from a folder that HF PEFT or Inlay wrote, from its run's folder, from the hub, or
        from a file that holds a loralib state dict.

        loralib's files do not say `alpha`, nor which parts of fused weights are `enabled`: they are said here.
        Raises: FormatError naming missing, extra, misshapen or non-finite tensors; nothing is kept then.
        """
        self._check_free(name)
        if Path(path).is_file():
            return self._keep(Adapter.of(name, read_loralib(Path(path), self.base, alpha, enabled), self.base))
        if alpha is not None or enabled is not None:
            raise UsageError(f"{path} says its alpha itself", "Leave alpha and enabled out.")
        folder = adapter_folder(path)
        stored = read_peft(folder, self.base)
        trained_on = read_notes(folder).fingerprint
        if trained_on is not None and not same_base(trained_on, self.fingerprint):
            raise FormatError(
                f"{folder} was trained on another base (fingerprint {trained_on}, here {self.fingerprint})",
                "Name the base it was trained on.",
            )
        with self.alone():
            return self._keep(Adapter.of(name, stored, self.base))

    def save(
        self,
        name: str,
        path: str | Path,
        format: str = "peft",
        notes: Mapping[str, Any] | None = None,
        enabled: Sequence[bool] | None = None,
    ) -> None:
        """Write an adapter to a folder: adapter_config.json and adapter_model.safetensors in HF PEFT's layout, and
        inlay.json, which names the base by its fingerprint and holds `notes` (the template, for one). The format
        "loralib" writes a LoRA to one file; `enabled` says which parts of fused weights it adapts.
        """
        adapter = self._named(name)
        self._unchanged.check()
        if format not in ("peft", "loralib"):
            raise UsageError(f"adapters cannot be saved as {format!r}", 'Formats: "peft", "loralib".')
        if format == "loralib":
            write_loralib(Path(path), adapter.parts, enabled)
            return
        base_name = "" if self._merged else str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or "")
        write_peft(Path(path), adapter.parts, self.base, base_name, peft_task(self.model, adapter.parts))
        write_json(Path(path) / NOTES, {"base": base_name, "fingerprint": self.fingerprint, **(notes or {})})

    def remove(self, name: str) -> None:
        """Forget an adapter; the rest are not touched. Raises: UsageError where an open route uses it."""
        adapter = self._named(name)
        if self._lookup.routing.uses(name):
            raise UsageError(f"adapter {name!r} is in use by a route in force", "Leave the route first.")
        del self.adapters[name]
        for part in adapter.parts:
            self._sites.forget(part)

    def parameters(self, name: str | None = None) -> Iterator[nn.Parameter]:
        """The trainable tensors of one adapter, or of all. Warns once of an adapter that wants several learning rates
        (LoRA+ for one): an optimizer is to get its `parameter_groups`."""
        for adapter in [self._named(name)] if name is not None else self.adapters.values():
            warn_of_rates(adapter)
            yield from adapter.parameters()

    def parameter_groups(self, lr: float, name: str | None = None, **settings: Any) -> list[dict[str, Any]]:
        """The trainable tensors of one adapter, or of all, as groups for a torch optimizer: each with its rate, that is
        `lr` times what its method says (LoRA+), and with `settings` (`weight_decay` for one)."""
        chosen = [self._named(name)] if name is not None else list(self.adapters.values())
        return [group for adapter in chosen for group in groups_of(adapter, lr, settings)]

    def _check_free(self, name: str) -> None:
        self._unchanged.check()
        if not isinstance(name, str) or not name:
            raise UsageError(f"{name!r} is no name of an adapter", "Give a word.")
        if name in self.adapters:
            raise UsageError(f"an adapter called {name!r} is here already", "Choose another name or remove it first.")

    def _named(self, name: str) -> Adapter:
        normalise(name, self.adapters)
        return self.adapters[name]

    def _keep(self, adapter: Adapter) -> Adapter:
        self.adapters[adapter.name] = adapter
        for part in adapter.parts:
            part.hold_constants(p for other in self.adapters.values() for p in other.parts if p is not part)
            self._sites.add(part)
        return adapter

    # ---- routes

    def set(self, row: RowSpec) -> None:
        """Route every row of every call that no `route` covers, in all threads; None is the plain base."""
        self._lookup.routing.default = Route([self._checked(row)])

    def route(
        self,
        rows: Sequence[RowSpec],
        noise: Noise | None = None,
        places: Sequence[int] | None = None,
        prompts: Sequence[int] | None = None,
    ) -> AbstractContextManager[None]:
        """Give each row of the batch its own adapters: a name, None, a list (chained) or {name: weight}.

        A batch of a multiple of `len(rows)` (beams, several answers a prompt) repeats each row's entry in place.
        `noise` switches dropout on. `places` says before which of its own tokens each row's virtual ones stand: 0, its
        first, where nobody says; its length, behind its last. `prompts` is how many tokens of each row are its prompt:
        all of them where nobody says.
        """
        if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Sequence) or not rows:
            raise UsageError(f"{rows!r} is no list of rows", "Give one entry for each row: bank.route([name, None]).")
        for given in (places, prompts):
            if given is not None and len(given) != len(rows):
                raise UsageError("rows and places of a route differ", "Give one entry for each row.")
        blends = [self._checked(row) for row in rows]
        return self._open(Route(blends, noise=noise, places=_listed(places), prompts=_listed(prompts)))

    def stream(
        self, segments: Sequence[tuple[RowSpec, int]], kept: Sequence[int] | None = None, noise: Noise | None = None,
        places: Sequence[int] | None = None, prompts: Sequence[int] | None = None,
    ) -> AbstractContextManager[None]:  # fmt: skip
        """Run the base on one packed row, input_ids (1, tokens): each segment is (its adapters, its tokens).

        `kept` says how many tokens of each segment go on to the head, where `logits_to_keep` picks some; `places` and
        `prompts` are as in `route`. Raises: UsageError where the base cannot keep segments apart (see `packs`).
        """
        if not self.packs:
            raise UsageError("this base cannot keep packed segments apart", "Use padded rows and `route`.")
        if not segments:
            raise UsageError("a stream without segments", "Give (adapters, tokens) for each.")
        blends = [self._checked(row) for row, _ in segments]
        lengths = [length for _, length in segments]
        return self._open(Route(blends, lengths, _listed(kept), noise, _listed(places), _listed(prompts)))

    def alone(self, lengths: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """The plain base for everything inside; for packed segments of `lengths` tokens where they are given."""
        return self._open(Route([()] * len(lengths or [0]), _listed(lengths)))

    def _open(self, route: Route) -> Opened:
        return self._lookup.routing.open(route)

    def _checked(self, row: RowSpec) -> Blend:
        blend = normalise(row, self.adapters)
        for name, weight in blend:
            adapter = self.adapters[name]
            if weight not in (None, 1.0) and (adapter.prefix_length or adapter.virtual_length):
                raise UsageError(
                    f"{adapter.method.title} adapter {name!r} cannot be weighted by {weight}",
                    "Prefixes and prompts take 1.",
                )
        return blend

    # ---- what the base can do

    @cached_property
    def fingerprint(self) -> str:
        """Names the base by its weights."""
        return fingerprint(self.model)

    @cached_property
    def packs(self) -> bool:
        """Whether segments of a packed row stay apart in this base: found out by comparing two tiny ones."""
        return isolates_segments(self.base, self.alone)

    def recomputing(self) -> AbstractContextManager[None]:
        """Gradient checkpointing for the forwards and backwards inside: less memory, more time, the same gradients.

        Raises: UsageError where the base has none.
        """
        return recomputing(self.model)

    # ---- the end

    def merge(self, name: str) -> None:
        """Write an adapter into the base's weights for good, and forget it.

        Raises: UsageError where its method has no equivalent weights, or the base's weights are quantized.
        """
        adapter = self._named(name)
        self._unchanged.check()
        merged = merged_parameters(adapter)
        self.remove(name)
        with torch.no_grad():
            for module, key, value in merged:
                untie(self.model, module, key)
                getattr(module, key).copy_(value)
        self._merged = True
        self.__dict__.pop("fingerprint", None)  # another base from now on

    def detach(self) -> None:
        """Take every hook off and give the base back as it was."""
        for placed in (self._sites, self._entering, self._fusing):
            placed.remove()
        unbind_checkpoints(self.model)
        unwatch(self.model)
        self.adapters.clear()
        unmark_attached(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, True))


def _listed(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else list(values)
