"""Chunks in GPU memory: a stream's chunks, copied on from page-locked slots into the GPU's own."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from gdsdirect import chunks
from gdsdirect.cuda import LEGACY, DeviceMemory, Event, device, stream_handle
from gdsdirect.errors import CudaError, WayClosedError, ring_module
from gdsdirect.gpu import Pool, Slots, pool_of, ways_to_slots
from gdsdirect.relay import next_of
from gdsdirect.stream import DataPath

if TYPE_CHECKING:
    import asyncio

    from gdsdirect._uring_cmd import Turn
    from gdsdirect.chunks import Chunk, ChunkStream, StreamProgress, Supplies
    from gdsdirect.cuda import OnGpu

_ALIGNMENT = 512  # bytes; as cudaMalloc's at least, so that arrays of any type may begin there
_WHY = "streams into GPU memory go through page-locked slots"


class GpuChunk:
    """Some bytes of a file, in a slot of GPU memory.

    It is an array of uint8 by `__cuda_array_interface__`: `torch.as_tensor(chunk, device="cuda")`,
    `cupy.asarray(chunk)`. `file`, `offset`, `nbytes`, `path` and `why` are those of `Chunk`, and
    all bytes are `bounce_bytes`. The slot is the consumer's until `release()`, the end of a `with`,
    or the chunk's own end; an array of it keeps it.
    """

    __slots__ = (
        *("__weakref__", "_address", "_place", "_stream", "bounce_bytes", "file", "nbytes"),
        *("offset", "path", "why"),
    )

    def __init__(self, stream: GpuChunkStream, chunk: Chunk, place: int, address: int) -> None:
        self._stream: GpuChunkStream | None = stream
        self._place = place
        self._address = address
        self.file, self.offset, self.path = chunk.file, chunk.offset, chunk.path
        self.nbytes = self.bounce_bytes = chunk.nbytes
        self.why = _WHY if chunk.why is None else f"{_WHY}; {chunk.why}"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The CUDA array interface, version 3. No stream: the bytes are there.

        AttributeError once the chunk is released.
        """
        if self._stream is None:
            raise AttributeError("the chunk is released: its slot has other bytes by now")
        return {
            "version": 3,
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self._address, False),
            "strides": None,
            "stream": None,
        }

    def release(self, stream: object = None) -> None:
        """Give the slot back. More than once is harmless.

        The next chunk is copied there once all is done that the default stream has now, or
        `stream` (as `read_into` takes one). Arrays of this chunk aren't to be used after that.
        """
        owner, self._stream = self._stream, None
        if owner is not None:
            owner._put_back(self._place, LEGACY if stream is None else stream_handle(stream))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()

    def __repr__(self) -> str:
        where = f"{self.nbytes} bytes of {self.file!r} at {self.offset}"
        return f"<GpuChunk {where}, {self.path.name}, copied>"


class _Copied(NamedTuple):
    """A chunk on its way to its place, there when the event is done."""

    event: Event
    chunk: Chunk
    place: int


class GpuChunkStream:
    """An iterator of chunks in GPU memory, for `for` and `async for`; made by `File.stream` and
    `stream_files`.

    To be closed when it isn't read to its end: by `with`, `async with` or `close()`. What is read
    ahead is in page-locked slots, of which some are being copied on.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        places: list[int],
        pool: Pool,
        host: Callable[[Slots], ChunkStream],
    ) -> None:
        self._memory = memory
        self._free = deque(places)
        self._places = len(places)
        self._pool = pool
        self._slots: Slots | None = pool.take()
        try:
            self._host = host(self._slots)
            self._slots.copies.follow(memory.after)
        except BaseException:
            pool.give_back(self._slots)
            self._slots = None
            raise
        self._copying: deque[tuple[Event, Chunk]] = deque()  # chunks of the host in their slots
        self._ahead: deque[_Copied | Exception] = deque()  # in order, errors at their turn
        self._in_hand: Chunk | None = None  # of the host, with no place to go
        self._begun = 0.0
        self._nbytes = 0
        self._ways: dict[DataPath, int] = {}
        self._turn: Turn = ring_module().Turn()  # of whoever asks for the next chunk
        self._turn_async: asyncio.Lock | None = None
        self._wanted: Callable[[], object] | None = None
        self._closed = False

    @property
    def progress(self) -> StreamProgress:
        """How far it is now; what is being copied is in flight too."""
        host = self._host.progress
        ahead = [each for each in list(self._ahead) if isinstance(each, _Copied)]
        return chunks.StreamProgress(
            self._nbytes,
            host.total,
            time.monotonic() - self._begun if self._begun else 0.0,
            host.in_flight + sum(copied.chunk.nbytes for copied in ahead),
            self._places - len(self._free) - len(ahead),
            dict(self._ways),
        )

    def _put_back(self, place: int, stream: int) -> None:
        slots = self._slots
        if slots is not None:
            slots.copies.follow(stream)
        self._free.append(place)
        if self._wanted is not None:
            self._wanted()

    # ---- Chunks

    def _take_one(self, slots: Slots) -> bool:
        """Start to copy one more chunk of the host's; False: there is none, or no place."""
        try:
            self._in_hand = self._in_hand or next_of(self._host, self._copying)
        except CudaError:
            raise
        except Exception as error:  # of one file; there may be others
            self._ahead.append(error)
            return True
        if self._in_hand is None or not self._free:
            return False
        chunk, self._in_hand = self._in_hand, None
        place = self._free.popleft()
        target = self._memory.address + place
        if chunk.nbytes:
            event = slots.copies.copy(chunk._address, target, chunk.nbytes)
        else:
            event = slots.copies.mark()
        self._copying.append((event, chunk))
        self._ahead.append(_Copied(event, chunk, place))
        return True

    def _next(self) -> GpuChunk | None:
        """The next chunk; None: there are no more."""
        return self._turn.run(self._next_in_turn)

    def _next_in_turn(self) -> GpuChunk | None:
        if self._closed:
            raise ValueError("the stream is closed")
        self._begun = self._begun or time.monotonic()
        if self._slots is None:
            return None
        try:
            # Two for each that is handed out, so that some get ahead and nobody waits for all.
            if self._take_one(self._slots):
                self._take_one(self._slots)
            return self._hand_out()
        except CudaError:
            self._give_up()
            raise

    def _hand_out(self) -> GpuChunk | None:
        if not self._ahead:
            if self._in_hand is None:
                self._give_up()
                return None
            raise BufferError(
                f"all {self._places} slots of the GPU memory are held: release() chunks, read "
                "smaller ones, or give more memory"
            )
        copied = self._ahead.popleft()
        if isinstance(copied, Exception):
            raise copied
        copied.event.synchronize()
        chunk, place = copied.chunk, copied.place
        self._nbytes += chunk.nbytes
        self._ways[chunk.path] = self._ways.get(chunk.path, 0) + chunk.nbytes
        return GpuChunk(self, chunk, place, self._memory.address + place)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> GpuChunk:
        chunk = self._next()
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GpuChunk:
        import asyncio

        loop = asyncio.get_running_loop()
        self._turn_async = self._turn_async or asyncio.Lock()
        async with self._turn_async:
            released = asyncio.Event()
            self._wanted = lambda: loop.call_soon_threadsafe(released.set)
            try:
                while self._is_full():
                    await released.wait()
                    released.clear()
            finally:
                self._wanted = None
            chunk = await asyncio.to_thread(self._next)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def _is_full(self) -> bool:
        """Whether a chunk is there, and all that it waits for is a place."""
        there = self._in_hand is not None and not self._closed
        return there and not self._free and not self._ahead

    # ---- The end

    def _give_up(self) -> None:
        """Nothing more is read or copied; what uses the slots comes to its end first."""
        slots, self._slots = self._slots, None
        if slots is None:
            return
        self._ahead.clear()
        self._in_hand = None
        try:
            slots.copies.drain()
        except BaseException:
            self._pool.lose(slots, self._memory)
            raise
        self._copying.clear()
        self._host.close()
        self._pool.give_back(slots)

    def close(self) -> None:
        """Read nothing more, and wait for what is in flight. Chunks keep their bytes."""
        self._turn.run(self._close)

    def _close(self) -> None:
        self._closed = True
        if self._wanted is not None:  # whoever waits for a place is told
            self._wanted()
        self._give_up()

    async def aclose(self) -> None:
        """The same for asyncio."""
        import asyncio

        await asyncio.to_thread(self.close)

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            with contextlib.suppress(Exception):
                self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()


def stream_of(
    target: OnGpu,
    chunk_size: int | None,
    supplies: Supplies,
    require: Collection[DataPath] | None,
    *,
    aligned: bool,
) -> GpuChunkStream:
    """`chunks.stream_of` for GPU memory."""
    memory = DeviceMemory.of(target)
    ways = ways_to_slots(require)
    if ways is not None and not ways:
        raise WayClosedError("the stream", {DataPath.CUFILE.name: _WHY})
    size = chunks.size_of_chunks(chunk_size, memory.nbytes)
    stride = -(-size // _ALIGNMENT) * _ALIGNMENT
    places = list(range(0, memory.nbytes - size + 1, stride))
    if not places:
        raise ValueError(
            f"the GPU memory has {memory.nbytes} bytes, and no room for a chunk of {size}: give a "
            "smaller chunk_size, or more memory"
        )
    return GpuChunkStream(
        memory,
        places,
        pool_of(device(memory.device)),
        lambda slots: chunks.host_stream_of(slots.buffer, size, supplies, ways, aligned=aligned),
    )
