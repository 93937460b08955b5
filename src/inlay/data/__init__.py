"""Data files to rows, rows to tokens: which words the base reads, and which of them bear loss."""
