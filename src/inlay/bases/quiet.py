"""Libraries without their notices, bars and log lines: what matters of them is raised as an error instead."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hush", "quiet"]

CHATTY = ("torchao", "torch.utils._pytree", "accelerate", "bitsandbytes")
"""Loggers that speak at import: torchao of kernels for other machines, torch of what torchao does."""
LIBRARIES = r"(transformers|torch|torchao|accelerate|peft|huggingface_hub|bitsandbytes|safetensors|tensorboard)(\.|$)"


def hush() -> None:
    """For a command's process: notices of libraries are for those who program with them.

    Called before they are imported, it also covers what they say then. What the user has set in the environment stays.
    """
    if os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error") == "error":  # asked for once, at import
        logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns whenever a process is started
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for kind in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=kind, module=LIBRARIES)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' bars and every log line below an error while inside; all settings are put back after."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        from transformers.utils import logging as theirs

        bars = theirs.is_progress_bar_enabled()
        theirs.disable_progress_bar()
        try:
            yield
        finally:
            if bars:
                theirs.enable_progress_bar()
    finally:
        logging.disable(before)
