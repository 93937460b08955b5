"""Which folder people mean by an adapter: its own, that of the run which made it, or one on the hub."""

from __future__ import annotations

from pathlib import Path

from inlay.errors import InlayError, UsageError
from inlay.formats.peft import CONFIG

from .hub import fetched, is_hub_id

__all__ = ["adapter_folder"]

FUSION = "adapter_fusion_config.json"
"""What AdapterHub writes beside a fusion of adapters, which are in folders of their own."""


def adapter_folder(name: str | Path) -> Path:
    """The folder that holds the adapter's files: `name` itself, `name`/adapter of a run, or a hub id's (org/name).

    Raises: UsageError where there is none, saying what `name` is instead; InlayError where the folder may not be read
    or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    try:
        found = next((folder for folder in (path, path / "adapter") if (folder / CONFIG).is_file()), None)
        if found is not None:
            (found / CONFIG).open("rb").close()
    except OSError as error:
        what = f"adapter {name} cannot be read ({error.strerror})"
        raise InlayError(what, "Check the path and its permissions.") from None
    return _instead(path, name) if found is None else found


def _instead(path: Path, name: str | Path) -> Path:
    """The adapter called `name` where no adapter is at `path`. Raises: as `adapter_folder`."""
    if (path / "run.json").is_file():
        raise UsageError(f"the run in {name} has no adapter yet", "Go on with it: inlay train --resume.")
    if path.is_file():
        remedy = f"Name the folder it lies in: {path.parent}."
        if not (path.parent / CONFIG).is_file():
            remedy = "A loralib file is loaded in Python: bank.load(name, path, alpha=...)."
        raise UsageError(f"adapter {name} is a file, not a folder", remedy)
    if (path / FUSION).is_file():
        what = f"{name} holds AdapterHub's AdapterFusion, which is read from no file of AdapterHub's"
        raise UsageError(what, "Load the adapters that it is over, and train a Fusion over them.")
    if path.is_dir():
        if (path / "config.json").is_file():
            raise UsageError(f"{name} holds a base, not an adapter", "Give it as --base.")
        raise UsageError(f"{name} holds no {CONFIG}", "Name the folder that the adapter was saved to.")
    if is_hub_id(str(name)):
        return fetched(str(name))
    raise UsageError(f"adapter folder {name} does not exist", "Check the path.")
