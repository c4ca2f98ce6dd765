"""What is compared with what, and what the project set out to reach."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    """A way to do some work. `run` does `commands` of it, with nothing to set up but `before`,
    which isn't timed."""

    name: str
    run: Callable[[], object]
    commands: int
    before: Callable[[], None] = lambda: None


# Beyond ten of the larger unit, it's told in that.
_LARGER = {"ns": (1000, "us"), "CPU ns": (1000, "CPU us"), "bytes": (1 << 20, "MiB")}


def said(figure: float, unit: str) -> str:
    """A figure to read."""
    size, larger = _LARGER.get(unit, (1, unit))
    if abs(figure) >= 10 * size:
        figure, unit = figure / size, larger
    return f"{figure:,.1f} {unit}" if abs(figure) < 100 else f"{figure:,.0f} {unit}"


@dataclass(frozen=True)
class Bound:
    """What a ratio should be, or with a `unit` a difference: at most, or at least, `limit`."""

    limit: float
    at_most: bool = True
    unit: str = ""

    def reached(self, figure: float) -> bool:
        return figure <= self.limit if self.at_most else figure >= self.limit

    def __str__(self) -> str:
        limit = said(self.limit, self.unit) if self.unit else f"{self.limit:g}"
        return f"{'≤' if self.at_most else '≥'} {limit}"


@dataclass(frozen=True)
class Pair:
    """A contestant over another; without a bound it is there to be seen."""

    of: Contestant
    over: Contestant
    bound: Bound | None = None


@dataclass(frozen=True)
class Row:
    """Comparisons of the same work."""

    title: str
    pairs: tuple[Pair, ...]
    omitted: tuple[str, ...] = ()
    """Who could not take part, and why."""
    counted: str = ""
    """The unit to tell as how many commands went in a second ("files/s"); else it's ns for one."""
    cpu: bool = False
    """Processor time is compared, of all threads of the process, those of its rings too."""

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """Each once, in order."""
        every = [each for pair in self.pairs for each in (pair.of, pair.over)]
        return tuple({contestant.name: contestant for contestant in every}.values())
