"""Points of a unit cube that lie far from one another, by Optuna.

Akiba et al. 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework" (arXiv:1907.10902). Its
quasi-random sampler is asked alone: it needs no scores, so that all contenders are known before the race begins, and
its Sobol points cover a space better than random ones (Bergstra and Bengio 2012, "Random Search for Hyper-Parameter
Optimization").
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from inlay.bases.extras import require

__all__ = ["sampled_points"]


def sampled_points(axes: Sequence[str], seed: str) -> Iterator[dict[str, float]]:
    """Points without end, each a number from 0 to below 1 by axis; equal for equal axes and seed.

    Raises: InlayError where Optuna or scipy, which its sampler needs, is not installed.
    """
    for module in ("optuna", "scipy"):
        require(module, "a space of more contenders than it may have", "race")
    with _quiet():
        import optuna

        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
        sampler = optuna.samplers.QMCSampler(scramble=True, seed=number, warn_independent_sampling=False)
        study = optuna.create_study(sampler=sampler)
        cube = {axis: optuna.distributions.FloatDistribution(0.0, 1.0) for axis in sorted(axes)}
        begun = optuna.trial.create_trial(params=dict.fromkeys(cube, 0.5), distributions={**cube}, value=0.0)
        study.add_trial(begun)  # the sampler takes the axes from the first finished trial
    while True:
        with _quiet():
            params = study.ask({**cube}).params
        yield {axis: min(max(params[axis], 0.0), 1 - 2**-53) for axis in cube}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Optuna and scipy say of their own experiments, which people did not ask for."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)
