"""Checkpoints of other libraries, in and out. The only place where foreign tensor files are opened."""
