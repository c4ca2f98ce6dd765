"""What measuring gave: figures by round, and how they compare."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Bound

MORE_IS_BETTER = frozenset(("IOPS", "MiB/s", "files/s"))


@dataclass(frozen=True)
class Result:
    """A contestant over another: their figures, round by round, and so the ratio of each round.

    Where the bound is of a difference, it's that in the ratio's place. It can be over nothing: then
    `over` is "", and its figures are 0.
    """

    row: str
    of: str
    over: str
    unit: str
    """Of `MORE_IS_BETTER` more is better, of others ("ns", "CPU ns", "bytes") less."""
    of_figures: Sequence[float]
    over_figures: Sequence[float]
    bound: Bound | None

    @property
    def is_difference(self) -> bool:
        return self.bound is not None and self.bound.unit != ""

    @property
    def compared(self) -> list[float]:
        """The ratio of each round, or the difference."""
        both = zip(self.of_figures, self.over_figures, strict=True)
        return [a - b if self.is_difference else a / b for a, b in both]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of what is compared the first quartile, the median and the third."""
        compared = self.compared
        if len(compared) == 1:
            return compared[0], compared[0], compared[0]
        first, median, third = statistics.quantiles(compared, n=4, method="inclusive")
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
            "difference" if self.is_difference else "ratio": {
                "first quartile": first,
                "median": median,
                "third quartile": third,
            },
            "bound": self.bound and str(self.bound),
            "reached": self.reached,
            "of_figures": list(self.of_figures),
            "over_figures": list(self.over_figures),
        }
