"""The bank: many adapters beside one frozen base, and which rows each of them touches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
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
from inlay.formats.adapterhub import write_adapterhub
from inlay.formats.folders import folders_inside, read_folder
from inlay.formats.loralib import read_loralib, write_loralib
from inlay.formats.notes import NOTES, read_notes
from inlay.formats.peft import write_peft
from inlay.methods.contract import Method
from inlay.sites.attention import unwatch, watch
from inlay.sites.structure import find

from .adapter import Adapter
from .applying import SiteHooks
from .combining import Combines
from .entering import Entering
from .fusing import Fusing
from .going import Goes
from .lookup import Lookup
from .merging import merged_parameters
from .packing import isolates_segments, probes
from .plain import mark_attached, not_compiled, peft_task, plain_model, unmark_attached
from .quick import Quick
from .recompute import recomputing, unbind_checkpoints
from .routing import Opened
from .starting import Rows
from .tying import check_untied, untie
from .unchanged import Unchanged

__all__ = ["Bank", "attach"]


def attach(model: nn.Module) -> Bank:
    """Freeze `model` and return an empty bank beside it; the model's own state dict and forward stay as they are.

    A compiled model (`torch.compile`) is attached to as what it was compiled from. Raises: UsageError where the model
    is another library's wrapper, or has a bank already.
    """
    return Bank(plain_model(model))


class Bank(Combines, Goes):
    """Adapters by name over one frozen base.

    The ordinary call `model(input_ids=..., attention_mask=...)` and `model.generate` follow the route in force. Routes
    belong to the context (the thread, the asyncio task) that opened them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.base = model, find(model)
        self.adapters: dict[str, Adapter] = {}
        self.merges = 0  # how often the base has changed
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        with not_compiled(model):  # seen before anything stands in the way
            _, backbones = self.base.observed, self.base.backbones
        _ = self.fingerprint  # so that the first adapter loads as fast as the next
        self._unchanged = Unchanged(model)
        self._lookup = Lookup(self.adapters, *probes(self.base, self.alone))
        self._fusing, self._quick = Fusing(model, self.alone), Quick(model)
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

    def add(
        self, name: str, method: Method | Sequence[Method], seed: int | None = None, rows: Rows | None = None
    ) -> Adapter:
        """Make a fresh adapter of one method, or of several as its parts; `seed` sets its start (without one, torch's
        global generator does). `rows`, batches of the model's inputs, are for starts that come from data (LoRA's
        `init`).

        Raises: UsageError where the name is taken, a method finds nothing to act on, or parts write to one place.
        """
        self._check_free(name)
        given = [method] if isinstance(method, Method) else list(method)
        methods = [self._over(part) for one in given for part in one.parts()]
        if not methods:
            raise UsageError(f"adapter {name!r} has no parts", "Give a method, or a list of methods.")
        start = int(torch.randint(2**31, ())) if seed is None else seed
        with self.alone():  # what looks at the base by running it must see the base alone
            return self._keep(Adapter.fresh(name, methods, self.base, start, rows))

    def load(
        self, name: str, path: str | Path, alpha: float | None = None, enabled: Sequence[bool] | None = None,
        task: int | None = None,
    ) -> Adapter:  # fmt: skip
        """Read an adapter from a folder that HF PEFT, AdapterHub or Inlay wrote, from its run's folder, from the
        hub, or from a file that holds a loralib state dict.

        loralib's files do not say `alpha`, nor which parts of fused weights are `enabled`: they are said here.
        `task` is the one that is meant of a multitask prompt's. AdapterHub's fusion is over adapters of this bank under
        their names there, or over those in its folder. Raises: FormatError naming missing, extra, misshapen or
        non-finite tensors; nothing is kept then.
        """
        self._check_free(name)
        if Path(path).is_file():
            if task is not None:
                raise UsageError(f"{path} holds no prompt that several tasks share", "Leave task out.")
            return self._keep(Adapter.of(name, read_loralib(Path(path), self.base, alpha, enabled), self.base))
        if alpha is not None or enabled is not None:
            raise UsageError(f"{path} says its alpha itself", "Leave alpha and enabled out.")
        folder = adapter_folder(path)
        with self._read_first(folders_inside(folder)) as others:
            stored = read_folder(folder, self.base, task, others)
            trained_on = read_notes(folder).fingerprint
            if trained_on is not None and not same_base(trained_on, self.fingerprint):
                raise FormatError(
                    f"{folder} was trained on another base (fingerprint {trained_on}, here {self.fingerprint})",
                    "Name the base it was trained on.",
                )
            with self.alone():
                return self._keep(Adapter.of(name, [(self._over(own), values) for own, values in stored], self.base))

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
        "adapterhub" writes AdapterHub's folder instead, a fusion's with its adapters inside; "loralib" a LoRA to one
        file, where `enabled` says which parts of fused weights it adapts. Raises: UsageError where a format has no
        place for the method.
        """
        adapter = self._named(name)
        self._unchanged.check()
        if format not in ("peft", "adapterhub", "loralib"):
            raise UsageError(f"adapters cannot be saved as {format!r}", 'Formats: "peft", "adapterhub", "loralib".')
        if format == "loralib":
            write_loralib(Path(path), adapter.parts, enabled)
            return
        base_name = "" if self.merges else str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or "")
        if format == "adapterhub":
            used = {own: self.adapters[own].parts for part in adapter.parts for own in part.method.uses}
            write_adapterhub(Path(path), name, adapter.parts, self.base, base_name, used)
        else:
            write_peft(Path(path), adapter.parts, self.base, base_name, peft_task(self.model, adapter.parts))
        write_json(Path(path) / NOTES, {"base": base_name, "fingerprint": self.fingerprint, **(notes or {})})

    def remove(self, name: str) -> None:
        """Forget an adapter; the rest are not touched. Raises: UsageError where an open route uses it."""
        adapter = self._named(name)
        if rows := self.rows_in_flight(name):
            what = f"adapter {name!r} is in use by {rows} {'row' if rows == 1 else 'rows'} in flight"
            raise UsageError(what, "Wait until they have ended, or cancel them.")
        if self._lookup.routing.uses(name):
            raise UsageError(f"adapter {name!r} is in use by a route in force", "Leave the route first.")
        if user := next((own.name for own in self.adapters.values() if name in own.uses), None):
            raise UsageError(f"adapter {name!r} is used by {user!r}", f"Remove {user!r} first.")
        del self.adapters[name]
        adapter.shares.clear()  # they hold on to it
        for part in adapter.parts:
            self._sites.forget(part)

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

        Raises: UsageError where its method has no equivalent weights, the base's weights are quantized, or it would
        compute otherwise with tables that are no longer tied.
        """
        adapter = self._named(name)
        self._unchanged.check()
        if any(self._lookup.routing.in_flight.values()):
            raise UsageError("rows in flight have read with the base as it is", "Merge when they have ended.")
        merged = merged_parameters(adapter)
        with self.alone():
            check_untied(self.model, merged)
        self.remove(name)
        with torch.no_grad():
            untie(self.model, merged)
            for module, key, value in merged:
                getattr(module, key).copy_(value)
        self.merges += 1
        self.__dict__.pop("fingerprint", None)  # another base from now on

    def detach(self) -> None:
        """Take every hook off and give the base back as it was."""
        for placed in (self._sites, self._quick, self._fusing, self._entering):
            placed.remove()
        unbind_checkpoints(self.model)
        unwatch(self.model)
        self.adapters.clear()
        unmark_attached(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, True))


def _listed(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else list(values)
