"""Lane: a ring over a buffer that any number of transfers share.

A transfer starts requests, each some reads of one source, and waits for them. Reads go out in turn
as the ring has room, and each completion is handed to the request it belongs to, whoever takes it
from the ring. A lane belongs either to threads, of which one at a time waits in the kernel, or to
one event loop, which is told by the ring's descriptor.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING
from weakref import ref

from gdsdirect.memory import GpuMappedBuffer, MemoryKind
from gdsdirect.plan import SLOT
from gdsdirect.stream import COMPLETION_FORMAT, AsyncUringStream

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from gdsdirect._uring_cmd import Source
    from gdsdirect.namespace import Namespace

_DEPTH = 128
_TURN = 16  # reads of one request that go out before it is another's turn
_PATIENCE = 0.02  # seconds that several completions are waited for at once

_SLOTS = 32

# Registering touches all pages first, and a read touches those of its own while others are on their
# way: of new memory that is a tenth of the time.
_ONCE = "memory that is read into once is not registered"

_RECORD = struct.Struct("=" + COMPLETION_FORMAT)
_INDEX_BITS = 32  # of user_data: the read in its request; above them the request's number

Arrays = tuple["array[int]", "array[int]", "array[int]"]
"""Of n reads: positions in the source, sizes ("I"), and targets in the buffer, in bytes."""


class Request:
    """Reads of one source, on their way together, until `left` of them is 0.

    `short` tells of each that was not whole the kernel's result and the bytes that came. Where not
    all of them could even be submitted, `error` says why.
    """

    __slots__ = (
        *("abandoned", "error", "lane", "left", "number", "one_size", "sent", "short", "sizes"),
        *("total", "wakes"),
    )

    def __init__(self, lane: Lane, sizes: array[int]) -> None:
        self.lane = lane
        self.sizes = sizes
        # Where all are of one size, and nothing has to be done for each, they are only counted.
        alike = len(sizes) > 0 and sizes.count(sizes[0]) == len(sizes)
        self.one_size = sizes[0] if alike else None
        self.total = self.left = len(sizes)
        self.sent = 0
        self.number = 0
        self.short: dict[int, tuple[int, int]] = {}
        self.error: BaseException | None = None
        self.wakes: list[Callable[[], object]] = []  # of those who wait for it
        self.abandoned = False

    def submit(self, start: int, stop: int, user_data: int) -> None:
        """Submit the reads from `start` to `stop`, all that the ring has room for."""
        raise NotImplementedError

    def land(self, index: int, nbytes: int) -> None:
        """A read has come back, with so many bytes."""

    def recall(self, start: int, stop: int) -> None:
        """These reads were not sent after all."""


class _ArrayReads(Request):
    """Reads of files, `fixed` into registered memory."""

    __slots__ = ("_arrays", "_fixed")

    def __init__(self, lane: Lane, arrays: Arrays, *, fixed: bool) -> None:
        super().__init__(lane, arrays[1])
        self._arrays = arrays
        self._fixed = fixed

    def _part(self, start: int, stop: int) -> Arrays:
        positions, sizes, targets = self._arrays
        return positions[start:stop], sizes[start:stop], targets[start:stop]


class FileReads(_ArrayReads):
    """Reads of a file."""

    __slots__ = ("_source",)

    def __init__(self, lane: Lane, source: Source, arrays: Arrays, *, fixed: bool) -> None:
        super().__init__(lane, arrays, fixed=fixed)
        self._source = source

    def submit(self, start: int, stop: int, user_data: int) -> None:
        ring = self.lane.ring
        submit = ring.submit_reads_fixed if self._fixed else ring.submit_reads
        submit(self._source, *self._part(start, stop), user_data=user_data)


class FilesReads(_ArrayReads):
    """Reads of many files, one of each."""

    __slots__ = ("_sources",)

    def __init__(
        self, lane: Lane, sources: tuple[Source, ...], arrays: Arrays, *, fixed: bool
    ) -> None:
        super().__init__(lane, arrays, fixed=fixed)
        self._sources = sources

    def submit(self, start: int, stop: int, user_data: int) -> None:
        sources, part = self._sources[start:stop], self._part(start, stop)
        self.lane.ring._submit_files(sources, *part, self._fixed, user_data)


class CommandReads(Request):
    """Reads of a namespace, as packed commands."""

    __slots__ = ("_commands", "_namespace")

    def __init__(
        self, lane: Lane, namespace: Namespace, commands: bytes, sizes: array[int]
    ) -> None:
        super().__init__(lane, sizes)
        self._namespace = namespace
        self._commands = commands

    def submit(self, start: int, stop: int, user_data: int) -> None:
        with memoryview(self._commands) as commands, commands[start * 64 : stop * 64] as some:
            self.lane.ring.submit_nvme_passthrough(self._namespace, some, user_data=user_data)


class Bounce(Request):
    """Aligned reads into slots of a lane of their own, and a copy of what is wanted of each.

    A slot is a read's only while it is in flight: taken when there is room for it in the ring, and
    emptied by whoever takes the completion, so that no transfer waits for another to be waited for.
    """

    __slots__ = ("_slots", "_submit", "_wanted")

    def __init__(
        self,
        lane: BounceLane,
        sizes: array[int],
        wanted: Sequence[tuple[int, int, int]],
        submit: Callable[[int, array[int], int], object],
    ) -> None:
        """`wanted` has of each read the bytes to skip, to copy, and where they go in the buffer.

        `submit(start, slots, user_data)` sends the reads from `start` on to these offsets.
        """
        super().__init__(lane, sizes)
        self.one_size = None
        self._wanted = wanted
        self._submit = submit
        self._slots: dict[int, int] = {}

    def submit(self, start: int, stop: int, user_data: int) -> None:
        assert isinstance(self.lane, BounceLane)
        taken = array("Q", [self.lane.free.pop() for _ in range(start, stop)])
        self._slots.update(zip(range(start, stop), taken, strict=True))
        self._submit(start, taken, user_data)

    def land(self, index: int, nbytes: int) -> None:
        assert isinstance(self.lane, BounceLane)
        slot = self._slots.pop(index)
        if not self.abandoned:
            skip, count, target = self._wanted[index]
            there = copied_bytes(nbytes, skip, count)
            copy = self.lane.view[slot + skip : slot + skip + there]
            self.lane.into[target : target + there] = copy
        self.lane.free.append(slot)

    def recall(self, start: int, stop: int) -> None:
        for index in range(start, stop):
            self.land(index, 0)


class LaneRing(AsyncUringStream):
    """A lane's ring: its user knows nothing of it, and isn't told to close it.

    The collector may end it before the lane, if both are part of a cycle.
    """

    __slots__ = ()

    def __del__(self) -> None:
        if self.closed:
            return
        with contextlib.suppress(RuntimeError):  # of a fork's child, where there is none to close
            if self.inflight:
                super().__del__()
            else:
                self.close()


class Lane:
    """A ring over the memory of `buffer`, which may be closed and dropped before the lane is.

    `why_unregistered` says why the kernel did not register it, or is None.
    """

    def __init__(
        self,
        buffer: GpuMappedBuffer,
        *,
        depth: int = _DEPTH,
        loop: AbstractEventLoop | None = None,
        once: bool = False,
    ) -> None:
        """`once`: the memory is read into once, and never again."""
        self.pid = os.getpid()
        # Weakly, since the buffer finds the lane by it.
        self._loop = ref(loop) if loop is not None else None
        twin = buffer._twin()
        self.kind = twin.kind
        self.address = twin.address
        self.why_unregistered: str | None = _ONCE if once else None
        self.ring = self._make_ring(twin, depth)
        self.view = memoryview(twin)
        self._bounce: BounceLane | None = None
        # Taken again by a transfer that the garbage collector ends under it.
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._unsent: deque[Request] = deque()
        self._flying = 0
        self._submitted = 0
        self._pumped = False
        self._shared = False  # several threads have waited at a time
        self._records = bytearray(depth * _RECORD.size)
        # The fields of COMPLETION_FORMAT, each of all records.
        self._ids = memoryview(self._records).cast("Q")[::2]
        self._results = memoryview(self._records).cast("i")[2::4]
        self._nbytes = memoryview(self._records).cast("I")[3::4]

    def _make_ring(self, twin: GpuMappedBuffer, depth: int) -> AsyncUringStream:
        if twin.kind is MemoryKind.BAR1_PEER or self.why_unregistered is not None:
            return LaneRing(twin, depth, register=False)
        try:
            return LaneRing(twin, depth, register=True)
        except OSError as error:
            self.why_unregistered = error.strerror
        return LaneRing(twin, depth, register=False)  # raises if there is no ring at all

    @property
    def bounce(self) -> BounceLane:
        """The lane for what must go through a slot on its way into this one's buffer."""
        if self._bounce is None:
            self._bounce = BounceLane(self.view, self._loop() if self._loop else None)
        return self._bounce

    @property
    def abandoned(self) -> list[Request]:
        """Those that nobody waits for, and that may write into the buffer still."""
        with self._lock:
            return [request for request in list(self._requests.values()) if request.abandoned]

    # ---- Requests in

    def start(self, request: Request) -> Request:
        """Submit the request's reads as there is room. It counts as in flight from now on."""
        with self._lock:
            if self._loop is not None and not self._requests:
                self._watch()
            request.number = next(self._numbers) & 0xFFFFFFFF
            self._requests[request.number] = request
            self._unsent.append(request)
            self._submit()
            if self._loop is not None and not self._requests:
                self._unwatch()
        return request

    def abandon(self, request: Request) -> None:
        """Nobody waits for it any more; what is in flight of it stays so."""
        with self._lock:
            request.abandoned = True
            self._drop_unsent(request)

    def _submit(self) -> None:
        """Send what there is room for, some reads of each request in turn."""
        room = len(self._records) // _RECORD.size - self._flying
        while room > 0 and self._unsent:
            request = self._unsent.popleft()
            start, count = request.sent, request.total - request.sent
            if self._unsent:
                count = min(count, _TURN)
            stop = start + min(count, room)
            if stop < request.total:
                self._unsent.append(request)
            try:
                request.submit(start, stop, request.number << _INDEX_BITS | start)
                sent = stop - start
            except BaseException as error:
                request.error = error
                sent = sum(row[0] for row in self.ring._counters()) - self._submitted
                request.recall(start + sent, stop)
            request.sent += sent
            self._submitted += sent
            self._flying += sent
            room -= sent
            if request.error is not None:
                self._drop_unsent(request)

    def _drop_unsent(self, request: Request) -> None:
        if request in self._unsent:
            self._unsent.remove(request)
        request.left -= request.total - request.sent
        request.total = request.sent
        if request.left == 0:
            self._finish(request)

    # ---- Completions out

    def _dispatch(self, count: int) -> None:
        """Hand `count` records to their requests, and submit into the room that they leave."""
        ids, sizes = self._ids[:count].tolist(), self._nbytes[:count].tolist()
        only = next(iter(self._requests.values())) if len(self._requests) == 1 else None
        if only is not None and only.one_size and sizes.count(only.one_size) == count:
            self._count(only, count)
        else:
            results = self._results[:count].tolist()
            for user_data, result, nbytes in zip(ids, results, sizes, strict=True):
                self._hand_in(user_data, result, nbytes)
        self._flying -= count
        self._submit()

    def _hand_in(self, user_data: int, result: int, nbytes: int) -> None:
        request = self._requests[user_data >> _INDEX_BITS]
        index = user_data & 0xFFFFFFFF
        if nbytes != request.sizes[index]:
            request.short[index] = (result, nbytes)
        request.land(index, nbytes)
        self._count(request, 1)

    def _count(self, request: Request, done: int) -> None:
        request.left -= done
        if request.left == 0:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        # Not there: it had nothing to read, or failed before the first read was sent.
        self._requests.pop(request.number, None)
        for wake in request.wakes:
            wake()

    # ---- Threads

    def wait(self, request: Request, deadline: float | None) -> None:
        """Until all of the request is there; TimeoutError at the `deadline` (time.monotonic)."""
        while True:
            with self._lock:
                if request.left == 0:
                    return
                gate = None
                if self._pumped:
                    self._shared = True
                    gate = threading.Lock()
                    gate.acquire()
                    request.wakes.append(gate.release)
                self._pumped = True
            if gate is None:
                try:
                    self._pump(request, deadline)
                finally:
                    with self._lock:
                        self._hand_over()
                return
            try:
                if not gate.acquire(timeout=-1 if deadline is None else _left(deadline)):
                    raise TimeoutError
            except BaseException:
                with self._lock:
                    if gate.release in request.wakes:
                        request.wakes.remove(gate.release)
                    if not self._pumped:  # it was this thread's turn
                        self._hand_over()
                raise

    def _hand_over(self) -> None:
        """Another thread takes completions from now on, if one waits."""
        self._pumped = False
        for request in list(self._requests.values()):
            if request.wakes:
                request.wakes.pop()()
                return

    def _pump(self, request: Request, deadline: float | None) -> None:
        while request.left:
            count = self._batch(request)
            left = None if deadline is None else _left(deadline)
            # Another thread that comes meanwhile must not wait for the whole batch of this one.
            timeout = left if count == 1 else min(_PATIENCE, left or _PATIENCE)
            came = self.ring.wait_into(self._records, count, timeout)
            with self._lock:
                self._dispatch(came)
            if came == 0 and left == 0:
                raise TimeoutError

    def _batch(self, request: Request) -> int:
        """How many completions to wait for at once: the request needs as many as are left of it."""
        with self._lock:
            if self._shared:
                return 1
            unsent = request.sent < request.total
            return max(1, min(request.left, self._flying // 2 if unsent else self._flying))

    # ---- Event loop

    async def wait_async(self, request: Request) -> None:
        """The same, for tasks of the loop that the lane belongs to."""
        import asyncio

        if request.left:
            woken = asyncio.Event()
            request.wakes.append(woken.set)
            await woken.wait()

    def _watch(self) -> None:
        import asyncio

        asyncio.get_running_loop().add_reader(self.ring.fileno(), self._arrived)

    def _unwatch(self) -> None:
        import asyncio

        asyncio.get_running_loop().remove_reader(self.ring.fileno())

    def _arrived(self) -> None:
        with self._lock:
            self._dispatch(self.ring.wait_into(self._records, 0))
            if not self._requests:
                self._unwatch()

    # ---- The end

    def is_a_loops(self) -> bool:
        """Whether completions are taken by an event loop, and by nobody else."""
        loop = self._loop() if self._loop is not None else None
        return loop is not None and not loop.is_closed()

    def _collect(self) -> None:
        """Take what has come of reads that nobody waits for."""
        with self._lock:
            if not self.is_a_loops() and not self._pumped:
                self._dispatch(self.ring.wait_into(self._records, 0))

    def close(self) -> None:
        """Give the ring back; BufferError while anything is in flight."""
        if self.ring.closed or self.pid != os.getpid():  # the parent's is nothing here
            return
        self._collect()
        if self._requests:
            raise BufferError(
                f"{len(self._requests)} reads into the buffer are in flight: wait for them"
            )
        if self._bounce is not None:
            self._bounce.close()
        self.view.release()
        self.ring.close()
        self.ring.buffer.close()  # errors may hold this object for long

    def __del__(self) -> None:
        # With reads in flight it is the stream that warns, and stays.
        if hasattr(self, "_records"):
            with contextlib.suppress(BufferError):
                self.close()


class BounceLane(Lane):
    """Slots that reads go into first; `into` is the memory that they are copied to."""

    def __init__(self, into: memoryview, loop: AbstractEventLoop | None) -> None:
        self.into = into
        self.free = list(range(0, _SLOTS * SLOT, SLOT))
        slots = GpuMappedBuffer.from_host_visible(_SLOTS * SLOT)
        super().__init__(slots, depth=_SLOTS, loop=loop)


def carried_out(*requests: Request) -> Generator[Request, None, None]:
    """Start requests and wait for them; the first error of any is raised once all are done.

    Those that are left behind, where this is closed before, are given up.
    """
    try:
        for request in requests:
            request.lane.start(request)
        yield from requests
    finally:
        for request in requests:
            if request.left:
                request.lane.abandon(request)
    for request in requests:
        if request.error is not None:
            raise request.error


def copied_bytes(nbytes: int, skip: int, count: int) -> int:
    """How many of `count` bytes, from its byte `skip` on, a read of `nbytes` brought."""
    return max(0, min(count, nbytes - skip))


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def read_once(buffer: GpuMappedBuffer) -> None:
    """Make the lane for threads of new memory so that the first read into it is the fastest."""
    buffer._lanes[Lane] = Lane(buffer, once=True)


def lane_of(buffer: GpuMappedBuffer, loop: AbstractEventLoop | None) -> Lane:
    """The buffer's lane for threads, or for an event loop; made when it is first asked for."""
    key = Lane if loop is None else loop
    lane: Lane | None = buffer._lanes.get(key)
    if lane is None:
        made = Lane(buffer, loop=loop)
        lane = buffer._lanes.setdefault(key, made)
        if lane is not made:  # another thread was faster
            made.close()
    elif lane.pid != os.getpid():  # of the process that this one was forked from
        lane = buffer._lanes[key] = Lane(buffer, loop=loop)
    return lane
