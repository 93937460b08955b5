"""Which folder people mean by an adapter: its own, that of the run which made it, or one on the hub."""

from __future__ import annotations

from pathlib import Path

from inlay.bases.hub import fetched, is_hub_id
from inlay.errors import UsageError

from .peft import CONFIG

__all__ = ["adapter_folder"]


def adapter_folder(name: str | Path) -> Path:
    """The folder that holds the adapter's files: `name` itself, `name`/adapter of a run, or a hub id's (org/name).

    Raises: UsageError where there is none, saying what `name` is instead; InlayError where the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if (path / CONFIG).is_file():
        return path
    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    if (path / "run.json").is_file():
        raise UsageError(f"the run in {name} has no adapter yet", "Go on with it: inlay train --resume.")
    if path.is_file():
        remedy = f"Name the folder it lies in: {path.parent}."
        if not (path.parent / CONFIG).is_file():
            remedy = "A loralib file is loaded in Python: bank.load(name, path, alpha=...)."
        raise UsageError(f"adapter {name} is a file, not a folder", remedy)
    if path.is_dir():
        if (path / "config.json").is_file():
            raise UsageError(f"{name} holds a base, not an adapter", "Give it as --base.")
        raise UsageError(f"{name} holds no {CONFIG}", "Name the folder that the adapter was saved to.")
    if is_hub_id(str(name)):
        return fetched(str(name))
    raise UsageError(f"adapter folder {name} does not exist", "Check the path.")
