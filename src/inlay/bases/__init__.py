"""Base models: where they come from, in which dtype they are loaded, and how one is told from another."""
