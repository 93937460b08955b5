"""Libraries that a plain installation does not bring: asked for by name before work begins."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

from inlay.errors import InlayError

__all__ = ["EXTRAS", "extra_packages", "plain_packages", "require"]

EXTRAS = {
    "optimizers": "--optimizer lion, schedule-free, adamw-8bit",
    "quantize": "--quantize 4bit",
    "track": "--track tensorboard",
    "race": "--space race.yaml that is sampled",
    "live": "race --open",
    "serve": "serve",
    "ray": "serve --ray",
}
"""What each extra of the package is for."""


def require(module: str, what: str, extra: str) -> None:
    """Import `module`, which `what` (a flag, say) needs and the extra called `extra` brings.

    Raises: InlayError that says whether it is missing or broken, and what to install.
    """
    install = "pip install " + " ".join(f"'{package}'" for package in extra_packages(extra))
    top = module.partition(".")[0]
    try:
        found = find_spec(top) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise InlayError(f"{what} needs {top}, which is not installed", f"{install}.")
    try:
        importlib.import_module(module)
    except Exception as error:  # a library that is broken or does not fit the others raises what it likes
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InlayError(
            f"{what} needs {module}, which cannot be imported here ({why})", f"{install} --upgrade."
        ) from None


def plain_packages() -> tuple[str, ...]:
    """What a plain installation brings, as requirements ("torch>=2.6")."""
    return _packages().get("", ())


def extra_packages(extra: str) -> tuple[str, ...]:
    """What an extra brings, as requirements. Its own name where the package's metadata are not at hand."""
    return _packages().get(extra, ()) or (extra,)


@cache
def _packages() -> dict[str, tuple[str, ...]]:
    """Requirements by extra, "" for those of every installation, as pyproject.toml says."""
    try:
        lines = requires("inlay") or []
    except PackageNotFoundError:
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for line in lines:
        package, _, marker = line.partition(";")
        extra = marker.partition("extra == ")[2].strip(" '\")") if "extra ==" in marker else ""
        found[extra] = (*found.get(extra, ()), package.strip())
    return found
