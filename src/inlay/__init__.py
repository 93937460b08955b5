"""Inlay: parameter-efficient fine-tuning where the adapter is a batch dimension."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
