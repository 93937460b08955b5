"""Names of bases for readers elsewhere: what people typed here means little on another machine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from inlay.bases.hub import is_hub_id
from inlay.bases.wheels import SMOLLM2

__all__ = ["Named", "front_matter", "named"]


@dataclass(frozen=True)
class Named:
    """A base: `name` means something elsewhere, `typed` is what Inlay's commands take for it.

    `hub` says whether `name` is a hub id, `license` is the base's own as its card has it, `note` what else a reader
    must know.
    """

    name: str
    typed: str
    hub: bool
    license: str | None = None
    note: str = ""

    @property
    def short(self) -> str:
        """The name without its owner's."""
        return self.name.rpartition("/")[2]


KNOWN = {
    "smollm2": Named(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2", True, "apache-2.0",
        f"Inlay's smollm2 is that model rounded to 4 bits ({Path(SMOLLM2.member).name} of {SMOLLM2.package} "
        f"{SMOLLM2.version}): on the hub's own weights the scores may differ a little.",
    )
}  # fmt: skip


def named(base: str) -> Named:
    """What the base that somebody typed as `base` is called elsewhere. Reads its folder's config and card, if any."""
    if base in KNOWN:
        return KNOWN[base]
    folder = Path(base).expanduser()
    if folder.is_dir():
        own, license_ = _hub_name(folder), front_matter(folder / "README.md").get("license")
        name = own or " ".join(folder.resolve().name.split()) or "base"
        return Named(name, own or name, own is not None, license_ if isinstance(license_, str) else None)
    if is_hub_id(base):
        return Named(base, base, True)
    name = " ".join(base.replace("\\", "/").rstrip("/").rpartition("/")[2].split()) or "base"
    return Named(name, name, False)


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; nothing where there is none that can be read."""
    try:
        head = re.match(r"---\n(.*?)^---$", card.read_text(encoding="utf8"), re.DOTALL | re.MULTILINE)
        found = yaml.safe_load(head[1]) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _hub_name(folder: Path) -> str | None:
    """The hub id of a folder in the hub's cache, or of one whose config names a hub model that is called like it.

    Another name in the config is that of the model it was made from, so that it would be a false one.
    """
    for part in folder.resolve().parts:
        if part.startswith("models--") and part.count("--") >= 2:
            return part.removeprefix("models--").replace("--", "/", 1)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    noted = config.get("_name_or_path") if isinstance(config, dict) else None
    if not isinstance(noted, str) or not is_hub_id(noted):
        return None
    return noted if noted.rpartition("/")[2].lower() == folder.resolve().name.lower() else None
