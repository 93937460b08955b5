"""Experiments of a server: aliases over weighted arms, which arm a user gets, and what is known of each arm."""
