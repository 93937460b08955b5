"""The folders that adapters are served from: what lies in them, and what may not be opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from inlay.errors import UsageError
from inlay.formats import adapterhub, adapterhub_fusion, adapterhub_heads, peft
from inlay.formats.folder_kinds import FUSION, KINDS, fusion_of, is_fusion
from inlay.formats.peft import CONFIG
from inlay.formats.support import ADAPTERHUB_CONFIGS, PEFT_TYPES

from .refusals import Forbidden

__all__ = [
    "Folders",
    "Signature",
    "digest_of",
    "files_of",
    "holds_adapter",
    "newest",
    "said_method",
    "signature_of",
]

WEIGHTS = (peft.FILES, adapterhub.FILES, adapterhub_fusion.FILES, adapterhub_heads.FILES)
"""For each kind of weights the file that is read, and the pickle that is read where it is missing."""
ENDS = (".json", ".safetensors")
"""How the names of files end that an adapter is made of."""

Signature = tuple[tuple[str, int, int, int], ...]
"""Of each file its name, its size, when it was changed (in ns), and its number on the disk."""


class Folders:
    """`given` folders: each folder in them that holds an adapter, or a run that made one, has its own name."""

    def __init__(self, given: Sequence[str | Path]) -> None:
        self.given = [Path(one) for one in given]
        for path in self.given:
            if not path.is_dir():
                raise UsageError(f"the folder of adapters {path} does not exist", "Make it, or check the path.")
        self._roots = [path.resolve() for path in self.given]

    def look(self) -> dict[str, Path]:
        """The adapters that lie in the folders, by their names; of two with one name the first folder's. A folder that
        is an adapter's or a run's own is that one alone. Nothing is opened."""
        found: dict[str, Path] = {}
        for root in self._roots:
            for folder in [root] if _adapter_in(root) else _inside(root):
                if folder.name not in found and (adapter := _adapter_in(folder)) is not None:
                    found[folder.name] = adapter
        return found

    def path_of(self, given: str | Path) -> Path:
        """The folder of an adapter, for a path that may be relative to one of the folders.

        Raises: Forbidden where it leads out of them; UsageError where no adapter is there.
        """
        refused = Forbidden(
            f"{str(given)!r} is not in the folders that adapters are served from", "Name a folder inside of them."
        )
        try:
            places = [root / given for root in self._roots]
            inside = [path for place in places if self._holds(path := place.resolve())]
        except (OSError, ValueError, RuntimeError):
            raise refused from None
        if not inside:
            raise refused
        found = next((adapter for path in inside if (adapter := _adapter_in(path)) is not None), None)
        if found is None:
            raise UsageError(f"{str(given)!r} holds no adapter", "Name the folder that the adapter was saved to.")
        self.check(found)
        return found

    def check(self, folder: Path) -> None:
        """Raises: Forbidden where a file of an adapter is a link out of the folders, or its weights are a pickle."""
        for path in (folder, *files_of(folder)):
            if not self._holds(path.resolve()):
                raise Forbidden(f"{path} is a link out of the folders that adapters are served from", "Copy the files.")
        for own in (folder, *_inside(folder)):
            for whole, pickled in WEIGHTS:
                if (own / pickled).is_file() and not (own / whole).is_file():
                    raise Forbidden(
                        f"{own / pickled} is a pickle, which a server never opens",
                        "Write it as safetensors: inlay convert --to peft.",
                    )

    def _holds(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)


def _inside(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:
        return []


def _adapter_in(folder: Path) -> Path | None:
    """The adapter's folder: `folder`, or that inside of a run's."""
    if holds_adapter(folder):
        return folder
    return folder / "adapter" if holds_adapter(os.path.join(folder, "adapter")) else None


def holds_adapter(folder: str | Path) -> bool:
    """Whether a folder has the file that an adapter is known by."""
    return any(os.path.isfile(os.path.join(folder, kind)) for kind in KINDS)


# ---- the files of one adapter


def files_of(folder: Path) -> Iterator[Path]:
    """The files that an adapter in `folder` is made of, its inner folders' too."""
    for own in (folder, *_inside(folder)):
        try:
            names = sorted(name for name in os.listdir(own) if name.endswith(ENDS) and not name.startswith("."))
        except OSError:
            continue
        yield from (own / name for name in names)


def signature_of(folder: Path) -> Signature:
    """What shows cheaply that files may have changed; empty where there are none."""
    found = []
    for path in files_of(folder):
        try:
            stat = path.stat()
        except OSError:
            continue
        found.append(
            (str(path.relative_to(folder)), stat.st_size, max(stat.st_mtime_ns, stat.st_ctime_ns), stat.st_ino)
        )
    return tuple(found)


def newest(signature: Signature) -> float:
    """When the latest of the files was written, in seconds since 1970; 0 where there are none."""
    return max((changed for _, _, changed, _ in signature), default=0) / 1e9


def digest_of(folder: Path) -> bytes:
    """Names the content of an adapter's files. Raises: OSError."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files_of(folder):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.digest()


def said_method(folder: Path) -> tuple[str, int | None]:
    """An adapter's method and its rank or number of virtual tokens, by what its config says; "" and None where it says
    nothing."""
    try:
        own, name = (fusion_of(folder), FUSION) if is_fusion(folder) else (folder, CONFIG)
        config = json.loads((own / name).read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return "", None
    if not isinstance(config, dict):
        return "", None
    if name == FUSION:
        return "AdapterFusion", None
    kind, inner = config.get("peft_type"), config.get("config")
    if isinstance(kind, str):
        return PEFT_TYPES.get(kind, kind), _size(config)
    if isinstance(inner, dict):
        architecture = str(inner.get("architecture") or "Bottleneck adapter")
        return ADAPTERHUB_CONFIGS.get(architecture, architecture), _size(inner)
    return "", None


def _size(config: Mapping[str, Any]) -> int | None:
    found = (config.get(name) for name in ("r", "num_virtual_tokens", "prefix_length", "adapter_len"))
    return next((int(value) for value in found if isinstance(value, int) and value > 0), None)
