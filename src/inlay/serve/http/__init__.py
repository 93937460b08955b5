"""The server's HTTP side: OpenAI's interface, keys, limits and metrics around the engine."""
