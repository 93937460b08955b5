"""One forward over segments of many adapters, with its losses, and the memory that it may take."""
