"""A run from its settings to its folder: rows, checkpoints, resuming, scores, trackers."""
