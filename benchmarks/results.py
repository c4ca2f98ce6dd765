"""What measuring gave: figures by round, and their ratios."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Bound


@dataclass(frozen=True)
class Result:
    """A contestant over another: their figures, round by round, and so the ratio of each round."""

    row: str
    of: str
    over: str
    unit: str
    """"ns" and "bytes", of which less is better, or "IOPS", of which more is."""
    of_figures: Sequence[float]
    over_figures: Sequence[float]
    bound: Bound | None

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.of_figures, self.over_figures, strict=True)]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The ratios' first quartile, median and third."""
        ratios = self.ratios
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        first, median, third = statistics.quantiles(ratios, n=4, method="inclusive")
        return first, median, third

    @property
    def reached(self) -> bool | None:
        """None: nothing was set out."""
        return None if self.bound is None else self.bound.reached(self.quartiles[1])

    def as_json(self) -> dict[str, Any]:
        first, median, third = self.quartiles
        return {
            "row": self.row,
            "of": self.of,
            "over": self.over,
            "unit": self.unit,
            "of_median": statistics.median(self.of_figures),
            "over_median": statistics.median(self.over_figures),
            "ratio": {"first quartile": first, "median": median, "third quartile": third},
            "bound": self.bound and str(self.bound),
            "reached": self.reached,
            "of_figures": list(self.of_figures),
            "over_figures": list(self.over_figures),
        }
