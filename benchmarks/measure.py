"""The clock: contestants take turns in short slices, so that what disturbs one disturbs all."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from benchmarks.results import Result
from benchmarks.rows import Contestant, Pair, Row

_SLICE = 25e6  # ns: long beside an interrupt, short beside a change of the processor's clock
_WARM_UPS = 3


@contextmanager
def no_collections() -> Iterator[None]:
    """Garbage collection would fall on whoever is running, not on whoever made the garbage."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---- Turns of seconds, each with a clock of its own


RATE, CPU = "MiB/s", "CPU ms/GiB"

Figures = dict[str, float]
"""Of a turn, by their units."""

Turn = Callable[[], Figures]


def figures_of(nbytes: float, seconds: float, cpu: float) -> Figures:
    """Of so many bytes, in so many seconds, for which processors took `cpu` seconds."""
    return {RATE: nbytes / seconds / (1 << 20), CPU: cpu * 1000 / (nbytes / (1 << 30))}


def take_turns(
    turns: Mapping[str, Turn], rounds: int, on_turn: Callable[[], object]
) -> dict[str, list[Figures]]:
    """All in every round, and who begins changes from round to round."""
    figures: dict[str, list[Figures]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            figures[name].append(turns[name]())
            on_turn()
    return figures


# ---- Slices, of contestants of one process


def _timed(contestant: Contestant, passes: int, clock: Callable[[], int]) -> float:
    """Nanoseconds a command."""
    spent = 0
    for _ in range(passes):
        contestant.before()
        begun = clock()
        contestant.run()
        spent += clock() - begun
    return spent / (passes * contestant.commands)


def _passes(contestant: Contestant) -> int:
    """How many fill a slice."""
    fastest = min(_timed(contestant, 1, time.perf_counter_ns) for _ in range(_WARM_UPS))
    return max(1, round(_SLICE / (fastest * contestant.commands)))


def measure(row: Row, rounds: int, on_round: Callable[[], object]) -> list[Result]:
    """Each pair, one right after the other, in every round; which is first and which pair is first
    changes from round to round."""
    clock = time.process_time_ns if row.cpu else time.perf_counter_ns
    figures: dict[Pair, tuple[list[float], list[float]]] = {pair: ([], []) for pair in row.pairs}
    with no_collections():
        passes = {each.name: _passes(each) for each in row.contestants}
        for number in range(rounds):
            turn = number % len(row.pairs)
            for pair in row.pairs[turn:] + row.pairs[:turn]:
                both = [(pair.of, figures[pair][0]), (pair.over, figures[pair][1])]
                for contestant, its in both if number % 2 else both[::-1]:
                    its.append(_timed(contestant, passes[contestant.name], clock))
            on_round()

    def told(times: list[float]) -> list[float]:
        return [1e9 / ns for ns in times] if row.counted else times

    return [
        Result(
            row.title,
            pair.of.name,
            pair.over.name,
            row.counted or ("CPU ns" if row.cpu else "ns"),
            told(figures[pair][0]),
            told(figures[pair][1]),
            pair.bound,
        )
        for pair in row.pairs
    ]
