"""Chunks: a file, or many, in order through slots of one buffer, with reads in flight ahead.

A slot is read into again only when the consumer has released its chunk, so that the memory needed
is the buffer's, however much is read.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeAlias, overload
from weakref import ref

from gdsdirect.cuda import is_on_gpu
from gdsdirect.errors import ring_module, ring_type
from gdsdirect.memory import GpuMappedBuffer
from gdsdirect.plan import REGISTERED
from gdsdirect.shared_ring import SharedRing, ring_of
from gdsdirect.stream import DataPath
from gdsdirect.supply import (
    BATCH,
    CLOSED,
    GRAIN,
    Landed,
    Load,
    Loaded,
    ManyFiles,
    Place,
    Supply,
    arrival,
)
from gdsdirect.transfer import Require, permitted

if TYPE_CHECKING:
    import asyncio
    from asyncio import AbstractEventLoop

    from typing_extensions import Buffer

    from gdsdirect._uring_cmd import Handout, Memory, Slot, Slots
    from gdsdirect.cuda import OnGpu
    from gdsdirect.gpu_chunks import GpuChunkStream

    _Chunks: TypeAlias = Handout["Chunk"]
else:
    _Chunks = ring_type("Handout")

_CHUNK = 1 << 20
_NOTHING = memoryview(b"")


class Chunk:
    """Some bytes of a file, in a slot of the buffer.

    `view` is a memoryview of them (`numpy.frombuffer(chunk.view, …)`), `file` the file's path,
    `offset` where they are in it, `nbytes` how many. `path` is the way they went, and `why` says
    what stood in the way of a better one. The slot is the consumer's until `release()`, the end of
    a `with`, the chunk's own end or the stream's; and as long as there is an array of `view`.
    """

    __slots__ = (
        "__weakref__",
        "_memory",
        "file",
        "nbytes",
        "offset",
        "path",
        "view",
        "why",
    )

    def __init__(self, landed: Landed) -> None:
        _, _, self.nbytes, self.file, self.offset, self.path, self.why = landed
        self._memory: Memory | None = None
        self.view = _NOTHING

    def _fill(self, buffer: GpuMappedBuffer, slots: Slots, landed: Landed) -> None:
        """The slot is free again once this memory is gone, which its views keep."""
        slot = landed.slot
        self._memory = buffer._part(slot + landed.begin, self.nbytes, slots.claim(slot))
        self.view = memoryview(self._memory)

    @property
    def _address(self) -> int:
        """Where the bytes are; ValueError once the chunk is released."""
        if self._memory is None:
            raise ValueError("the chunk is released")
        return self._memory.address

    def release(self) -> None:
        """Give the slot back. More than once is harmless."""
        self.view.release()
        self._memory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Chunk {self.nbytes} bytes of {self.file!r} at {self.offset}, {self.path.name}>"


@dataclass(frozen=True)
class StreamProgress:
    """How far a stream is.

    `nbytes` of `total` bytes (None where nobody knows yet) were handed out in `seconds`, and `ways`
    tells which way they went. `in_flight` bytes are being read ahead of the consumer, who holds
    `held` chunks.
    """

    nbytes: int
    total: int | None
    seconds: float
    in_flight: int
    held: int
    ways: Mapping[DataPath, int]

    @property
    def rate(self) -> float:
        """Bytes a second, since the first chunk was asked for."""
        return self.nbytes / self.seconds if self.seconds else 0.0


Bytes = Mapping[DataPath, int]
"""How many went each way."""


class _Ahead:
    """A load that was begun, and then what came of it."""

    __slots__ = ("after", "begun", "bytes", "delivering", "load", "nbytes", "ready", "slots")

    def __init__(self, load: Load) -> None:
        self.load: Load | None = load  # until it has landed
        self.begun = False
        self.delivering = False  # chunks that have its slots are being made
        self.slots: list[Slot] | None = None  # until its chunks have them
        self.after = load.after
        self.nbytes = load.nbytes
        self.ready: deque[Chunk | Exception] | None = None  # once it has
        self.bytes: Bytes = {}  # of the stream, with those of this load


class ChunkStream(_Chunks):
    """An iterator of chunks, for `for` and `async for`; made by `File.stream` and `stream_files`.

    To be closed when it isn't read to its end: by `with`, `async with` or `close()`. An exception
    that comes from elsewhere, such as KeyboardInterrupt, loses no chunk: whoever asks again gets
    the next one.
    """

    def __init__(
        self, supply: Supply, buffer: GpuMappedBuffer, slots: Iterable[int], *, ours: bool
    ) -> None:
        """`ours`: the buffer was made for this stream alone."""
        self._ours = ours
        self._supply = supply
        self._buffer = buffer
        self._view = buffer.view()
        self._slots: Slots = ring_module().Slots(slots)
        # So many are free before a load begins: small files would else go one by one.
        self._enough = max(1, min(BATCH, len(self._slots) // 8))
        self._reader: object = None  # None, or what reads it: threads, or one event loop
        self._ring: SharedRing | None = None
        # Where the stream is: its loads in order, and the place behind the last load that left.
        self._ahead: deque[_Ahead] = deque()
        self._place = supply.first
        self._bytes: Bytes = {}  # of loads that left
        self._chunks: dict[int, ref[Chunk]] = {}  # the last of each slot
        self._released: asyncio.Event | None = None
        self._begun = 0.0
        self._closed = False
        self._process = os.getpid()

    @property
    def progress(self) -> StreamProgress:
        """How far it is now."""
        ahead = list(self._ahead)
        front = ahead[0] if ahead and ahead[0].ready is not None else None
        waiting = [each for each in (front.ready or ()) if isinstance(each, Chunk)] if front else []
        handed = Counter(front.bytes if front else self._bytes)
        for chunk in waiting:
            handed[chunk.path] -= chunk.nbytes
        loading = [each for each in ahead if each.load is not None]
        taken = sum(len(each.load.slots) for each in loading if each.load is not None)
        return StreamProgress(
            handed.total(),
            self._supply.total,
            time.monotonic() - self._begun if self._begun else 0.0,
            sum(each.nbytes for each in loading),
            len(self._slots) - self._slots.free - len(waiting) - taken,
            {way: nbytes for way, nbytes in handed.items() if nbytes},
        )

    # ---- Chunks

    def _next_place(self) -> Place:
        """Where the next load begins."""
        return self._ahead[-1].after if self._ahead else self._place

    def _read_ahead(self, ring: SharedRing) -> None:
        """Load into what is free."""
        # An exception may have come before one of them had its slots, or was begun.
        for ahead in self._ahead:
            self._begin(ahead)
        while self._slots.free >= self._enough or (self._slots.free and not self._ahead):
            load = self._supply.load(self._next_place(), ring, self._slots)
            if load is None:
                break
            self._ahead.append(_Ahead(load))
            self._begin(self._ahead[-1])

    def _begin(self, ahead: _Ahead) -> None:
        """Give a load its slots, and have it under way."""
        load = ahead.load
        if load is None or ahead.ready is not None:
            return
        if ahead.slots is None or ahead.delivering:
            # No local has them: an exception keeps those of its frames. Chunks that it came before
            # have none of them any more.
            ahead.slots = list(map(self._slots.claim, load.slots))
            ahead.delivering = False
        if not ahead.begun:
            load.start()
            ahead.begun = True

    def _deliver(self, ahead: _Ahead, loaded: Loaded) -> None:
        """What a load has brought is ready, unless another task was here before."""
        if ahead.ready is not None or self._closed:
            return
        total = Counter(self._bytes)
        for each in loaded:
            if isinstance(each, Landed):
                total[each.path] += each.nbytes
        ahead.bytes = total
        # No local has the chunks: an exception keeps those of its frames.
        ahead.delivering = True
        ahead.ready = deque(map(self._chunk_of, loaded))
        ahead.load = ahead.slots = None

    def _chunk_of(self, landed: Landed | Exception) -> Chunk | Exception:
        if isinstance(landed, Exception):
            return landed
        before = self._last_of(landed.slot)
        if before is not None:  # which an exception left behind in some frame
            before.release()
        chunk = Chunk(landed)
        self._chunks[landed.slot] = ref(chunk)  # first, so that the stream's end releases it
        chunk._fill(self._buffer, self._slots, landed)
        return chunk

    def _last_of(self, slot: int) -> Chunk | None:
        last = self._chunks.get(slot)
        return None if last is None else last()

    def _is_ready(self) -> bool:
        """Whether there is a chunk to hand out; loads that have none any more leave."""
        while self._ahead:
            front = self._ahead[0]
            if front.ready is None:
                return False
            self._ready = front.ready
            if front.ready:
                return True
            self._place, self._bytes = front.after, front.bytes
            self._ahead.popleft()
        return False

    def _ring_for(self, reader: object) -> SharedRing:
        if self._closed:
            raise ValueError(CLOSED)
        if self._process != os.getpid():
            raise RuntimeError(
                "the stream belongs to the process that made it, and this one is its fork: make a "
                "stream of your own here"
            )
        if self._reader not in (None, reader):
            raise RuntimeError("the stream is read by `for` or by one loop's `async for`, not both")
        self._reader = reader
        self._begun = self._begun or time.monotonic()
        ring = self._ring = ring_of(self._buffer)
        return ring

    def _step(self, reader: object) -> _Ahead | Place | BaseException | None:
        """What is to be waited for: a load, or the place of one whose files are to be opened.

        None: a chunk is ready, or a slot is to be released; an exception: there are no more.
        """
        ring = self._ring_for(reader)
        place = self._next_place()
        opened = self._supply.is_open(place)
        if opened:
            self._read_ahead(ring)
        if self._is_ready() and not self._supply.is_coming(place):
            return None
        if not opened:
            return place
        if self._ahead:
            return self._ahead[0]
        return StopIteration() if self._supply.exhausted(self._place) else None

    def _prepare(self) -> None:
        """Until there is a chunk; Handout calls this in turn."""
        while True:
            step = self._step(threading)
            if isinstance(step, tuple):
                self._supply.open(step)
            elif isinstance(step, _Ahead):
                if step.load is not None:
                    self._deliver(step, step.load.finish())
            elif step is not None:
                raise step
            elif self._is_ready():
                return
            elif not self._slots.free:
                raise BufferError(
                    f"all {len(self._slots)} slots of the buffer are held: release() chunks, read "
                    "smaller ones, or give a larger buffer"
                )

    async def _prepare_async(self) -> None:
        """The same, while other tasks run; they may be here too, so it looks again after a wait."""
        import asyncio

        loop = asyncio.get_running_loop()
        while True:
            step = self._in_turn(self._step, loop)
            if isinstance(step, tuple):
                opening = self._supply.opening(step)
                if opening is not None:
                    await arrival(opening)
                self._supply.open(step)
            elif isinstance(step, _Ahead):
                if step.load is not None:
                    loaded = await step.load.finish_async()
                    self._in_turn(self._deliver, step, loaded)
            elif step is not None:
                raise StopAsyncIteration
            elif self._in_turn(self._is_ready):
                return
            else:
                await self._a_slot(loop)

    async def _a_slot(self, loop: AbstractEventLoop) -> None:
        """Until a chunk is released, by whatever thread."""
        import asyncio

        released = self._released = self._released or asyncio.Event()
        released.clear()
        self._slots.freed = lambda: self._wake(loop, released)
        if not self._slots.free:
            await released.wait()

    def _wake(self, loop: AbstractEventLoop, released: asyncio.Event) -> None:
        self._slots.freed = None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(released.set)

    # ---- The end

    def _give_up(self) -> list[Load]:
        """What is to be closed yet."""
        self._closed = True
        loads = [ahead.load for ahead in self._ahead if ahead.load is not None]
        for slot in list(self._chunks):
            chunk = self._last_of(slot)
            if chunk is not None:
                chunk.release()
        self._ready = None
        self._slots.freed = None
        return loads

    def _let_go(self) -> None:
        """Nothing is in flight any more."""
        self._ahead.clear()
        self._supply.close()
        self._view.release()
        if self._ours:
            with contextlib.suppress(BufferError):  # an array of a chunk
                self._buffer.close()

    def _close(self) -> None:
        loads = self._give_up()
        if self._process != os.getpid():  # what is in flight is the parent's
            return
        for load in loads:
            load.close()
        self._let_go()

    def close(self) -> None:
        """Read nothing more, wait for what is in flight, and release all chunks."""
        self._in_turn(self._close)

    async def aclose(self) -> None:
        """The same for asyncio."""
        loads = self._in_turn(self._give_up)
        if self._process != os.getpid():
            return
        for load in loads:
            await load.close_async()
        self._in_turn(self._let_go)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()


Supplies = Callable[[int, "Collection[DataPath] | None"], Supply]
"""Makes what is to be read, for chunks of so many bytes, by these ways alone."""


def size_of_chunks(chunk_size: int | None, nbytes: int) -> int:
    """The size asked for, or what suits memory of so many bytes."""
    if chunk_size is None:
        return max(GRAIN, min(_CHUNK, nbytes // 8 // GRAIN * GRAIN))
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: give bytes, 1 or more")
    return chunk_size


def stream_of(
    buffer: Buffer | OnGpu,
    chunk_size: int | None,
    supplies: Supplies,
    require: Collection[DataPath] | None,
    *,
    aligned: bool,
) -> ChunkStream | GpuChunkStream:
    """A stream through slots of `buffer`, for chunks of so many bytes.

    `aligned` says that they begin at multiples of it in their file.
    """
    if is_on_gpu(buffer):
        from gdsdirect import gpu_chunks  # which is above this module

        return gpu_chunks.stream_of(buffer, chunk_size, supplies, require, aligned=aligned)
    return host_stream_of(buffer, chunk_size, supplies, require, aligned=aligned)


def host_stream_of(
    buffer: Buffer,
    chunk_size: int | None,
    supplies: Supplies,
    require: Collection[DataPath] | None,
    *,
    aligned: bool,
) -> ChunkStream:
    """`stream_of` for memory of the host, or what is mapped there."""
    memory = buffer if isinstance(buffer, GpuMappedBuffer) else GpuMappedBuffer.from_object(buffer)
    size = size_of_chunks(chunk_size, memory.nbytes)
    # A chunk that begins in the midst of a block is read from the block's start.
    grainy = not aligned or size % GRAIN
    stride = -(-size // GRAIN) * GRAIN + (GRAIN if grainy else 0)
    first = -memory.address % GRAIN
    slots = [
        slot
        for slot in range(first, memory.nbytes - stride + 1, stride)
        if slot // REGISTERED == (slot + stride - 1) // REGISTERED
    ]
    if not slots:
        raise ValueError(
            f"the buffer has {memory.nbytes} bytes, and no room for a chunk of {size} in whole "
            "pages: give a smaller chunk_size, or a larger buffer"
        )
    return ChunkStream(supplies(size, require), memory, slots, ours=memory is not buffer)


Paths = Iterable["str | bytes | os.PathLike[str] | os.PathLike[bytes]"]


@overload
def stream_files(
    paths: Paths,
    buffer: Buffer,
    *,
    chunk_size: int | None = None,
    direct: bool = True,
    require: Require = None,
) -> ChunkStream: ...


@overload
def stream_files(
    paths: Paths,
    buffer: OnGpu,
    *,
    chunk_size: int | None = None,
    direct: bool = True,
    require: Require = None,
) -> GpuChunkStream: ...


def stream_files(
    paths: Paths,
    buffer: Buffer | OnGpu,
    *,
    chunk_size: int | None = None,
    direct: bool = True,
    require: Require = None,
) -> ChunkStream | GpuChunkStream:
    """Iterate many files, in their order, in chunks that land in slots of `buffer`.

    A file of at most `chunk_size` bytes is one chunk, also an empty one; larger ones are several.
    Small files are opened and read in batches. The arguments are those of `open` and `File.stream`.
    An error of one file is raised when it is that file's turn; the iterator then goes on with the
    next one, if it is asked to.

    >>> import gdsdirect, glob, os
    >>> paths = sorted(glob.glob(os.path.dirname(gdsdirect.__file__) + "/*.py"))
    >>> with gdsdirect.stream_files(paths, bytearray(1 << 20)) as stream:
    ...     sizes = [chunk.nbytes for chunk in stream]
    >>> sizes == [os.path.getsize(path) for path in paths]
    True
    """
    return stream_of(
        buffer,
        chunk_size,
        lambda size, ways: ManyFiles(paths, size, ways, direct=direct),
        permitted(require),
        aligned=True,
    )
