"""Races: many contenders on the same rows in one stream, the worse ones dropped at rungs."""
