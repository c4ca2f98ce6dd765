"""A stress of the package by everything at once, which shows races in seconds.

    python tests/chaos.py --seconds 60    rounds of some seconds, each in its own interpreter
    python tests/chaos.py --one 17        the round with this seed, to see it again
    python tests/chaos.py --soak 30       minutes of rounds in one interpreter, which must not grow

Threads, tasks of event loops, signal handlers, finalizers and forks read, submit, wait, give up and
close what the others use (chaos_actors.py), and compare every byte. Wrong bytes, exceptions that
should not be, crashes, hangs, and what is left when all is closed, are told with the seed of their
round, and the exit status is 1. `make chaos` builds the extension with its points of chaos.h first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chaos_actors import (
    CaseKeeper,
    Collector,
    FileKeeper,
    Forker,
    Interrupted,
    Loop,
    PlaceKeeper,
    Reader,
    StreamCloser,
    Streamer,
    Submitter,
)
from chaos_checks import Place, make_files
from chaos_world import Actor, Pulse, World

import gdsdirect
from gdsdirect import GpuMappedBuffer

PATIENCE = 30  # seconds without a turn of one's own, before all is said to hang
_SETTLING = 20.0  # seconds that the kernel, and threads that end, have to give everything back
SLACK = 16 << 20  # bytes by which a long run's memory may vary

# Of each kind, how often some take part in a round, and how many at most.
KINDS: dict[type[Actor], tuple[float, int]] = {
    Reader: (0.7, 4),
    Loop: (0.5, 2),
    Streamer: (0.4, 2),
    FileKeeper: (0.4, 2),
    PlaceKeeper: (0.4, 1),
    StreamCloser: (0.3, 1),
    CaseKeeper: (0.5, 2),
    Collector: (0.3, 1),
    Forker: (0.3, 1),
    Interrupted: (0.5, 1),
}


# ---- One round

IDLE_RINGS = 16  # that the package keeps for the next buffers (csrc/module.h)


class Counts(NamedTuple):
    """What a process has that must not become more."""

    descriptors: dict[int, str]
    threads: int
    pinned: int
    buffers: int

    @classmethod
    def now(cls) -> Counts:
        gc.collect()
        descriptors = {}
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                descriptors[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        pinned = re.search(r"VmPin:\s*(\d+)", Path("/proc/self/status").read_text())
        return cls(
            descriptors,
            sum(not name.startswith("iou-") for name in names),
            int(pinned[1]) if pinned else 0,
            sum(isinstance(each, GpuMappedBuffer) for each in gc.get_objects()),
        )

    def grown(self, before: Counts, orphans: int) -> list[str]:
        """What is more than before, and than may be kept by what was dropped in flight."""
        new = [link for fd, link in self.descriptors.items() if before.descriptors.get(fd) != link]
        rings = [link for link in new if "io_uring" in link]
        new = [link for link in new if "io_uring" not in link] + rings[IDLE_RINGS:]
        kinds = Counter(re.sub(r"[\d]+", "_", Path(link).name) for link in new)
        more = {
            f"descriptors: {dict(kinds)}": len(new) - 6 * orphans,
            "threads": self.threads - before.threads,
            "pinned memory": self.pinned - before.pinned - 4096 * orphans,
            "buffers": self.buffers - before.buffers - 4 * orphans,
        }
        return [f"{what}, {count} more" for what, count in more.items() if count > 0]


class Watchdog(threading.Thread):
    """Ends the process, with the stack of every thread, when a pulse does not beat."""

    def __init__(self, pulses: list[Pulse], patience: float, say: Say) -> None:
        super().__init__(daemon=True)
        self._say = say
        self._pulses = pulses
        self._patience = patience
        self._over = threading.Event()

    def run(self) -> None:
        last = dict.fromkeys(self._pulses, -1)
        told = armed = 0.0
        while not self._over.wait(0.1):
            still = [p for p in self._pulses if not p.ended and p.beats == last.get(p)]
            if not still:
                last = {pulse: pulse.beats for pulse in self._pulses}
                armed = time.monotonic()
                faulthandler.dump_traceback_later(self._patience, exit=True)
            elif time.monotonic() - armed > self._patience * 0.8 and told != armed:
                told = armed
                self._say({"still": sorted({f"{p.name.split()[0]} {p.doing}" for p in still})})
        faulthandler.cancel_dump_traceback_later()

    def end(self) -> None:
        self._over.set()
        self.join()


Say = Callable[[dict[str, Any]], None]
"""Takes what a round has to say; also in the midst of a crash."""


def say_to_parent(what: dict[str, Any]) -> None:
    """As a line for the process that started this one."""
    os.write(1, json.dumps(what).encode() + b"\n")


def say_to_reader(what: dict[str, Any]) -> None:
    """For whoever looks on."""
    if "kind" in what:
        print(f"{what['kind']}\n{_indented(what['detail'])}", flush=True)
    elif "still" in what:
        print(f"HANG: {'; '.join(what['still'])}", flush=True)


class Faults:
    """Tells of faults, of each kind a few times."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._lock = threading.RLock()  # a finalizer may be told of while another is
        self.kinds: Counter[str] = Counter()

    def tell(self, kind: str, detail: str) -> None:
        with self._lock:
            self.kinds[kind] += 1
            if self.kinds[kind] <= 2:
                self._say({"kind": kind, "detail": detail})


def _chosen(world: World, seed: int, often: float) -> list[Actor]:
    """Who takes part in this round; each kind `often` as often as usual."""
    chance = random.Random(seed)
    sys.setswitchinterval(chance.choice((1e-6, 1e-5, 1e-4, 5e-3)))
    numbers = Counter(
        {
            kind: chance.randint(1, most) if chance.random() < part * often else 0
            for kind, (part, most) in KINDS.items()
        }
    )
    if not numbers[Loop]:
        numbers[Reader] = numbers[Reader] or 2
    world.files = [world.open(number, direct=number % 3 > 0) for number in range(4)]
    actors = [kind(world, str(i), seed) for kind, many in numbers.items() for i in range(many)]
    if numbers[CaseKeeper]:
        actors += [Submitter(world, str(i), seed) for i in range(chance.randint(2, 4))]
    readers = next(world.readers)
    world.places = [Place(readers + 1) for _ in range(chance.randint(1, 3))]
    return actors


class Round(NamedTuple):
    """How a round is to be played."""

    folder: Path
    seconds: float
    patience: float
    say: Say
    often: float = 1  # as often as usual each kind takes part
    orphans: int = 3  # things that are dropped in flight, and so kept for good, at most


def play(how: Round, seed: int) -> Counter[str]:
    """A round. Returns the kinds of what was wrong, of which all is told."""
    faults = Faults(how.say)
    before = Counts.now()
    world = World(how.folder, how.patience, how.orphans, faults.tell)
    actors = _chosen(world, seed, how.often)
    with _told_of_garbage(world):
        _act(world, actors, how)
    orphans, turns = world.orphans, world.turns
    del world, actors
    _settle(before, orphans, faults)
    how.say({"turns": turns})
    return faults.kinds


def _act(world: World, actors: list[Actor], how: Round) -> None:
    """All take their turns, until all have ended and everything is closed."""
    end = Pulse("Main")
    end.ended = True  # it begins when the others have ended
    world.pulses.append(end)
    main = [actor for actor in actors if isinstance(actor, Interrupted)]
    threads = [threading.Thread(target=a.run, name=a.name) for a in actors if a not in main]
    watchdog = Watchdog(world.pulses, how.patience, how.say)
    watchdog.start()
    for thread in threads:
        thread.start()
    timer = threading.Timer(how.seconds, world.end)
    timer.start()
    for actor in main:
        actor.run()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the handler has its actor, and so the world
    for thread in (timer, *threads):
        thread.join()
    end.ended = False
    end.beat("closing everything")
    try:
        world.close()
    except Exception as error:
        world.fault(error, "closing everything")
    watchdog.end()


@contextlib.contextmanager
def _told_of_garbage(world: World) -> Iterator[None]:
    """What finalizers raise is wrong, unless it is an interrupt."""

    def tell(args: sys.UnraisableHookArgs) -> None:
        if isinstance(args.exc_value, Exception):
            world.fault(args.exc_value, f"{args.object!r} was collected")

    sys.unraisablehook = tell
    try:
        yield
    finally:
        sys.unraisablehook = sys.__unraisablehook__


def _settle(before: Counts, orphans: int, faults: Faults) -> None:
    """Wait until nothing is more than before, or tell what is."""
    end = time.monotonic() + _SETTLING
    while grown := Counts.now().grown(before, orphans):
        if time.monotonic() > end:
            for what in grown:
                kind = re.sub(r"\d+", "_", what)
                faults.tell(f"left when all was closed: {kind}", str(grown))
            return
        time.sleep(0.05)


def prepare() -> None:
    """What is to be there before anything is counted."""
    faulthandler.enable()
    warnings.simplefilter("ignore")  # of what is dropped unclosed, and of forks beside threads
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))

    async def nothing() -> None:
        await asyncio.to_thread(bool)

    asyncio.run(nothing())
    with gdsdirect.stream_files([__file__], bytearray(1 << 20)) as stream:
        for chunk in stream:
            chunk.release()


# ---- Many rounds, each in a process


@dataclass
class Seen:
    """All times that something of one kind was seen."""

    seconds: float
    seeds: list[int] = field(default_factory=list)


class Report:
    """What was wrong, by kind; each is printed when it is first seen."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.seen: dict[str, Seen] = {}
        self.rounds = 0
        self.turns: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, kind: str, seed: int, detail: str) -> None:
        with self._lock:
            seconds = time.monotonic() - self.begun
            if kind not in self.seen:
                print(f"{seconds:6.1f} s, seed {seed}: {kind}\n{_indented(detail)}", flush=True)
            self.seen.setdefault(kind, Seen(seconds)).seeds.append(seed)

    def end_round(self, turns: Counter[str]) -> None:
        with self._lock:
            self.rounds += 1
            self.turns.update(turns)

    def print(self) -> None:
        seconds = time.monotonic() - self.begun
        turns = ", ".join(f"{name} {count}" for name, count in self.turns.most_common())
        print(f"\n{self.rounds} rounds in {seconds:.0f} s; turns: {turns}")
        for kind, seen in sorted(self.seen.items(), key=lambda item: -len(set(item[1].seeds))):
            seeds = sorted(set(seen.seeds))
            some = ", ".join(map(str, seeds[:5]))
            print(f"{len(seeds):4} rounds, first after {seen.seconds:5.1f} s, seeds {some}: {kind}")
        if not self.seen:
            print("nothing was wrong")


def _indented(text: str) -> str:
    return "\n".join(f"        {line}" for line in text.strip().splitlines()[:150])


def _crash(status: int, stderr: str) -> str:
    """The kind of a crash: the signal, what glibc said, and the innermost functions."""
    said = re.search(r"^(.*(?:free|malloc|corrupt|stack smashing).*)$", stderr, re.MULTILINE)
    current = stderr.partition("Current thread")[2].partition("\n\n")[0]
    functions = re.findall(r" in (\S+)$", current, re.MULTILINE)[:2]
    name = signal.Signals(-status).name
    return " < ".join([f"{name}{f' ({said[1]})' if said else ''}", *functions])


def run_round(report: Report, folder: Path, seed: int, options: argparse.Namespace) -> None:
    """A round in a process of its own; what became of it goes into the report."""
    command = [sys.executable, __file__, "--one", str(seed), "--folder", str(folder)]
    command += ["--round-seconds", str(options.round_seconds), "--patience", str(options.patience)]
    environment = {**os.environ, "GDSDIRECT_CHAOS_SEED": str(seed)}
    limit = options.round_seconds + 2 * options.patience + 2 * _SETTLING
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler tells where it is
            stdout, stderr = process.communicate()
            report.add("the end of a round does not come", seed, stderr)
    judge_round(report, seed, process.returncode, stdout, stderr)


def judge_round(report: Report, seed: int, status: int, stdout: str, stderr: str) -> None:
    """What a round's output and exit status say."""
    still = ["all, and who looks for it"]  # nobody has the GIL, or gives it back
    turns: Counter[str] = Counter()
    for line in stdout.splitlines():
        try:
            said = json.loads(line)
        except ValueError:  # it ended in the midst of it
            report.add("what a round said is cut off", seed, line)
            continue
        if "kind" in said:
            report.add(said["kind"], seed, said["detail"])
        still = said.get("still", still)
        turns.update(said.get("turns", {}))
    report.end_round(turns)
    if status < 0:
        report.add(_crash(status, stderr), seed, stderr)
    elif "Timeout (" in stderr:
        report.add(f"HANG: {'; '.join(still[:3])}", seed, stderr)
    elif status not in (0, 3) or stderr:
        report.add(f"the round ended with status {status}", seed, stderr)


def run_rounds(folder: Path, options: argparse.Namespace) -> int:
    report = Report()
    seeds: Iterator[int] = iter(range(options.seed, sys.maxsize))
    lock = threading.Lock()

    def work() -> None:
        while time.monotonic() - report.begun < options.seconds:
            with lock:
                seed = next(seeds)
            run_round(report, folder, seed, options)

    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(work) for _ in range(options.jobs)]:
            done.result()
    report.print()
    return 1 if report.seen else 0


# ---- A long time


def resident() -> int:
    """Bytes of memory that this process has."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def has_grown(samples: Sequence[int]) -> bool:
    """Whether the last quarter of a time has more memory than the second, beyond the slack.

    The first is left out: caches, and the allocator's arenas, fill.
    """
    quarter = len(samples) // 4
    if quarter == 0:
        return False
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    return statistics.median(last) > statistics.median(second) + SLACK


def soak(folder: Path, options: argparse.Namespace) -> int:
    """Rounds in this interpreter, in which most kinds take part. Each ends with exact counts."""
    seconds, patience = options.round_seconds, options.patience
    how = Round(folder, seconds, patience, say_to_reader, often=1.6, orphans=0)
    end = time.monotonic() + 60 * options.soak
    samples: list[int] = []
    wrong: Counter[str] = Counter()
    seed = options.seed
    while time.monotonic() < end:
        print(f"seed {seed}", end=": ", flush=True)
        wrong += play(how, seed)
        samples.append(resident())
        now = Counts.now()
        print(
            f"{samples[-1] >> 20} MiB, {len(now.descriptors)} descriptors, {now.threads} threads, "
            f"{now.pinned} KiB pinned",
            flush=True,
        )
        seed += 1
    if has_grown(samples):
        wrong["memory grows"] += 1
    print(f"{len(samples)} rounds; wrong: {dict(wrong) or 'nothing'}")
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of all rounds together")
    parser.add_argument("--one", type=int, metavar="SEED", help="this round alone, here")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="rounds in one interpreter")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--round-seconds", type=float, default=3)
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds before it hangs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="rounds at a time")
    parser.add_argument("--folder", type=Path, help="where the files are already")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
            make_files(folder)
        if options.one is None and options.soak is None:
            return run_rounds(folder, options)
        prepare()
        if options.soak is not None:
            return soak(folder, options)
        say = say_to_reader if options.folder is None else say_to_parent
        how = Round(folder, options.round_seconds, options.patience, say)
        return 3 if play(how, options.one) else 0


if __name__ == "__main__":
    sys.exit(main())
