"""Changed copies of an adapter, beside it for a while: so that one forward compares it with what it would be without
one of its layers, or with another form of its methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from inlay.errors import UsageError
from inlay.methods.contract import Method, Site

from .adapter import Adapter, Part
from .bank import Bank

__all__ = ["changed_part", "variants"]


def changed_part(part: Part, method: Method | None = None, keeps: Callable[[Site], bool] | None = None) -> Part | None:
    """A part with the same parameters (not copies of them), computed by `method` where one is given, at the sites that
    `keeps` is true of; None where none is left."""
    sites = [site for site in part.sites.values() if keeps is None or keeps(site)]
    if not sites:
        return None
    params = {path: own for path, own in part.params.items() if not path or any(site.path == path for site in sites)}
    made = Part(method or part.method, part.index, sites, params)
    made.order = {module: place for module, place in part.order.items() if module in made.order}
    made.constants = part.constants
    return made


@contextmanager
def variants(bank: Bank, made: Mapping[str, Sequence[Part]]) -> Iterator[None]:
    """Hold adapters of the parts in `made`, by name, as long as the block runs; the bank is as before afterwards.

    Raises: UsageError where a name is taken, or an adapter has no parts.
    """
    for name, parts in made.items():
        if name in bank.adapters:
            raise UsageError(f"an adapter called {name!r} is here already", "Choose another name or remove it first.")
        if not parts:
            raise UsageError(f"adapter {name!r} has no parts", "Give it some.")
    try:
        for name, parts in made.items():
            bank._keep(Adapter(name, parts, seed=0))
        yield
    finally:
        for name in made:
            if name in bank.adapters:
                bank.remove(name)
