"""What is compared with what, and what the project set out to reach."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    """A way to do some work. `run` does `commands` of it, with nothing to set up."""

    name: str
    run: Callable[[], object]
    commands: int


@dataclass(frozen=True)
class Bound:
    """What a ratio should be: at most, or at least, `limit`."""

    limit: float
    at_most: bool = True

    def reached(self, ratio: float) -> bool:
        return ratio <= self.limit if self.at_most else ratio >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"


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

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """Each once, in order."""
        every = [each for pair in self.pairs for each in (pair.of, pair.over)]
        return tuple({contestant.name: contestant for contestant in every}.values())
