"""One call of gdsdirect, disturbed at many places; a line for each thing that is wrong afterwards.

`python -P tests/interrupting.py KIND TRIAL FOLDER STATUS` is what test_interrupts.py runs, in an
interpreter of its own, since what is wrong may be that it hangs or crashes: the file STATUS then
has the place. The trials are in trials.py, and of these kinds:

- `bytecodes`: an exception is raised before a bytecode of gdsdirect's: before each that the call
  executes, and some of them again as it comes back to them, but `POINTS` in all;
- `signals`: a timer's signal comes after a random time, and its handler raises, up to three times;
- `memory`: one allocation of the call fails, by CPython's own _testcapi.

In half of the cases what was raised is kept until the memory is closed, and with it all frames that
it went through.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType

sys.path.append(str(Path(__file__).resolve().parent))

from disturbances import (
    AtBytecode,
    Call,
    ControlC,
    Disturbance,
    Interrupt,
    NoMemory,
    Point,
    Recorder,
    Storm,
)
from trials import GPU, HOST, NOT_YET, PATIENCE, Make, Trial, World, WrongError, until


def _often(times: int) -> int:
    """So many times, or as many more as GDSDIRECT_THOROUGH says."""
    return times * int(os.environ.get("GDSDIRECT_THOROUGH", "1"))


HUNG = 60.0  # seconds after which the process is ended: it waits for what never comes
POINTS = _often(25)  # bytecodes that are tried
EDGE = _often(5)  # of them the first ones, and the last ones
STORMS = _often(6)
ALLOCATIONS = _often(25)
ENOUGH = 12  # things that are wrong; more are not looked for
WAITED_FOR = 2  # and after so many that were waited for in vain

Tried = tuple[str, Callable[[Trial], Disturbance]]
"""What to call a disturbance, and what makes it."""

_unraisable: list[BaseException] = []


def _note_unraisable(what: sys.UnraisableHookArgs) -> None:
    if what.exc_value is not None:
        _unraisable.append(what.exc_value.with_traceback(None))


class Undisturbed:
    def __init__(self) -> None:
        self.raised: list[BaseException] = []

    def run(self, call: Call) -> None:
        call()


def attempt(
    world: World,
    make: Make,
    disturb: Callable[[Trial], Disturbance],
    *,
    keep: bool = False,
    first: bool = False,
) -> str | None:
    """Make a trial, and disturb it; what is wrong, or None. The `first` makes what is made once."""
    before = {} if first else world.held()
    _unraisable.clear()
    trial = make(world)
    disturbance = disturb(trial)
    raised, surfaced = disturbance.raised, list[BaseException]()
    try:
        trial.begin()
        try:
            disturbance.run(trial.call)
        except WrongError:
            raise
        except BaseException as error:
            surfaced.append(error)
        surfaced += [*trial.caught, *_unraisable]
        _judge(disturbance, surfaced)
        if not (keep and trial.keeps):
            _forget([*surfaced, *raised])
        if trial.finished:
            trial.look(disturbed=bool(raised))
        trial.again()
        trial.close()
        _forget([*surfaced, *raised])
        if isinstance(disturbance, NoMemory):  # by which CPython itself loses frames
            return None
        del trial, disturbance
        _nothing_left(world, before)
    except WrongError as wrong:
        return f"{_said(raised)}: {wrong}"
    except Exception as error:
        return f"{_said(raised)}: undisturbed afterwards, {type(error).__name__}: {error}"
    finally:
        _forget([*surfaced, *raised])
    return None


def _said(raised: list[BaseException]) -> str:
    return "".join(f", {error}" for error in raised if str(error))


def _judge(disturbance: Disturbance, surfaced: list[BaseException]) -> None:
    """What came out is what went in."""
    raised = disturbance.raised
    for error in surfaced:
        if isinstance(error, WrongError):
            raise error
        if isinstance(disturbance, NoMemory):
            # CPython's own words for a lock that it had no memory for.
            known = isinstance(error, MemoryError) or str(error) == "can't allocate lock"
        else:
            known = any(error is each for each in raised)
        if not known:
            raise WrongError(f"{error!r} came out")
    if raised and not surfaced:
        raise WrongError("the exception was swallowed")


def _forget(errors: list[BaseException]) -> None:
    """Let go of all frames."""
    for error in errors:
        at: BaseException | None = error
        while at is not None:
            at.__traceback__ = None
            at.__context__, at = None, at.__context__


def _nothing_left(world: World, before: dict[str, int]) -> None:
    def is_as_before() -> bool:
        gc.collect()
        now = world.held()
        return all(now[what] <= count for what, count in before.items())

    try:
        until(is_as_before, "")
    except WrongError:
        now = world.held()
        more = {what: now[what] - count for what, count in before.items() if now[what] > count}
        raise WrongError(f"there are more than before: {more}") from None


# ---- Kinds


def bytecodes(world: World, make: Make, chance: random.Random) -> Iterator[Tried]:
    recorder = Recorder()
    yield "with each bytecode looked at", lambda trial: recorder
    points = recorder.points
    for point in _chosen(points, chance):
        error = chance.choice((Interrupt, ControlC))()
        yield f"{type(error).__name__} before {point.text}", partial(_at, point, error)


def _at(point: Point, error: BaseException, _: Trial) -> Disturbance:
    return AtBytecode(point, error)


def _chosen(points: list[Point], chance: random.Random) -> list[Point]:
    """Each bytecode once, and the first ones and the last ones; then others."""
    firsts = [point for point in points[EDGE:-EDGE] if point.nth == 1]
    others = [point for point in points[EDGE:-EDGE] if point.nth > 1]
    edges = [*points[:EDGE], *points[EDGE:][-EDGE:]]
    room = POINTS - len(edges)
    chosen = chance.sample(firsts, min(len(firsts), room))
    chosen += chance.sample(others, min(len(others), room - len(chosen)))
    return edges + chosen


def signals(world: World, make: Make, chance: random.Random) -> Iterator[Tried]:
    seconds: list[float] = []

    class Timed(Undisturbed):
        def run(self, call: Call) -> None:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)

    for _ in range(3):
        yield "timed", lambda trial: Timed()
    typical = statistics.median(seconds)
    for number in range(STORMS):
        kind, times = chance.choice((Interrupt, ControlC)), chance.choice((1, 1, 2, 3))
        delay = chance.random() * typical * 1.2 + 1e-6
        text = f"{times} times {kind.__name__} by signals from {delay * 1e6:.0f} us on ({number})"
        yield text, partial(_storm, kind, delay, times)


def _storm(kind: type[BaseException], delay: float, times: int, trial: Trial) -> Disturbance:
    def may_raise(frame: FrameType) -> bool:
        return frame.f_code.co_filename != __file__ and trial.may_raise(frame)

    return Storm(kind, delay, times, may_raise)


def memory(world: World, make: Make, chance: random.Random) -> Iterator[Tried]:
    for after in range(ALLOCATIONS):
        yield f"allocation {after} fails", partial(_no_memory, after)


def _no_memory(after: int, _: Trial) -> Disturbance:
    return NoMemory(after)


KINDS: dict[str, Callable[[World, Make, random.Random], Iterator[Tried]]] = {
    "bytecodes": bytecodes,
    "signals": signals,
    "memory": memory,
}


def main(kind: str, name: str, folder: str, status: str) -> None:
    faulthandler.enable()
    # Of what is dropped unclosed, and of coroutines that an exception came before.
    warnings.simplefilter("ignore", ResourceWarning)
    warnings.filterwarnings("ignore", ".* was never awaited", RuntimeWarning)
    sys.unraisablehook = _note_unraisable
    sys.setswitchinterval(1e-4)
    world = World(Path(folder))
    if name in GPU | NOT_YET:
        world.start_gpu()
    make = (HOST | GPU | NOT_YET)[name]
    chance = random.Random(name)
    wrong = waited = 0
    gc.disable()
    with open(status, "w") as log:

        def tried(text: str, disturb: Callable[[Trial], Disturbance], **how: bool) -> None:
            nonlocal wrong, waited
            faulthandler.dump_traceback_later(HUNG, exit=True)
            os.pwrite(log.fileno(), text.ljust(400).encode(), 0)
            start = time.monotonic()
            problem = attempt(world, make, disturb, **how)
            if problem is not None:
                kept = ", and kept" if how.get("keep") else ""
                print(f"{text}{kept}{problem}", flush=True)
                wrong += 1
                waited += time.monotonic() - start > PATIENCE

        tried("undisturbed", lambda trial: Undisturbed(), first=True)
        tried("undisturbed", lambda trial: Undisturbed())
        gc.collect()
        gc.freeze()
        for text, disturb in KINDS[kind](world, make, chance):
            tried(text, disturb, keep=chance.random() < 0.5)
            if wrong == ENOUGH or waited == WAITED_FOR:
                break
    os._exit(0)  # threads that never come back hold nobody up


if __name__ == "__main__":
    main(*sys.argv[1:])
