"""How one forward is laid out, padded or packed, which rows go where, and attention over them."""
