"""Which folder people mean by an adapter: its own, that of the run which made it, or one on the hub."""

from __future__ import annotations

from pathlib import Path

from inlay.errors import InlayError, UsageError
from inlay.formats.folder_kinds import KINDS
from inlay.formats.peft import CONFIG

from .hub import fetched, is_hub_id

__all__ = ["adapter_folder"]


def adapter_folder(name: str | Path) -> Path:
    """The folder that holds the adapter's files: `name` itself, `name`/adapter of a run, or a hub id's (org/name).

    Raises: UsageError where there is none, saying what `name` is instead; InlayError where the folder may not be read
    or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    try:
        files = (folder / file for folder in (path, path / "adapter") for file in KINDS)
        found = next((file for file in files if file.is_file()), None)
        if found is not None:
            found.open("rb").close()
    except OSError as error:
        what = f"adapter {name} cannot be read ({error.strerror})"
        raise InlayError(what, "Check the path and its permissions.") from None
    return _instead(path, name) if found is None else found.parent


def _instead(path: Path, name: str | Path) -> Path:
    """The adapter called `name` where no adapter is at `path`. Raises: as `adapter_folder`."""
    if (path / "run.json").is_file():
        raise UsageError(f"the run in {name} has no adapter yet", "Go on with it: inlay train --resume.")
    if path.is_file():
        remedy = f"Name the folder it lies in: {path.parent}."
        if not any((path.parent / file).is_file() for file in KINDS):
            remedy = "A loralib file is loaded in Python: bank.load(name, path, alpha=...)."
        raise UsageError(f"adapter {name} is a file, not a folder", remedy)
    if path.is_dir():
        if (path / "config.json").is_file():
            raise UsageError(f"{name} holds a base, not an adapter", "Give it as --base.")
        raise UsageError(f"{name} holds no {CONFIG}", "Name the folder that the adapter was saved to.")
    if is_hub_id(str(name)):
        return fetched(str(name))
    raise UsageError(f"adapter folder {name} does not exist", "Check the path.")
