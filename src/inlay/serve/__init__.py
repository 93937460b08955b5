"""`inlay serve`: one thread with the base and its adapters, and what reaches it."""
