"""Where an adapter can touch the base: found by structure, not by tables of model names."""
