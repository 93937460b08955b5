"""Base and adapter as one plain model on disk."""
