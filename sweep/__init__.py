"""Tiny random models of every type that transformers registers, and Inlay's laws on each: `python -m sweep --help`."""
