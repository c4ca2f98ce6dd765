"""Supply: what a stream reads next, as loads of one chunk or many, each into slots of a buffer."""

from __future__ import annotations

import itertools
import os
from array import array
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from gdsdirect.errors import ring_module
from gdsdirect.origin import Origin
from gdsdirect.plan import Range
from gdsdirect.shared_ring import Requests, SharedRing
from gdsdirect.stream import DataPath
from gdsdirect.transfer import PIECE, Transfer, to_the_end

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from gdsdirect._uring_cmd import Source

GRAIN = 4096  # bytes; slots begin and end at multiples of it, as almost all direct reads may
BATCH = 32  # small files read in one batch, at most
_OPENS = 256  # files opened in one batch

Landed = tuple[int, int, int, str, int, DataPath, "str | None"]
"""A chunk to be: slot, where in it the bytes begin, how many, file, offset, way, why."""

Loaded = list["Landed | Failed"]

Failed = tuple[int, Exception]
"""A slot without a chunk, and why; told when it is its turn."""


class Load(Protocol):
    """Some chunks that are read together."""

    slots: list[int]
    nbytes: int
    error: Exception | None
    """Of all of them; told when it is this load's turn."""

    @property
    def landed(self) -> Loaded:
        """What came, once it is finished."""

    def finish(self) -> None:
        """Wait for all of it."""

    async def finish_async(self) -> None:
        """The same, while other tasks run."""

    def close(self) -> None:
        """Give up what is in flight."""


class RingLoad:
    """Read by a ring: on its way once it is made."""

    def __init__(
        self, steps: Generator[Requests, None, Loaded], slots: list[int], nbytes: int
    ) -> None:
        self._steps = steps
        self._requests: Requests | None = None
        self.slots = slots
        self.nbytes = nbytes
        self.landed: Loaded = []
        self.error: Exception | None = None
        self._advance()

    def _advance(self) -> None:
        """Take the next step; after the last one there are no requests."""
        self._requests = None
        try:
            requests = next(self._steps)
            requests[0].ring._start(requests)
            self._requests = requests
        except StopIteration as stop:
            self.landed = stop.value
        except Exception as error:
            self.error = error

    def finish(self) -> None:
        while self._requests is not None:
            self._requests[0].ring._carry_out(self._requests, None)
            self._advance()

    async def finish_async(self) -> None:
        while self._requests is not None:
            await self._requests[0].ring.carry_out(self._requests)
            self._advance()

    def close(self) -> None:
        requests, self._requests = self._requests, None
        if requests is not None:
            for request in requests:
                request.give_up()
            requests[0].ring._carry_out(requests, None)
        self._steps.close()


class CopyLoad:
    """Copied from the page cache by a thread of `workers`, beside the consumer and other loads.

    Whoever submits a read of what is there copies it too: a ring doesn't make that any faster, a
    second processor does, and an event loop had better not be the one.
    """

    def __init__(
        self, workers: Executor, copy: Callable[[], Loaded], slots: list[int], nbytes: int
    ) -> None:
        self._future = workers.submit(copy)
        self.slots = slots
        self.nbytes = nbytes
        self.error: Exception | None = None

    @property
    def landed(self) -> Loaded:
        return self._future.result()

    def finish(self) -> None:
        from concurrent.futures import wait

        wait((self._future,))

    async def finish_async(self) -> None:
        import asyncio

        await asyncio.wait((asyncio.wrap_future(self._future),))

    def close(self) -> None:
        if not self._future.cancel():
            self.finish()


class Supply(Protocol):
    """Where loads come from."""

    total: int | None
    """Bytes in all; None where nobody knows."""

    @property
    def hungry(self) -> bool:
        """Whether `open` has something to do."""

    @property
    def exhausted(self) -> bool:
        """Whether there are no more loads."""

    def open(self) -> None:
        """Make ready what the next loads are of. This may block."""

    def load(self, ring: SharedRing, free: deque[int]) -> Load | None:
        """The next load, into slots that it takes from `free`; None: nothing, for now."""


class OneFile:
    """The chunks of one origin; there is nothing to open."""

    hungry = False

    def __init__(
        self,
        origin: Origin,
        whole: Range,
        chunk_size: int,
        require: Collection[DataPath] | None,
        *,
        even_if_empty: bool = False,
    ) -> None:
        self.total: int | None = whole.size
        self._origin = origin
        self._offset, self._end = whole.offset, whole.offset + whole.size
        self._chunk_size = chunk_size
        self._require = require
        self._once = even_if_empty

    @property
    def exhausted(self) -> bool:
        return self._offset >= self._end and not self._once

    def open(self) -> None: ...

    def load(self, ring: SharedRing, free: deque[int]) -> Load | None:
        if self.exhausted:
            return None
        count = min(len(free), BATCH) if self._is_plain(ring) else 1
        parts: list[Range] = []
        while len(parts) < count and not self.exhausted:
            size = min(self._chunk_size, self._end - self._offset)
            parts.append(Range(self._offset, size, free.pop()))
            self._offset += size
            self._once = False
        steps = self._read_all(ring, parts) if count > 1 else self._read(ring, *parts[0])
        return RingLoad(steps, [part.target for part in parts], sum(part.size for part in parts))

    def _is_plain(self, ring: SharedRing) -> bool:
        """Whether each chunk is one read of whole blocks, by a way that needs no choice."""
        origin = self._origin
        if origin.namespace is not None or origin.extents is not None or self._once:
            return False
        return (
            (self._offset | self._chunk_size) % GRAIN == 0
            and self._chunk_size <= PIECE
            and origin.alignment <= GRAIN
            and origin.unmapped is None
            and (self._require is None or self._way(ring) in self._require)
        )

    def _way(self, ring: SharedRing) -> DataPath:
        return _way(ring, self._origin.undirected is None)

    def _read_all(self, ring: SharedRing, parts: list[Range]) -> Generator[Requests, None, Loaded]:
        origin, way = self._origin, self._way(ring)
        grain = 1 if way is DataPath.BUFFERED else GRAIN
        arrays = (
            array("Q", [part.offset for part in parts]),
            array("I", [part.size + -part.size % grain for part in parts]),
            array("Q", [part.target for part in parts]),
        )
        request = ring.reads(origin.source, arrays, fixed=ring.registered)
        yield (request,)
        why = origin.undirected or ring.unregistered
        landed: Loaded = []
        short = {index: nbytes for index, _, nbytes in request.take()}
        for index, part in enumerate(parts):
            offset, size, slot = part
            if short.get(index, size) >= size:
                landed.append((slot, 0, size, origin.path, offset, way, why))
                continue
            try:
                landed += yield from self._read(ring, *part)
            except (OSError, ValueError) as error:
                landed.append((slot, error))
        return landed

    def _read(
        self, ring: SharedRing, offset: int, size: int, slot: int
    ) -> Generator[Requests, None, Loaded]:
        whole_blocks = self._origin.alignment <= GRAIN
        begin = offset % self._origin.alignment if whole_blocks else 0
        transfer = Transfer(self._origin, ring, self._require)
        wanted = Range(offset - begin, size + begin, slot)
        result = yield from transfer.read(wanted, overrun=whole_blocks)
        there = max(0, result.nbytes - begin)
        if there == 0 and size > 0:  # the file was cut off before
            return []
        return [(slot, begin, there, self._origin.path, offset, result.path, result.why)]


_Opened = tuple[str, "Source | None", int]
"""A path, its file and the file's size; None and 0 where it is to be opened by itself."""


class ManyFiles:
    """The chunks of many files, of which small ones are opened and read in batches."""

    total: int | None = None

    def __init__(
        self,
        paths: Iterable[str | bytes | os.PathLike[str] | os.PathLike[bytes]],
        chunk_size: int,
        require: Collection[DataPath] | None,
        *,
        direct: bool,
    ) -> None:
        # Not at import time: with its logging it takes as long as all that is gdsdirect's own.
        from concurrent.futures import ThreadPoolExecutor

        self._paths = map(os.fsdecode, paths)
        self._chunk_size = chunk_size
        self._require = require
        self._direct = direct
        self._opened: deque[_Opened] = deque()
        self._large: OneFile | None = None
        self._more = True
        self._workers = ThreadPoolExecutor(_processors())
        self._opening: Future[list[_Opened]] | None = None

    @property
    def hungry(self) -> bool:
        return self._more and not self._opened

    @property
    def exhausted(self) -> bool:
        return not (self._more or self._opened or self._large)

    def open(self) -> None:
        opening, self._opening = self._opening or self._open_next(), None
        opened = opening.result()
        self._opened.extend(opened)
        self._more = len(opened) == _OPENS
        if self._more:
            self._opening = self._open_next()  # while these are read

    def _open_next(self) -> Future[list[_Opened]]:
        paths = list(itertools.islice(self._paths, _OPENS))
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self._direct else 0)
        return self._workers.submit(ring_module().open_sources, paths, flags)

    def load(self, ring: SharedRing, free: deque[int]) -> Load | None:
        if self._large is not None:
            load = self._large.load(ring, free)
            if self._large.exhausted:
                self._large = None
            return load
        if not self._opened:
            return None
        way = _way(ring, self._direct)
        if self._require is None or way in self._require:
            some = self._batch(min(BATCH, len(free)))
            if some:
                slots = [free.pop() for _ in some]
                nbytes = sum(size for _, _, size in some)
                if not self._direct:
                    copy = partial(self._copy, ring, some, slots)
                    return CopyLoad(self._workers, copy, slots, nbytes)
                return RingLoad(self._read(ring, way, some, slots), slots, nbytes)
        try:
            self._large = self._alone(self._opened.popleft()[0])
        except (OSError, ValueError) as error:
            return RingLoad(_raise(error), [], 0)
        return self.load(ring, free)

    def _batch(self, most: int) -> list[_Opened]:
        """The next files, as far as there is nothing special about them."""
        some: list[_Opened] = []
        while self._opened and len(some) < most:
            _, source, size = self._opened[0]
            if source is None or source.direct != self._direct or not 0 < size <= self._chunk_size:
                break
            some.append(self._opened.popleft())
        return some

    def _alone(self, path: str) -> OneFile:
        origin = Origin(path, direct=self._direct)
        whole = Range(0, origin.size, 0)
        return OneFile(origin, whole, self._chunk_size, self._require, even_if_empty=True)

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

    def _copy(self, ring: SharedRing, some: list[_Opened], slots: list[int]) -> Loaded:
        memory = ring.buffer
        ring._wait_until_free(memory.address, memory.nbytes)
        sizes = tuple(size for _, _, size in some)
        came = ring_module().read_sources(memory, _sources(some), sizes, tuple(slots))
        landed = _landed(some, slots, DataPath.BUFFERED, "it was opened with direct=False")
        for index, (nbytes, size) in enumerate(zip(came, sizes, strict=True)):
            if nbytes < size:
                landed[index] = to_the_end(self._again(ring, some[index], slots[index]))
        return landed

    def _again(
        self, ring: SharedRing, opened: _Opened, slot: int
    ) -> Generator[Requests, None, Landed | Failed]:
        """A file that was cut off meanwhile, or refused."""
        path, source, size = opened
        try:
            origin = Origin(path, direct=self._direct, opened=source)
            transfer = Transfer(origin, ring, self._require)
            result = yield from transfer.read(Range(0, size, slot))
        except (OSError, ValueError) as error:
            return slot, error
        return slot, 0, result.nbytes, path, 0, result.path, result.why


def _sources(some: list[_Opened]) -> tuple[Source, ...]:
    return tuple(source for _, source, _ in some if source is not None)


def _landed(some: list[_Opened], slots: list[int], way: DataPath, why: str | None) -> Loaded:
    """Chunks of whole files, all of which went one way."""
    return [
        (slot, 0, size, path, 0, way, why)
        for slot, (path, _, size) in zip(slots, some, strict=True)
    ]


def _way(ring: SharedRing, direct: bool) -> DataPath:
    """The way of a batch."""
    if not direct:
        return DataPath.BUFFERED
    return DataPath.FILE_FIXED if ring.registered else DataPath.FILE_DIRECT


def _processors() -> int:
    """That copy at a time: more than some don't make memory faster."""
    return min(4, len(os.sched_getaffinity(0)))


def _raise(error: Exception) -> Generator[Requests, None, Loaded]:
    raise error
    yield
