"""The one training loop, for one adapter or several."""
