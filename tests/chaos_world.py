"""Chaos, the world: what actors share, and what each of them is."""

from __future__ import annotations

import itertools
import random
import re
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from chaos_checks import (
    REGION,
    Attempt,
    Closable,
    Course,
    Library,
    Part,
    Place,
    Region,
    Shown,
    WrongError,
    says_closed,
)
from chaos_rings import Case

import gdsdirect
from gdsdirect import File, GpuMappedBuffer


class Pulse:
    """Says that something gets on, and with what."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.beats = 0
        self.doing = "nothing"
        self.ended = False

    def beat(self, doing: str) -> None:
        self.beats += 1
        self.doing = doing


class World:
    """What all actors of a round share. Items of its lists are exchanged, never their number."""

    def __init__(
        self, folder: Path, patience: float, orphans: int, tell: Callable[[str, str], None]
    ) -> None:
        """`orphans` may be made at most. `tell` is told of what is wrong: its kind, and all."""
        self.most_orphans = orphans
        self.patience = patience
        self.library = Library(folder)
        self.tell = tell
        self.over = False
        self.readers = itertools.count()
        self.pulses: list[Pulse] = []
        self.turns: Counter[str] = Counter()
        self.places: list[Place] = []
        self.retired: deque[Place] = deque()
        self.files: list[File] = []
        self.cases: list[Case] = []
        self.streams: deque[Shown] = deque(maxlen=20)
        self.orphans = 0  # dropped with something in flight, which are kept for good

    def end(self) -> None:
        """No turn begins any more."""
        self.over = True

    def fault(self, error: BaseException, doing: str) -> None:
        """Tell of an exception that should not be."""
        if isinstance(error, WrongError):
            kind = str(error.args[0])
        else:
            text = re.sub(r"'[^']*'|\S*/\S*|0x[0-9a-f]+|\d+", "_", str(error))[:90]
            kind = f"{type(error).__name__}: {text} < {_innermost(error.__traceback__)}"
        self.tell(kind, f"while {doing}\n{''.join(traceback.format_exception(error))}")

    def open(self, number: int, *, direct: bool) -> File:
        """The file of this number, opened anew."""
        return gdsdirect.open(self.library.long[number % len(self.library.long)], direct=direct)

    def close(self) -> None:
        """Close what is shared; WrongError for a buffer that can't be."""
        while self.streams:
            self.streams.pop().close()
        for file in self.files:
            file.close()
        self.retired.extend(self.places)
        end = time.monotonic() + self.patience / 2  # reads that were given up come back
        while self.retired:
            place = self.retired.popleft()
            try:
                if not place.buffer.closed:
                    place.check()
                place.buffer.close()
            except BufferError as error:
                if time.monotonic() > end:
                    raise WrongError("a buffer that nobody uses can't be closed") from error
                self.retired.append(place)
                time.sleep(0.01)


def _innermost(trace: TracebackType | None) -> str:
    """The last function of the package in a traceback, or else of the actors."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    package = [code for code in codes if "gdsdirect" in Path(code.co_filename).parts]
    return (package or codes)[-1].co_qualname if codes else "?"


class Actor:
    """Takes turns until the world's time is over."""

    def __init__(self, world: World, name: str, seed: int) -> None:
        self.world = world
        self.name = f"{type(self).__name__} {name}"
        self.chance = random.Random(f"{seed} {self.name}")
        self.pulse = Pulse(self.name)
        self.using: list[Closable] = []  # in this turn: others may close it
        self._last: Place | None = None
        world.pulses.append(self.pulse)

    def run(self) -> None:
        """All turns, in whatever thread."""
        try:
            while not self.world.over:
                self.guarded(self.turn)
            self.guarded(self.finish)
        finally:
            self.pulse.ended = True

    def guarded(self, act: Callable[[], object]) -> None:
        """Whatever comes out of it is wrong, unless it says that something was closed, and is."""
        self.world.turns[type(self).__name__] += 1
        self.using = []
        try:
            act()
        except Exception as error:
            self.judge(error)

    def judge(self, error: Exception) -> None:
        if not says_closed(error, self.using):
            self.world.fault(error, f"{self.name}: {self.pulse.doing}")

    def turn(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """After the last turn."""

    def pause(self, most: float) -> None:
        self.pulse.beat("a pause")
        time.sleep(self.chance.random() * most)

    # ---- What to read

    def file(self) -> File:
        """One that others use, and close."""
        file = self.chance.choice(self.world.files)
        self.using.append(file)
        return file

    def range(self, path: str, most: int) -> tuple[int, int]:
        """Offset and size, of whole blocks or any."""
        have, chance = len(self.world.library.bytes[path]), self.chance
        grain = chance.choice((4096, 4096, 512, 1))
        size = min(have, most, chance.choice((1, 100, 4096, 5000, 16384, most)))
        size -= size % grain if size >= grain else 0
        offset = chance.randrange(have - size + 1)
        return offset - (offset % grain if size >= grain else 0), size

    def attempt(self, reader: int) -> Attempt:
        """A read into this reader's region of one of the buffers that all use.

        Often of the same as before, if that was given up: it may be under way still.
        """
        place = self.chance.choice(self.world.places)
        if self._last is not None and self._last.regions[reader].expected is None:
            place = self.chance.choice((self._last, self._last, place))
        self._last = place
        region = place.regions[reader]
        self.using.append(region.buffer)
        region.settle(self.world.library)
        file = self.file()
        return Attempt(self.world.library, file, region, self._parts(file.path, region))

    def _parts(self, path: str, region: Region) -> list[Part]:
        """The parts of a read: one anywhere in the region, or several in a row from its start."""
        if self.chance.random() < 0.7:
            offset, size = self.range(path, REGION)
            room = REGION - size
            anywhere = self.chance.random() < 0.3
            skip = self.chance.randrange(room + 1) if anywhere else min(offset % 4096, room)
            return [Part(offset, size, region.start + skip)]
        parts: list[Part] = []
        at = region.start
        while at + 8192 <= region.start + REGION and len(parts) < 20:
            offset, size = self.range(path, 8192)
            parts.append(Part(offset, size, at))
            at += -(-size // 4096) * 4096
        return parts

    def stream(self) -> tuple[Shown, Course]:
        """A stream of a file or of many, and what it is to bring; to be closed."""
        chance, library = self.chance, self.world.library
        nbytes = chance.choice((64 << 10, 256 << 10, 1 << 20))
        plain = chance.random() < 0.3
        buffer = bytearray(nbytes) if plain else GpuMappedBuffer.from_host_visible(nbytes)
        chunk_size = chance.choice((1000, 4096, 5000, 16384))
        if chance.random() < 0.5:
            file = self.file()
            offset, size = self.range(file.path, 300_000)
            stream = file.stream(buffer, chunk_size=chunk_size, offset=offset, size=size)
            course = Course(library, [(file.path, offset, size)])
        else:
            paths = [chance.choice(library.paths[:7]) for _ in range(chance.choice((1, 20, 100)))]
            direct = chance.random() < 0.5
            stream = gdsdirect.stream_files(paths, buffer, chunk_size=chunk_size, direct=direct)
            course = Course(library, [(path, 0, len(library.bytes[path])) for path in paths])
        shown = Shown(stream)
        self.using.append(shown)
        self.world.streams.append(shown)
        return shown, course

    def shown(self) -> Shown | None:
        """A stream that others read, if there is one."""
        shown = self.chance.choice((*self.world.streams, None))
        if shown is not None:
            self.using.append(shown)
        return shown

    def new_case(self) -> Case:
        """A ring for others to use."""
        return Case(self.world.library, self.chance, lambda: self.world.over)

    def case(self) -> Case:
        """A ring that others use, and close."""
        case = self.chance.choice(self.world.cases)
        self.using.append(case)
        return case
