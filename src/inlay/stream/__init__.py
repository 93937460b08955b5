"""Which adapter each row belongs to."""
