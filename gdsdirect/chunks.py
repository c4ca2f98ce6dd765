"""Chunks: a file, or many, in order through slots of one buffer, with reads in flight ahead.

A slot is read into again only when the consumer has released its chunk, so that the memory needed
is the buffer's, however much is read.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, overload
from weakref import ref

from gdsdirect.cuda import is_on_gpu
from gdsdirect.memory import GpuMappedBuffer
from gdsdirect.plan import REGISTERED
from gdsdirect.shared_ring import SharedRing, ring_of
from gdsdirect.stream import DataPath
from gdsdirect.supply import BATCH, GRAIN, Failed, Landed, Load, ManyFiles, Supply
from gdsdirect.transfer import Require, permitted

if TYPE_CHECKING:
    import asyncio
    from asyncio import AbstractEventLoop

    from typing_extensions import Buffer

    from gdsdirect._uring_cmd import Memory
    from gdsdirect.cuda import OnGpu
    from gdsdirect.gpu_chunks import GpuChunkStream

_CHUNK = 1 << 20


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
        "_slot",
        "_stream",
        "file",
        "nbytes",
        "offset",
        "path",
        "view",
        "why",
    )

    def __init__(self, stream: ChunkStream, memory: Memory, landed: Landed) -> None:
        self._stream: ChunkStream | None = stream
        self._memory = memory
        self.view = memoryview(memory)
        self._slot, _, self.nbytes, self.file, self.offset, self.path, self.why = landed

    def release(self) -> None:
        """Give the slot back. More than once is harmless."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self.view.release()
            stream._put_back(self._slot, self._memory)
            del self._memory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    __del__ = release

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


class ChunkStream:
    """An iterator of chunks, for `for` and `async for`; made by `File.stream` and `stream_files`.

    To be closed when it isn't read to its end: by `with`, `async with` or `close()`.
    """

    def __init__(
        self, supply: Supply, buffer: GpuMappedBuffer, slots: Iterable[int], *, ours: bool
    ) -> None:
        """`ours`: the buffer was made for this stream alone."""
        self._ours = ours
        self._supply = supply
        self._buffer = buffer
        self._view = buffer.view()
        self._free = deque(slots)
        self._slots = len(self._free)
        # So many are free before a load begins: small files would else go one by one.
        self._enough = max(1, min(BATCH, self._slots // 8))
        self._ring: SharedRing | None = None
        self._reader: AbstractEventLoop | None = None
        self._ahead: deque[Load] = deque()
        self._ready: deque[Landed | Failed] = deque()
        # Of chunks that were released while there is an array of theirs.
        self._lingering: dict[int, Memory] = {}
        self._out: dict[int, ref[Chunk]] = {}  # the last of each slot
        self._wanted: Callable[[], object] | None = None
        self._begun = 0.0
        self._nbytes = 0
        self._ways: dict[DataPath, int] = {}
        self._closed = False
        self._turn = threading.Lock()  # of whoever asks for the next chunk
        self._turn_async: asyncio.Lock | None = None
        self._opening: asyncio.Future[None] | None = None

    @property
    def progress(self) -> StreamProgress:
        """How far it is now."""
        ahead = list(self._ahead)
        away = len(self._free) + len(self._ready) + sum(len(load.slots) for load in ahead)
        return StreamProgress(
            self._nbytes,
            self._supply.total,
            time.monotonic() - self._begun if self._begun else 0.0,
            sum(load.nbytes for load in ahead),
            self._slots - away,
            dict(self._ways),
        )

    # ---- Slots

    def _put_back(self, slot: int, memory: Memory) -> None:
        if self._closed:  # an array has the memory by itself
            return
        if memory._in_use:
            self._lingering[slot] = memory
            return
        self._free.append(slot)
        if self._wanted is not None:
            self._wanted()

    def _collect_lingering(self) -> None:
        for slot, memory in list(self._lingering.items()):
            if not memory._in_use:
                del self._lingering[slot]
                self._free.append(slot)

    # ---- Chunks

    def _read_ahead(self, ring: SharedRing) -> bool:
        """Load into what is free; whether the supply has to open something first."""
        if self._lingering:
            self._collect_lingering()
        while len(self._free) >= self._enough or (self._free and not self._ahead):
            load = self._supply.load(ring, self._free)
            if load is None:
                return self._supply.hungry
            self._ahead.append(load)
        return False

    def _deliver(self, load: Load) -> None:
        self._ahead.popleft()
        landed = load.landed
        self._ready.extend(landed)
        if len(landed) < len(load.slots):
            taken = {each[0] for each in landed}
            self._free.extend(slot for slot in load.slots if slot not in taken)
        if load.error is not None:
            raise load.error

    def _hand_out(self, landed: Landed | Failed) -> Chunk:
        if len(landed) == 2:
            slot, error = landed
            self._free.append(slot)
            raise error
        slot, begin, nbytes, _, _, way, _ = landed
        self._nbytes += nbytes
        self._ways[way] = self._ways.get(way, 0) + nbytes
        chunk = Chunk(self, self._buffer._part(slot + begin, nbytes), landed)
        self._out[slot] = ref(chunk)
        return chunk

    def _ring_for(self, loop: AbstractEventLoop | None) -> SharedRing:
        if self._closed:
            raise ValueError("the stream is closed")
        if self._ring is None:
            self._ring = ring_of(self._buffer)
            self._reader = loop
            self._begun = time.monotonic()
        elif self._reader is not loop:
            raise RuntimeError("the stream is read by `for` or by one loop's `async for`, not both")
        return self._ring

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        with self._turn:
            ring = self._ring_for(None)
            while True:
                if self._read_ahead(ring):
                    self._supply.open()
                elif self._ready:
                    return self._hand_out(self._ready.popleft())
                elif self._ahead:
                    self._ahead[0].finish()
                    self._deliver(self._ahead[0])
                elif self._supply.exhausted:
                    raise StopIteration
                else:
                    raise BufferError(
                        f"all {self._slots} slots of the buffer are held: release() chunks, read "
                        "smaller ones, or give a larger buffer"
                    )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        import asyncio

        loop = asyncio.get_running_loop()
        self._turn_async = self._turn_async or asyncio.Lock()
        async with self._turn_async:
            ring = self._ring_for(loop)
            while True:
                if self._read_ahead(ring):
                    # It goes on if this task is cancelled, and the next one waits for it.
                    self._opening = self._opening or loop.run_in_executor(None, self._supply.open)
                    await asyncio.shield(self._opening)
                    self._opening = None
                elif self._ready:
                    return self._hand_out(self._ready.popleft())
                elif self._ahead:
                    await self._ahead[0].finish_async()
                    self._deliver(self._ahead[0])
                elif self._supply.exhausted:
                    raise StopAsyncIteration
                else:
                    await self._a_slot(loop)

    async def _a_slot(self, loop: AbstractEventLoop) -> None:
        """Until a chunk is released, by whatever thread."""
        import asyncio

        released = asyncio.Event()
        self._wanted = lambda: loop.call_soon_threadsafe(released.set)
        try:
            while not self._free:
                # Nobody tells when an array is gone.
                timeout = 0.01 if self._lingering else None
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(released.wait(), timeout)
                self._collect_lingering()
        finally:
            self._wanted = None

    # ---- The end

    def _give_up(self) -> None:
        if self._closed:
            return
        self._closed = True
        for load in self._ahead:
            load.close()
        self._ahead.clear()
        self._ready.clear()
        for last in self._out.values():
            chunk = last()
            if chunk is not None:
                chunk.release()
        self._lingering.clear()
        self._view.release()
        if self._ours:
            with contextlib.suppress(BufferError):  # an array of a chunk, or a read in flight
                self._buffer.close()

    def close(self) -> None:
        """Read nothing more, wait for what is in flight, and release all chunks."""
        self._give_up()

    async def aclose(self) -> None:
        """The same for asyncio."""
        self._give_up()

    def __del__(self) -> None:
        for load in getattr(self, "_ahead", ()):
            load.close()

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
