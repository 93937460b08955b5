"""Reads and writes checkpoints of other libraries. Foreign tensor files are opened here alone."""
