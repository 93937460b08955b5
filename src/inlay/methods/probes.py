"""What starts of LoRA remember of the rows that they see: principal components, covariances, gradients of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Components", "Covariance", "Gradient", "drawn_svd"]

CHUNK = 1024
"""Tokens whose components are found at once."""


class Components:
    """The first `count` principal components of what a site reads, by incremental PCA: each chunk of tokens is
    decomposed together with the components so far (Ross et al. 2008, "Incremental Learning for Robust Visual
    Tracking").

    `components` (k, in) have unit length, and a largest entry that is positive; `singular` are their singular values
    (k,), `ratios` their shares of the variance (k,); `mean` (in,) is that of the `seen` tokens.
    """

    gradients = False

    def __init__(self, count: int, answers_only: bool) -> None:
        self.count, self.answers_only, self.seen = count, answers_only, 0
        self.components, self.singular, self.mean = torch.empty(0), torch.empty(0), torch.empty(0)
        self._spread = 0.0
        self._waiting: list[Tensor] = []

    @property
    def ratios(self) -> Tensor:
        return self.singular.square() / self._spread

    def see(self, x: Tensor, answers: Tensor, gradient: Tensor | None) -> None:
        self._waiting.append(_wide(x[answers] if self.answers_only else x))
        if sum(map(len, self._waiting)) >= CHUNK:
            self.fit()

    def fit(self) -> None:
        """Take in what waits for the chunk to be full."""
        x = torch.cat(self._waiting) if self._waiting else torch.empty(0)
        self._waiting = []
        if not len(x):
            return
        mean, before, total = x.double().mean(0), self.seen, self.seen + len(x)
        centred = x - mean.to(x.dtype)
        self._spread += float(centred.double().square().sum())
        if before:
            moved = math.sqrt(before / total * len(x)) * (self.mean - mean)
            self._spread += float(moved.square().sum())
            mean = mean + (self.mean - mean) * (before / total)
            centred = torch.cat([self.singular[:, None] * self.components, centred, moved.to(x.dtype)[None]])
        _, singular, right = drawn_svd(centred, 2 * self.count + 16, seed=42)
        signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
        self.components, self.singular = (right * signs)[: self.count], singular[: self.count]
        self.mean, self.seen = mean, total


class _Mean:
    """The mean over batches of one matrix of each."""

    def __init__(self) -> None:
        self.seen = 0
        self._total: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        assert self._total is not None
        return self._total / self.seen

    def _add(self, matrix: Tensor) -> None:
        self._total = matrix if self._total is None else self._total + matrix
        self.seen += 1


class Covariance(_Mean):
    """The mean over batches of x^T x (in, in), where x (n, in) is divided by its largest entry."""

    gradients = False

    def see(self, x: Tensor, answers: Tensor, gradient: Tensor | None) -> None:
        x = _wide(x)
        x = x / x.max().abs().clamp(min=torch.finfo(x.dtype).tiny)
        self._add(x.t() @ x)


class Gradient(_Mean):
    """The mean over batches of the gradient (out, in) of the mean loss for a site's weight."""

    gradients = True

    def see(self, x: Tensor, answers: Tensor, gradient: Tensor | None) -> None:
        assert gradient is not None
        self._add(_wide(gradient).t() @ _wide(x))


def drawn_svd(matrix: Tensor, q: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, q), S (q,) and V^T (q, n) of the q largest singular values, at most all there are, by a random projection
    drawn from `seed` (Halko et al. 2009, arXiv:0909.4061); exact where q is all."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, min(q, *matrix.shape), niter=4)
    return u, s, v.t()


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
