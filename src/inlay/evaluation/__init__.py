"""Adapters and the plain base on the same rows, in the same pass."""
