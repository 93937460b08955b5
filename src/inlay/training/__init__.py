"""The one training loop, for one learner or several."""
