"""Supply: what a stream reads next, as loads of one chunk or many, each into slots of a buffer.

A load is made from the place where the one before it ends. Making one changes nothing; the stream
goes on by keeping it. So an exception can come anywhere: the load that it left undone is made once
more, from the same place.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from array import array
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gdsdirect.errors import ring_module
from gdsdirect.origin import Origin
from gdsdirect.plan import Range
from gdsdirect.shared_ring import Requests, SharedRing
from gdsdirect.stream import DataPath
from gdsdirect.transfer import PIECE, Transfer, to_the_end, to_the_end_async

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from gdsdirect._uring_cmd import Job, Slots, Source, Turn

GRAIN = 4096  # bytes; slots begin and end at multiples of it, as almost all direct reads may
BATCH = 32  # small files read in one batch, at most
CLOSED = "the stream is closed"
_OPENS = 256  # files opened in one batch


class Landed(NamedTuple):
    """A chunk to be: its slot's offset, where in that its bytes begin, and what a Chunk tells."""

    slot: int
    begin: int
    nbytes: int
    file: str
    offset: int
    path: DataPath
    why: str | None


Loaded = Sequence["Landed | Exception"]
"""What a load brings, in order: an exception has the turn of the chunk that it is of."""

Place = tuple[int, int]
"""Where in a supply a load begins: the file's number, and the byte in it."""


class Load(Protocol):
    """Some chunks that are read together."""

    slots: Sequence[int]
    """The offsets of those that it reads into."""
    nbytes: int
    after: Place
    """Where the next load begins."""

    def start(self) -> None:
        """Have it under way, if it isn't. What fails is told by `finish`."""

    def finish(self) -> Loaded:
        """Wait for all of it. As often as it takes: after an exception it is read anew."""

    async def finish_async(self) -> Loaded:
        """The same, while other tasks run."""

    def close(self) -> None:
        """Give up what is in flight, and wait until it is back."""

    async def close_async(self) -> None:
        """The same, while other tasks run."""


class RingLoad:
    """Read by a ring, in the steps that `make` makes.

    Several tasks may wait for it: each waits for the requests of the step that it is at, and the
    first to see them finished takes the next step.
    """

    def __init__(
        self,
        make: Callable[[], Generator[Requests, None, Loaded]],
        slots: list[int],
        nbytes: int,
        after: Place,
    ) -> None:
        self._make = make
        self._begun: tuple[Generator[Requests, None, Loaded], Requests] | None = None
        self._loaded: Loaded | None = None
        self._closed = False
        self.slots: Sequence[int] = slots
        self.nbytes = nbytes
        self.after = after

    def _advance(self, begun: tuple[Generator[Requests, None, Loaded], Requests] | None) -> None:
        """Take the first step, or the one behind `begun`, unless another task has taken it."""
        if self._closed:
            raise ValueError(CLOSED)
        if self._begun is not begun or self._loaded is not None:
            return
        # An exception ends the steps. They then begin anew.
        self._begun = None
        steps = begun[0] if begun is not None else self._make()
        try:
            requests = next(steps)
        except StopIteration as stop:
            self._loaded = stop.value
            return
        requests[0].ring._start(requests)
        self._begun = steps, requests

    def start(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it comes again when it is this load's turn
            self._advance(None)

    def finish(self) -> Loaded:
        while self._loaded is None:
            begun = self._begun
            if begun is not None:
                begun[1][0].ring._carry_out(begun[1], None, False)
            self._advance(begun)
        return self._loaded

    async def finish_async(self) -> Loaded:
        while self._loaded is None:
            begun = self._begun
            if begun is not None:
                await begun[1][0].ring.finish(begun[1])
            self._advance(begun)
        return self._loaded

    def _give_up(self) -> Requests:
        self._closed = True
        requests = self._begun[1] if self._begun is not None else ()
        for request in requests:
            request.give_up()
        return requests

    def close(self) -> None:
        requests = self._give_up()
        if requests:
            requests[0].ring._carry_out(requests, None)

    async def close_async(self) -> None:
        requests = self._give_up()
        if requests:
            await requests[0].ring.finish(requests)


class CopyLoad:
    """A thread of its own copies it from the page cache, beside the consumer and other loads.

    A second processor makes that faster. A ring doesn't: the thread that submits a read of cached
    bytes copies them too, and it must not be an event loop's. The end of a load waits for its job.
    """

    def __init__(
        self,
        ring: SharedRing,
        copy: Callable[[], Job[list[int]]],
        land: Callable[[list[int]], Generator[Requests, None, Loaded]],
        slots: list[int],
        nbytes: int,
        after: Place,
    ) -> None:
        """`land` makes of the bytes of each file, or -errno, what the load brings."""
        self._ring = ring
        self._copy = copy
        self._land = land
        self._job: Job[list[int]] | None = None
        self._closed = False
        self.slots: Sequence[int] = slots
        self.nbytes = nbytes
        self.after = after

    def start(self) -> None:
        if self._job is None and self._ring._in_the_way() is None:
            self._job = self._copy()

    def _started(self) -> Job[list[int]]:
        if self._closed:
            raise ValueError(CLOSED)
        job = self._job
        if job is None:
            self._ring._clear_the_way()
            job = self._job = self._copy()
        return job

    def finish(self) -> Loaded:
        return to_the_end(self._land(self._started().result()))

    async def finish_async(self) -> Loaded:
        while self._job is None and (busy := self._ring._in_the_way()) is not None:
            await busy._anything_new()
        job = self._started()
        await arrival(job)
        if self._closed:
            raise ValueError(CLOSED)
        return await to_the_end_async(self._land(job.result()))

    def close(self) -> None:
        self._closed = True
        if self._job is not None:
            # Who waits for it may hold it, and what comes next may read into the same memory.
            self._job.end()

    async def close_async(self) -> None:
        self._closed = True
        if self._job is not None:
            self._job.drop()
            await arrival(self._job)


class FailedLoad:
    """No chunk, but an error that has its turn."""

    nbytes = 0

    def __init__(self, error: Exception, after: Place) -> None:
        self._error = error
        self.slots: Sequence[int] = ()
        self.after = after

    def start(self) -> None: ...

    def finish(self) -> Loaded:
        return [self._error]

    async def finish_async(self) -> Loaded:
        return [self._error]

    def close(self) -> None: ...

    async def close_async(self) -> None: ...


class Supply(Protocol):
    """Where loads come from."""

    total: int | None
    """Bytes in all; None where nobody knows."""

    first: Place
    """Where the first load begins."""

    def is_open(self, place: Place) -> bool:
        """Whether the next load can be made without a wait."""

    def is_coming(self, place: Place) -> bool:
        """Whether it is to be opened, and that without a wait."""

    def opening(self, place: Place) -> Job[Any] | None:
        """What `open` would wait for, begun; None: nothing."""

    def open(self, place: Place) -> None:
        """Make ready what the next loads are of. This may block."""

    def exhausted(self, place: Place) -> bool:
        """Whether there are no more loads, as far as what is open tells."""

    def load(self, place: Place, ring: SharedRing, slots: Slots) -> Load | None:
        """The load that begins there; None: nothing, for now."""

    def close(self) -> None:
        """Nothing is asked for any more."""


class OneFile:
    """The chunks of one origin; there is nothing to open."""

    def __init__(
        self,
        origin: Origin,
        whole: Range,
        chunk_size: int,
        require: Collection[DataPath] | None,
        *,
        number: int = 0,
        even_if_empty: bool = False,
    ) -> None:
        """`number` is that of the file among others, whose places have it."""
        self.total: int | None = whole.size
        self._origin = origin
        self._begin, self._end = whole.offset, whole.offset + whole.size
        self._chunk_size = chunk_size
        self._require = require
        self._number = number
        self._one_if_empty = even_if_empty and not whole.size
        self.first: Place = (number, whole.offset)

    def is_open(self, place: Place) -> bool:
        return True

    def is_coming(self, place: Place) -> bool:
        return False

    def opening(self, place: Place) -> None: ...

    def open(self, place: Place) -> None: ...

    def exhausted(self, place: Place) -> bool:
        return place[0] != self._number or (place[1] >= self._end and not self._one_if_empty)

    def load(self, place: Place, ring: SharedRing, slots: Slots) -> Load | None:
        if self.exhausted(place):
            return None
        plain = self._is_plain(ring)
        taken = slots.peek(BATCH if plain else 1)
        offset = place[1]
        parts: list[tuple[Range, int]] = []
        for slot in taken:
            if parts and offset >= self._end:
                break
            size = min(self._chunk_size, self._end - offset)
            parts.append((Range(offset, size, slot), slot))
            offset += size
        if not parts:
            return None
        after = (self._number, offset) if offset < self._end else (self._number + 1, 0)
        make = partial(self._read_all if plain else self._read_one, ring, parts)
        nbytes = sum(part.size for part, _ in parts)
        return RingLoad(make, [slot for _, slot in parts], nbytes, after)

    def close(self) -> None: ...

    def _is_plain(self, ring: SharedRing) -> bool:
        """Whether each chunk is one read of whole blocks, by a way that needs no choice."""
        origin = self._origin
        if origin.namespace is not None or origin.extents is not None or self._one_if_empty:
            return False
        return (
            (self._begin | self._chunk_size) % GRAIN == 0
            and self._chunk_size <= PIECE
            and origin.alignment <= GRAIN
            and origin.unmapped is None
            and (self._require is None or self._way(ring) in self._require)
        )

    def _way(self, ring: SharedRing) -> DataPath:
        return _way(ring, self._origin.undirected is None)

    def _read_all(
        self, ring: SharedRing, parts: list[tuple[Range, int]]
    ) -> Generator[Requests, None, Loaded]:
        origin, way = self._origin, self._way(ring)
        grain = 1 if way is DataPath.BUFFERED else GRAIN
        arrays = (
            array("Q", [part.offset for part, _ in parts]),
            array("I", [part.size + -part.size % grain for part, _ in parts]),
            array("Q", [part.target for part, _ in parts]),
        )
        request = ring.reads(origin.source, arrays, fixed=ring.registered)
        yield (request,)
        why = origin.undirected or ring.unregistered
        short = {index: nbytes for index, _, nbytes in request.take()}
        landed: list[Landed | Exception] = []
        for index, (part, slot) in enumerate(parts):
            offset, size, _ = part
            if short.get(index, size) >= size:
                landed.append(Landed(slot, 0, size, origin.path, offset, way, why))
                continue
            try:
                landed += yield from self._read(ring, part, slot)
            except (OSError, ValueError) as error:
                landed.append(error)
        return landed

    def _read_one(
        self, ring: SharedRing, parts: list[tuple[Range, int]]
    ) -> Generator[Requests, None, Loaded]:
        try:
            return (yield from self._read(ring, *parts[0]))
        except (OSError, ValueError) as error:
            return [error]

    def _read(
        self, ring: SharedRing, part: Range, slot: int
    ) -> Generator[Requests, None, list[Landed]]:
        offset, size, target = part
        whole_blocks = self._origin.alignment <= GRAIN
        begin = offset % self._origin.alignment if whole_blocks else 0
        transfer = Transfer(self._origin, ring, self._require)
        wanted = Range(offset - begin, size + begin, target)
        result = yield from transfer.read(wanted, overrun=whole_blocks)
        there = max(0, result.nbytes - begin)
        if there == 0 and size > 0:  # the file was cut off before
            return []
        return [Landed(slot, begin, there, self._origin.path, offset, result.path, result.why)]


_Opened = tuple[str, "Source | None", int]
"""A path, its file and the file's size; None and 0 where it is to be opened by itself."""


class ManyFiles:
    """The chunks of many files, of which small ones are opened and read in batches."""

    total: int | None = None
    first: Place = (0, 0)

    def __init__(
        self,
        paths: Iterable[str | bytes | os.PathLike[str] | os.PathLike[bytes]],
        chunk_size: int,
        require: Collection[DataPath] | None,
        *,
        direct: bool,
    ) -> None:
        self._coming = iter(paths)
        # Those that have come, as they are: a file's number is its index here.
        self._paths: list[str | bytes | os.PathLike[str] | os.PathLike[bytes]] = []
        self._ended = self._closed = False
        self._turn: Turn = ring_module().Turn()
        self._chunk_size = chunk_size
        self._require = require
        self._direct = direct
        self._opening: dict[int, Job[list[_Opened]]] = {}  # by the number of the first
        self._opened: dict[int, list[_Opened]] = {}  # the same, once somebody waited for it
        self._large: dict[int, OneFile] = {}  # those that are read by themselves

    def is_open(self, place: Place) -> bool:
        return self._batch_of(place) in self._opened or self.exhausted(place)

    def is_coming(self, place: Place) -> bool:
        if self.is_open(place):
            return False
        opening = self._opening.get(self._batch_of(place))
        return opening is not None and opening.done

    def opening(self, place: Place) -> Job[list[_Opened]]:
        return self._turn.run(self._open_batch, self._batch_of(place))

    def open(self, place: Place) -> None:
        self._turn.run(self._open, place)

    def _open(self, place: Place) -> None:
        first = self._batch_of(place)
        if first not in self._opened:
            opening = self._open_batch(first)
            self._open_batch(first + _OPENS)  # while these are read
            self._opened[first] = opening.result()
        # Loads have what they need of those before.
        for by_number in (self._opening, self._opened, self._large):
            for before in [number for number in by_number if number < first]:
                del by_number[before]

    @staticmethod
    def _batch_of(place: Place) -> int:
        return place[0] // _OPENS * _OPENS

    def _open_batch(self, first: int) -> Job[list[_Opened]]:
        if self._closed:
            raise ValueError(CLOSED)
        end = first + _OPENS
        if len(self._paths) < end and not self._ended:
            # In one step, so that no path is lost; paths that came before an exception stay.
            self._paths.extend(itertools.islice(self._coming, end - len(self._paths)))
            self._ended = len(self._paths) < end
        if first not in self._opening:
            paths = list(map(os.fsdecode, self._paths[first:end]))
            flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self._direct else 0)
            self._opening[first] = ring_module().open_sources(paths, flags)
        return self._opening[first]

    def exhausted(self, place: Place) -> bool:
        return self._ended and place[0] >= len(self._paths)

    def load(self, place: Place, ring: SharedRing, slots: Slots) -> Load | None:
        number, offset = place
        opened = self._opened.get(self._batch_of(place))
        if opened is None or self.exhausted(place):
            return None
        way = _way(ring, self._direct)
        if offset == 0 and (self._require is None or way in self._require):
            taken = slots.peek(BATCH)
            some = self._small(opened[number % _OPENS :][: len(taken)])
            if some:
                return self._load_small(number, ring, way, some, taken[: len(some)])
        try:
            large = self._alone(number)
        except (OSError, ValueError) as error:
            return FailedLoad(error, (number + 1, 0))
        return large.load(place, ring, slots)

    def _small(self, opened: list[_Opened]) -> list[_Opened]:
        """The next files, as far as there is nothing special about them."""
        return list(itertools.takewhile(self._is_small, opened))

    def _is_small(self, opened: _Opened) -> bool:
        _, source, size = opened
        return source is not None and source.direct == self._direct and 0 < size <= self._chunk_size

    def _load_small(
        self, number: int, ring: SharedRing, way: DataPath, some: list[_Opened], slots: list[int]
    ) -> Load:
        nbytes = sum(size for _, _, size in some)
        after = (number + len(some), 0)
        if not self._direct:
            copy = partial(self._copy, ring, some, slots)
            return CopyLoad(
                ring, copy, partial(self._copied, ring, some, slots), slots, nbytes, after
            )
        return RingLoad(partial(self._read, ring, way, some, slots), slots, nbytes, after)

    def _alone(self, number: int) -> OneFile:
        found = self._large.get(number)
        if found is None:
            origin = Origin(os.fsdecode(self._paths[number]), direct=self._direct)
            whole = Range(0, origin.size, 0)
            found = self._large[number] = OneFile(
                origin, whole, self._chunk_size, self._require, number=number, even_if_empty=True
            )
        return found

    def _read(
        self, ring: SharedRing, way: DataPath, some: list[_Opened], slots: list[int]
    ) -> Generator[Requests, None, Loaded]:
        sizes = [size for _, _, size in some]
        arrays = (
            array("Q", bytes(8 * len(some))),
            array("I", [size + -size % GRAIN for size in sizes]),
            array("Q", slots),
        )
        request = ring.files(_sources(some), arrays, fixed=ring.registered)
        yield (request,)
        landed = _landed(some, slots, way, ring.unregistered)
        for index, _, nbytes in request.take():
            if nbytes < sizes[index]:
                landed[index] = yield from self._again(ring, some[index], slots[index])
        return landed

    @staticmethod
    def _copy(ring: SharedRing, some: list[_Opened], slots: list[int]) -> Job[list[int]]:
        job: Job[list[int]] = ring_module().read_sources(
            ring.buffer,
            _sources(some),
            tuple(size for _, _, size in some),
            tuple(slots),
        )
        return job

    def _copied(
        self, ring: SharedRing, some: list[_Opened], slots: list[int], came: list[int]
    ) -> Generator[Requests, None, Loaded]:
        landed = _landed(some, slots, DataPath.BUFFERED, "it was opened with direct=False")
        for index, (nbytes, (_, _, size)) in enumerate(zip(came, some, strict=True)):
            if nbytes < size:
                landed[index] = yield from self._again(ring, some[index], slots[index])
        return landed

    def _again(
        self, ring: SharedRing, opened: _Opened, slot: int
    ) -> Generator[Requests, None, Landed | Exception]:
        """A file that was cut off meanwhile, or refused."""
        path, source, size = opened
        try:
            origin = Origin(path, direct=self._direct, opened=source)
            transfer = Transfer(origin, ring, self._require)
            result = yield from transfer.read(Range(0, size, slot))
        except (OSError, ValueError) as error:
            return error
        return Landed(slot, 0, result.nbytes, path, 0, result.path, result.why)

    def close(self) -> None:
        self._turn.run(self._close)

    def _close(self) -> None:
        self._closed = True
        for held in (self._opening, self._opened, self._large):
            held.clear()


async def arrival(job: Job[Any]) -> None:
    """Until the job is done, while other tasks run; any number of them may wait for it."""
    import asyncio

    loop = asyncio.get_running_loop()
    while not job.done:
        # A descriptor has one reader in a loop: that of the last to wait wakes them all.
        waiting = job.waiting
        done = loop.create_future()
        waiting.append(done)
        loop.add_reader(job.fileno(), _wake_all, loop, job)
        await done


def _wake_all(loop: AbstractEventLoop, job: Job[Any]) -> None:
    for future in job.waiting:
        if not future.done():
            future.set_result(None)
    loop.remove_reader(job.fileno())  # last: after an exception the loop calls once more


def _sources(some: list[_Opened]) -> tuple[Source, ...]:
    return tuple(source for _, source, _ in some if source is not None)


def _landed(
    some: list[_Opened], slots: list[int], way: DataPath, why: str | None
) -> list[Landed | Exception]:
    """Chunks of whole files, all of which went one way."""
    return [
        Landed(slot, 0, size, path, 0, way, why)
        for slot, (path, _, size) in zip(slots, some, strict=True)
    ]


def _way(ring: SharedRing, direct: bool) -> DataPath:
    """The way of a batch."""
    if not direct:
        return DataPath.BUFFERED
    return DataPath.FILE_FIXED if ring.registered else DataPath.FILE_DIRECT
