"""The bank: many adapters beside one frozen base, and which rows each of them touches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from inlay.errors import UsageError
from inlay.formats.peft import read_peft, write_peft
from inlay.methods.contract import Method, Site
from inlay.sites.find import find
from inlay.stream.route import Blend, RowSpec, groups_of, normalise

from .adapter import Adapter

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
        self._users: dict[str, list[str]] = {}  # path of a hooked module -> adapters that act there
        self._handles: list[RemovableHandle] = []
        self._routes: list[list[Blend]] = []
        self._default: Blend = ()
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)

    def add(self, name: str, method: Method, seed: int | None = None) -> Adapter:
        """Make a fresh adapter; `seed` sets its start (without one, torch's global generator does).

        Raises: UsageError where the name is taken or the method finds nothing to act on.
        """
        if name in self.adapters:
            raise UsageError(f"an adapter called {name!r} is here already", "Choose another name or remove it first.")
        adapter = Adapter(name, method, self.base, int(torch.randint(2**31, ())) if seed is None else seed)
        return self._keep(adapter)

    def load(self, name: str, path: str | Path) -> Adapter:
        """Read an adapter from a folder that HF PEFT or Inlay wrote.

        Raises: FormatError naming missing, extra, misshapen or non-finite tensors; nothing is kept then.
        """
        if name in self.adapters:
            raise UsageError(f"an adapter called {name!r} is here already", "Choose another name or remove it first.")
        method, tensors = read_peft(Path(path), self.base)
        adapter = Adapter(name, method, self.base, seed=0)
        with torch.no_grad():
            for site, values in tensors.items():
                for key, value in values.items():
                    own = adapter.params[site][key]
                    own.copy_(value.reshape(own.shape))
        return self._keep(adapter)

    def save(self, name: str, path: str | Path, format: str = "peft") -> None:
        """Write an adapter to a folder: adapter_config.json and adapter_model.safetensors in HF PEFT's layout."""
        normalise(name, self.adapters)
        if format != "peft":
            raise UsageError(f"adapters cannot be saved as {format!r}", 'Formats: "peft".')
        adapter = self.adapters[name]
        base_name = str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or "")
        write_peft(Path(path), adapter.method, list(adapter.sites.values()), adapter.params, base_name)

    def _keep(self, adapter: Adapter) -> Adapter:
        name = adapter.name
        self.adapters[name] = adapter
        for site in adapter.sites.values():
            self._hook(site)
            self._users[site.path].append(name)
        return adapter

    def remove(self, name: str) -> None:
        """Forget an adapter; the rest are not touched."""
        normalise(name, self.adapters)
        in_force = [self._default, *(blend for rows in self._routes for blend in rows)]
        if any(name == used for blend in in_force for used, _ in blend):
            raise UsageError(f"adapter {name!r} is in use by the route in force", "Leave the route first.")
        del self.adapters[name]
        for users in self._users.values():
            if name in users:
                users.remove(name)

    def set(self, row: RowSpec) -> None:
        """Route every row of every call that no `route` covers; None is the plain base."""
        self._default = normalise(row, self.adapters)

    @contextmanager
    def route(self, rows: Sequence[RowSpec]) -> Iterator[None]:
        """Give each row of the batch its own adapters: a name, None, a list (stacked) or {name: weight}.

        A batch of a multiple of `len(rows)` (beams, several answers a prompt) repeats each row's entry in place.
        """
        if not rows:
            raise UsageError("a route without rows", "Give one entry for each row of the batch.")
        self._routes.append([normalise(row, self.adapters) for row in rows])
        try:
            yield
        finally:
            self._routes.pop()

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
        merged: list[tuple[nn.Parameter, Tensor]] = []
        for path, site in adapter.sites.items():
            params = {key: value.detach() for key, value in adapter.params[path].items()}
            for key, value in adapter.method.merge(params, site).items():
                merged.append((getattr(site.module, key), value))
        self.remove(name)
        with torch.no_grad():
            for parameter, value in merged:
                parameter.copy_(value)

    def detach(self) -> None:
        """Take every hook off and give the base back as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._users.clear()
        self.adapters.clear()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, True))

    # ---- what happens inside a forward

    def _hook(self, site: Site) -> None:
        if site.path in self._users:
            return
        self._users[site.path] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x = self._applied(site.path, None, args[0])
            return None if x is None else (x, *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            return self._applied(site.path, args[0], y)

        self._handles += [site.module.register_forward_pre_hook(before), site.module.register_forward_hook(after)]

    def _applied(self, path: str, x: Tensor | None, value: Tensor) -> Tensor | None:
        """The site's new input (where x is None) or output, row by row; None where no row's adapter acts here."""
        rows = self._routes[-1] if self._routes else [self._default]
        users = self._users.get(path, ())
        groups = {
            blend: index
            for blend, index in groups_of(rows).items()
            if any(name in users and (x is not None or self._changes_input(name, path)) for name, _ in blend)
        }
        if not groups:
            return None
        if not value.is_floating_point():  # token ids into an embedding: methods change its output only
            return None
        parts = _by_row(value, len(rows), value.shape[-1])
        inputs = None if x is None else _by_row(x, len(rows), x.shape[-1] if x.is_floating_point() else None)
        for blend, index in groups.items():
            at = slice(None) if len(index) == len(rows) else torch.tensor(index, device=value.device)
            here = self._blended(blend, path, None if inputs is None else inputs[at], parts[at])
            parts = here if isinstance(at, slice) else parts.index_copy(0, at, here)
        return parts.reshape(value.shape)

    def _changes_input(self, name: str, path: str) -> bool:
        adapter = self.adapters[name]
        return adapter.method.changes_input(adapter.sites[path])

    def _blended(self, blend: Blend, path: str, x: Tensor | None, value: Tensor) -> Tensor:
        """Stacked adapters see one another's result; weighted ones each see the base's, and their changes add up."""
        out = value
        for name, weight in blend:
            adapter = self.adapters[name]
            if path not in adapter.sites:
                continue
            params, site = adapter.at(path, value.dtype), adapter.sites[path]
            start = out if weight is None else value
            method = adapter.method
            new = method.input(params, start, site) if x is None else method.output(params, x, start, site)
            out = new if weight is None else out + weight * (new - value)
        return out


def _by_row(tensor: Tensor, rows: int, width: int | None) -> Tensor:
    """View a tensor whose leading dimensions run row by row as (rows, tokens, width), or (rows, tokens) for ids."""
    tokens = tensor.numel() // (width or 1)
    if tokens % rows:
        raise UsageError(
            f"the route has {rows} rows but the batch holds {tuple(tensor.shape)}", "Give one entry for each row."
        )
    return tensor.reshape(rows, tokens // rows, width) if width else tensor.reshape(rows, tokens // rows)
