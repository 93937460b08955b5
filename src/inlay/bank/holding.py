"""The adapters of a bank by name: which there are, and what of them is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.batch.route import normalise
from inlay.errors import UsageError
from inlay.formats.folders import read_folder
from inlay.methods.contract import Method, Structure

from .adapter import Adapter, Part
from .applying import SiteHooks
from .plain import NotCopied
from .rates import groups_of, warn_of_rates
from .unchanged import Unchanged

__all__ = ["Holding"]


class Holding(NotCopied):
    """The part of a bank that holds `adapters`."""

    base: Structure
    adapters: dict[str, Adapter]
    _sites: SiteHooks
    _unchanged: Unchanged

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

    def _over(self, method: Method) -> Method:
        """`method` over the adapters that it uses, which are loaded where they are named by their folders."""
        folders = [name for name in method.uses if name not in self.adapters and Path(name).expanduser().is_dir()]
        for name in method.uses:
            if name not in folders:
                self._named(name)
        for name in folders:
            self.load(name, name)
        used = {name: self._named(name) for name in method.uses}
        sites = {name: [s for part in own.parts for s in part.sites.values()] for name, own in used.items()}
        return method.over(sites) if used else method

    def load(self, name: str, path: str | Path) -> Adapter:
        """See `inlay.bank.bank.Bank`."""
        raise NotImplementedError

    @contextmanager
    def _read_first(self, folders: Sequence[str]) -> Iterator[dict[str, list[Part]]]:
        """Load the adapters in `folders` under their folders' names, and give the parts of all adapters; where what is
        over them does not come to be, those that are new do not stay.

        Raises: UsageError naming one that is here already with other values than its folder has.
        """
        new = [name for name in folders if name not in self.adapters]
        if other := next((name for name in folders if name not in new and not self._as_in_folder(name)), None):
            what = f"the adapter {other!r} of the bank is not what its folder holds"
            raise UsageError(what, f"Remove it, and what is over it: bank.remove({other!r}).")
        try:
            for name in new:
                self.load(name, name)
            yield {name: adapter.parts for name, adapter in self.adapters.items()}
        except BaseException:
            for name in new:
                if name in self.adapters:
                    self.remove(name)
            raise

    def _as_in_folder(self, name: str) -> bool:
        """Whether an adapter that is called by its folder has the values that are there."""
        own, there = self.adapters[name], Adapter.of(name, read_folder(Path(name), self.base), self.base)
        if own.methods != there.methods:
            return False
        pairs = zip(own.parameters(), there.parameters(), strict=True)
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)

    def remove(self, name: str) -> None:
        """See `inlay.bank.bank.Bank`."""
        raise NotImplementedError

    def _keep(self, adapter: Adapter) -> Adapter:
        self.adapters[adapter.name] = adapter
        for part in adapter.parts:
            part.hold_constants(p for other in self.adapters.values() for p in other.parts if p is not part)
            self._sites.add(part)
        return adapter
