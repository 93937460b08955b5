"""Loading without progress bars and log lines: what matters of them is raised as an error instead."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


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
