"""Fetches a base from the Hugging Face hub: settings, tokenizer and safetensors, nothing that can run."""

from __future__ import annotations

import re
from pathlib import Path

from inlay.errors import InlayError, UsageError

__all__ = ["fetched", "is_hub_id"]

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "vocab*", "merges.txt"]
UNWANTED = ["*/*", "consolidated*"]
"""Subfolders hold the same weights for other programs, and so do Mistral's consolidated files."""


def is_hub_id(name: str) -> bool:
    """Whether `name` looks like org/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None and not name.endswith(".gguf")


def fetched(name: str) -> Path:
    """The folder of the hub model `name` (org/name) in the hub's own cache, fetched where it is not there.

    Raises: UsageError where there is no such model or it is closed; InlayError where the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED, etag_timeout=10))
    except Exception as error:  # the hub's library raises its own, its HTTP library's and the system's
        cause = error.__cause__ or error
        why = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        kind = UsageError if isinstance(error, RepositoryNotFoundError) else InlayError
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
            why = f"the hub answers {why}"
        raise kind(
            f"no folder is called {name!r} here, and the hub model {name!r} could not be fetched ({why})",
            "Use smollm2, or a local folder or .gguf file.",
        ) from None
