"""Other people's training loops with our adapters."""
