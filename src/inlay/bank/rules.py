"""By what rule adapters are combined; without torch, so that a command can be described before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

from annotated_types import Gt, Le

from inlay.errors import UsageError
from inlay.values import Checked, Count, Help, OneOf, Seed

if TYPE_CHECKING:
    from inlay.kernels.combining import Rule

__all__ = ["Clamp", "Combination", "Density", "How", "Rank", "Signed", "Thinning"]

HOW = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
Part = Annotated[float, Gt(0), Le(1)]
How = Annotated[str, OneOf(HOW, "rule"), Help("cat is the exact sum; *svd combines whole products")]
Rank = Annotated[Count | None, Help("of what *svd gives; the largest of the adapters' where unset")]
Density = Annotated[Part | None, Help("share of numbers that ties, dare and magnitude_prune keep")]
Signed = Annotated[str, OneOf(("total", "frequency"), "signs"), Help("by what ties chooses a sign")]
Clamp = Annotated[Part | None, Help("quantile at which *svd cuts its factors")]
Thinning = Annotated[Seed, Help("which numbers dare keeps")]


@dataclass(frozen=True)
class Combination(Checked):
    """A rule with its settings; the names are those of HF PEFT's add_weighted_adapter.

    "cat" lays the products side by side: it is the sum by weights exactly, of the sum of their ranks. "svd" is the
    closest to that sum of one rank. "linear" sums A and B apart, so that it mixes each adapter's A with the others' B;
    it wants equal ranks. The others leave numbers out first: of A and B apart, or of the products with "_svd".
    """

    how: How = "cat"
    rank: Rank = None
    density: Density = None
    signs: Signed = "total"
    clamp: Clamp = None
    seed: Thinning = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is None and self.thins:
            raise UsageError(f"{self.how} needs a density", "Give the share of numbers to keep; 0.2 to 0.5 is usual.")
        for name, there in (("density", self.thins), ("rank", self.dense), ("clamp", self.dense)):
            if getattr(self, name) is not None and not there:
                raise UsageError(f"{self.how} has no {name}", "Leave it out.")

    @property
    def dense(self) -> bool:
        """Whether whole products are combined, and made into factors again."""
        return self.how.endswith("svd")

    @property
    def thins(self) -> bool:
        """Whether numbers are left out first."""
        return self.how not in ("cat", "linear", "svd")

    @property
    def rule(self) -> Rule:
        """How tensors of one shape become one."""
        return cast("Rule", "linear" if self.how == "svd" else self.how.removesuffix("_svd"))
