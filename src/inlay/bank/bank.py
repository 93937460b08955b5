"""The bank: many adapters beside one frozen base, and which rows each of them touches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bases.fingerprint import fingerprint, same_base
from inlay.batch.noise import Noise
from inlay.batch.prefixes import KeysValues
from inlay.batch.route import Blend, RowSpec, normalise
from inlay.errors import FormatError, UsageError
from inlay.files import write_json
from inlay.formats.folders import adapter_folder
from inlay.formats.loralib import read_loralib, write_loralib
from inlay.formats.notes import NOTES, read_notes
from inlay.formats.peft import read_peft, write_peft
from inlay.methods.contract import Method, Params
from inlay.sites.find import find
from inlay.sites.probe import uses_interface

from .adapter import Adapter
from .applying import SiteHooks
from .calls import CallHooks, Route
from .packing import ignores_padding, keeps_apart
from .recompute import recomputing
from .tying import untie

__all__ = ["Bank", "attach"]


def attach(model: nn.Module) -> Bank:
    """Freeze `model` and return an empty bank beside it; the model's own state dict and forward stay as they are."""
    return Bank(model)


class Bank:
    """Adapters by name over one frozen base.

    The ordinary call `model(input_ids=..., attention_mask=...)` and `model.generate` follow the route in force.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.base = model, find(model)
        self.adapters: dict[str, Adapter] = {}
        self._routes: list[Route] = []
        self._default: Blend = ()
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        self._calls = CallHooks(self.base, _Lookup(self))
        self._sites = SiteHooks(self.base, self.adapters, self._route_in_force)

    def add(self, name: str, method: Method, seed: int | None = None) -> Adapter:
        """Make a fresh adapter; `seed` sets its start (without one, torch's global generator does).

        Raises: UsageError where the name is taken or the method finds nothing to act on.
        """
        if name in self.adapters:
            raise UsageError(f"an adapter called {name!r} is here already", "Choose another name or remove it first.")
        adapter = Adapter(name, method, self.base, int(torch.randint(2**31, ())) if seed is None else seed)
        return self._keep(adapter)

    def load(
        self, name: str, path: str | Path, alpha: float | None = None, enabled: Sequence[bool] | None = None
    ) -> Adapter:
        """Read an adapter from a folder that HF PEFT or Inlay wrote, from its run's folder, from the hub, or
        from a file that holds a loralib state dict.

        loralib's files do not say `alpha`, nor which parts of fused weights are `enabled`: they are said here.
        Raises: FormatError naming missing, extra, misshapen or non-finite tensors; nothing is kept then.
        """
        if name in self.adapters:
            raise UsageError(f"an adapter called {name!r} is here already", "Choose another name or remove it first.")
        if Path(path).is_file():
            method, tensors = read_loralib(Path(path), self.base, alpha, enabled)
        elif alpha is not None or enabled is not None:
            raise UsageError(f"{path} says its alpha itself", "Leave alpha and enabled out.")
        else:
            path = adapter_folder(path)
            method, tensors = read_peft(path, self.base)
        trained_on = None if Path(path).is_file() else read_notes(path).fingerprint
        if trained_on is not None and not same_base(trained_on, self.fingerprint):
            raise FormatError(
                f"{path} was trained on another base (fingerprint {trained_on}, here {self.fingerprint})",
                "Name the base it was trained on.",
            )
        adapter = Adapter(name, method, self.base, seed=0)
        with torch.no_grad():
            for site, values in tensors.items():
                for key, value in values.items():
                    own = adapter.params[site][key]
                    own.copy_(value.reshape(own.shape))
        return self._keep(adapter)

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
        normalise(name, self.adapters)
        if format not in ("peft", "loralib"):
            raise UsageError(f"adapters cannot be saved as {format!r}", 'Formats: "peft", "loralib".')
        adapter = self.adapters[name]
        if format == "loralib":
            write_loralib(Path(path), adapter.method, list(adapter.sites.values()), adapter.params, enabled)
            return
        base_name = str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or "")
        sites = list(adapter.sites.values())
        write_peft(Path(path), adapter.method, sites, adapter.params, base_name, _task(self.model))
        write_json(Path(path) / NOTES, {"base": base_name, "fingerprint": self.fingerprint, **(notes or {})})

    def _keep(self, adapter: Adapter) -> Adapter:
        self.adapters[adapter.name] = adapter
        with self._in_force(Route([()])):  # what looks at the base by running it must see the base alone
            self._sites.add(adapter)
            if adapter.method.virtual_length or adapter.method.prefix_length:
                uses_interface(self.base)
        return adapter

    def remove(self, name: str) -> None:
        """Forget an adapter; the rest are not touched."""
        normalise(name, self.adapters)
        in_force = [self._default, *(blend for route in self._routes for blend in route.blends)]
        if any(name == used for blend in in_force for used, _ in blend):
            raise UsageError(f"adapter {name!r} is in use by the route in force", "Leave the route first.")
        del self.adapters[name]
        self._sites.forget(name)

    def set(self, row: RowSpec) -> None:
        """Route every row of every call that no `route` covers; None is the plain base."""
        self._default = self._checked(row)

    @contextmanager
    def route(
        self, rows: Sequence[RowSpec], noise: Noise | None = None, places: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Give each row of the batch its own adapters: a name, None, a list (stacked) or {name: weight}.

        A batch of a multiple of `len(rows)` (beams, several answers a prompt) repeats each row's entry in place.
        `noise` switches dropout on. `places` says before which of its own tokens each row's virtual ones stand: 0, its
        first, where nobody says; its length, behind its last.
        """
        if not rows or (places is not None and len(places) != len(rows)):
            raise UsageError("rows and places of a route differ, or are none", "Give one entry for each row.")
        chosen = None if places is None else list(places)
        with self._in_force(Route([self._checked(row) for row in rows], noise=noise, places=chosen)):
            yield

    @contextmanager
    def stream(
        self, segments: Sequence[tuple[RowSpec, int]], kept: Sequence[int] | None = None, noise: Noise | None = None,
        places: Sequence[int] | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """Run the base on one packed row, input_ids (1, tokens): each segment is (its adapters, its tokens).

        `kept` says how many tokens of each segment go on to the head, where `logits_to_keep` picks some; `places`, as
        in `route`, where virtual tokens stand.
        Raises: UsageError where the base cannot keep segments apart (see `packs`).
        """
        if not self.packs:
            raise UsageError("this base cannot keep packed segments apart", "Use padded rows and `route`.")
        if not segments:
            raise UsageError("a stream without segments", "Give (adapters, tokens) for each.")
        blends = [self._checked(row) for row, _ in segments]
        lengths = [length for _, length in segments]
        chosen = None if places is None else list(places)
        with self._in_force(Route(blends, lengths, None if kept is None else list(kept), noise, chosen)):
            yield

    @cached_property
    def fingerprint(self) -> str:
        """Names the base by its weights."""
        return fingerprint(self.model)

    @cached_property
    def packs(self) -> bool:
        """Whether segments of a packed row stay apart in this base: found out by comparing two tiny ones."""
        return keeps_apart(self)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Gradient checkpointing for the forwards and backwards inside: less memory, more time, the same gradients.

        Raises: UsageError where the base has none.
        """
        with recomputing(self.model):
            yield

    @contextmanager
    def _in_force(self, route: Route) -> Iterator[None]:
        self._routes.append(route)
        try:
            yield
        finally:
            self._routes.remove(route)

    def _route_in_force(self) -> Route | None:
        if self._routes:
            return self._routes[-1]
        return Route([self._default]) if self._default else None

    def _checked(self, row: RowSpec) -> Blend:
        blend = normalise(row, self.adapters)
        for name, weight in blend:
            method = self.adapters[name].method
            if weight not in (None, 1.0) and (method.prefix_length or method.virtual_length):
                raise UsageError(
                    f"{method.title} adapter {name!r} cannot be weighted by {weight}", "Prefixes and prompts take 1."
                )
        return blend

    def parameters(self, name: str | None = None) -> Iterator[nn.Parameter]:
        """The trainable tensors of one adapter, or of all."""
        for adapter in [self.adapters[name]] if name is not None else self.adapters.values():
            yield from adapter.parameters()

    def merge(self, name: str) -> None:
        """Write an adapter into the base's weights for good, and forget it.

        Raises: UsageError where its method has no equivalent weights, or the base's weights are quantized.
        """
        normalise(name, self.adapters)
        adapter = self.adapters[name]
        if any(site.quantized for site in adapter.sites.values()):
            raise UsageError(
                f"{name!r} cannot be merged into quantized weights", "Merge it into the base as it was: `inlay merge`."
            )
        merged: list[tuple[nn.Module, str, Tensor]] = []
        for path, site in adapter.sites.items():
            params = Params({key: value.detach() for key, value in adapter.params.get(path, {}).items()})
            for key, value in adapter.method.merge(params, site).items():
                merged.append((site.module, key, value))
        self.remove(name)
        with torch.no_grad():
            for module, key, value in merged:
                untie(self.model, module, key)
                getattr(module, key).copy_(value)

    def detach(self) -> None:
        """Take every hook off and give the base back as it was."""
        self._sites.remove()
        self._calls.remove()
        self.adapters.clear()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, True))


def _task(model: nn.Module) -> str | None:
    """What HF PEFT calls the kind of model."""
    name = type(model).__name__
    kinds = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    kinds |= {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for end, task in kinds.items() if name.endswith(end)), "FEATURE_EXTRACTION")


class _Lookup:
    """Answers the call hooks' questions about blends."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._padding: dict[bool, bool] = {}

    @property
    def owner(self) -> object:
        return self._bank.adapters

    def route_in_force(self) -> Route | None:
        return self._bank._route_in_force()

    def _held(self) -> dict[Any, Any]:
        route = self._bank._route_in_force()
        return {} if route is None else route.held

    def in_force(self, route: Route) -> AbstractContextManager[None]:
        return self._bank._in_force(route)

    def takes_padding(self, behind_prefix: bool) -> bool:
        if behind_prefix not in self._padding:
            self._padding[behind_prefix] = ignores_padding(self._bank, behind_prefix)
        return self._padding[behind_prefix]

    def virtual_length(self, blend: Blend) -> int:
        return sum(self._bank.adapters[name].method.virtual_length for name, _ in blend)

    def prefix_length(self, blend: Blend) -> int:
        return sum(self._bank.adapters[name].method.prefix_length for name, _ in blend)

    def version(self) -> int:
        """Grows whenever a shared parameter changes."""
        shared = (a.params.get("", {}) for a in self._bank.adapters.values())
        return sum(p._version for params in shared for p in params.values())

    def virtual_of(self, blend: Blend) -> Tensor | None:
        adapters = [self._bank.adapters[name] for name, _ in blend]
        held = self._held()
        found = [a.method.virtual(a.at("", None, held)) for a in adapters if a.method.virtual_length]
        return torch.cat(found) if found else None

    def prefix_of(self, blend: Blend, module: nn.Module) -> KeysValues | None:
        found, held = [], self._held()
        for name, _ in blend:
            adapter = self._bank.adapters[name]
            if adapter.method.prefix_length and module in adapter.order:
                found.append(adapter.method.prefix(adapter.at("", None, held), *adapter.order[module]))
        if not found:
            return None
        return torch.cat([k for k, _ in found], 1), torch.cat([v for _, v in found], 1)
