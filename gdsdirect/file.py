"""open() and File: the bytes of a file, block device or namespace, by the best way there is."""

from __future__ import annotations

import contextlib
import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self, overload

from gdsdirect.chunks import ChunkStream, stream_of
from gdsdirect.cuda import is_on_gpu
from gdsdirect.memory import GpuMappedBuffer
from gdsdirect.origin import Origin
from gdsdirect.plan import Plan, Range
from gdsdirect.shared_ring import ring_of
from gdsdirect.supply import GRAIN, OneFile
from gdsdirect.transfer import (
    ReadResult,
    Require,
    Transfer,
    finish,
    permitted,
    timed_out,
    to_the_end_async,
)

if TYPE_CHECKING:
    from typing import TypeAlias

    from typing_extensions import Buffer

    _Integers: TypeAlias = Sequence[int] | Buffer

    from gdsdirect import cufile
    from gdsdirect._uring_cmd import Source
    from gdsdirect.cuda import DeviceMemory, OnGpu
    from gdsdirect.gpu_chunks import GpuChunkStream


def open(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    *,
    direct: bool = True,
    extents: bool = False,
) -> File:
    """Open a file, a block device or an NVMe namespace (/dev/ngXnY) for reading.

    With `direct=False` it is read through the page cache, which may have it already.

    With `extents=True` a regular file on ext4 or XFS, right on an NVMe namespace or a partition of
    one, is read by passthrough of its blocks, past the file system, wherever that is safe: nobody
    may have it open for writing, and whoever wants to waits until a read is done (a read lease,
    for which its owner or CAP_LEASE is needed). Else it is read as a file, and the result says why.

    OSError (FileNotFoundError, PermissionError, ...) for what can't be opened, ValueError for what
    is none of these, RingUnavailableError where gdsdirect has no io_uring part.

    >>> import gdsdirect
    >>> with gdsdirect.open(gdsdirect.__file__) as file:
    ...     text = bytearray(32)
    ...     result = file.read_into(text, size=32)
    >>> bytes(text[:30])
    b'\"\"\"Reads NVMe into GPU-visible'
    """
    return File(path, direct=direct, extents=extents)


class File:
    """What `open` returns. `path` is what was given, `size` the bytes that there are now.

    All calls may be made from any thread. A read that is given up (a timeout, an interrupt, a
    cancelled task) may write into its buffer until it comes back: the next read into that buffer
    waits for it, and the buffer can't be closed before.
    """

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        *,
        direct: bool = True,
        extents: bool = False,
    ) -> None:
        self.path = os.fsdecode(path)
        self._origin = Origin(self.path, direct=direct, extents=extents)
        self._source: Source = self._origin.source  # a stream finds it by this name (csrc/submit.c)
        # What cuFile has of it, once a read into GPU memory asked; gdsdirect/gpu.py sees to it.
        self._cufile: cufile.Handle | cufile.RefusedError | None = None
        self._cufile_lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes: of a file, those that it has now."""
        return self._origin.size

    def read_into(
        self,
        buffer: Buffer | OnGpu,
        *,
        offset: int = 0,
        size: int | None = None,
        target_offset: int = 0,
        require: Require = None,
        timeout: float | None = None,
        stream: object = None,
    ) -> ReadResult:
        """Read `size` bytes from `offset` into `buffer` at `target_offset`, and wait for them.

        `buffer` is a GpuMappedBuffer, or any writable contiguous memory (a bytearray, a NumPy
        array), which then is prepared anew for each read; or GPU memory: a torch tensor, a CuPy
        array, anything with `__cuda_array_interface__` or DLPack on CUDA. There the bytes go by
        cuFile where that is direct, else through page-locked memory, and are copied on while more
        is read; `require` is then the way to that memory. Without `size` all from `offset` to the
        end of the file is read, and must fit. Fewer bytes come only where the file ends before.
        Any numbers go; direct reads are of whole blocks, and for the parts of blocks at both ends
        a copy is made, which `bounce_bytes` counts.

        `require` is the way, or the ways, that the bytes may take: WayClosedError where none of
        them is open. Without it the best open one is taken, and the result says which.

        ValueError for numbers that the buffer or the file doesn't hold, NvmeStatusError for a
        status of the drive's, another OSError for an errno of the kernel's, TimeoutError after
        `timeout` seconds; nothing is known of the buffer's bytes then. Of GPU memory also
        BufferError for what is not contiguous or read-only, CudaUnavailableError where there is no
        CUDA, and CudaError where it fails; there is no timeout.

        `stream`, for GPU memory, is a stream of CUDA's: its handle, or torch's, CuPy's or any other
        object with `__cuda_stream__`. The copies are then put into that stream, after what is in it
        now, and this returns once all are: `event` of the result tells when the bytes are there.
        """
        if isinstance(buffer, GpuMappedBuffer):
            if require is None and stream is None and size is not None:
                result = self._read_shortly(buffer, offset, size, target_offset, timeout)
                if result is not None:
                    return result
        elif is_on_gpu(buffer):
            from gdsdirect import gpu  # which is above this module

            _no_timeout(timeout)
            return gpu.read_into(
                self,
                buffer,
                offset=offset,
                size=size,
                target_offset=target_offset,
                require=require,
                stream=stream,
            )
        _no_stream(stream)
        with _memory(buffer) as memory:
            wanted = self._range(memory, offset, size, target_offset)
            transfer = Transfer(self._origin, ring_of(memory), permitted(require))
            return finish(transfer.read(wanted), timeout)

    def _read_shortly(
        self,
        buffer: GpuMappedBuffer,
        offset: int,
        size: int,
        target_offset: int,
        timeout: float | None,
    ) -> ReadResult | None:
        """The bytes, where one read brings them without any choice or copy; None: it doesn't."""
        ring = ring_of(buffer)
        way = self._origin.short_way(ring)
        if way is None:
            return None
        source, alignment, memory_alignment, fixed, path, why = way
        try:
            nbytes = ring._read(
                source, offset, size, target_offset, alignment, memory_alignment, fixed, timeout
            )
        except TimeoutError as error:
            raise timed_out(error, timeout) from None
        return None if nbytes is None else ReadResult(nbytes, path, why, 0, {path: nbytes})

    async def read_into_async(
        self,
        buffer: Buffer | OnGpu,
        *,
        offset: int = 0,
        size: int | None = None,
        target_offset: int = 0,
        require: Require = None,
        stream: object = None,
    ) -> ReadResult:
        """`read_into` for asyncio: other tasks run meanwhile.

        Into GPU memory it is a thread that reads, and goes on if the task is cancelled.
        """
        import asyncio

        if isinstance(buffer, GpuMappedBuffer):
            if require is None and stream is None and size is not None:
                ring = ring_of(buffer)
                way = self._origin.short_way(ring)
                nbytes = way and await ring.read_shortly(way, offset, size, target_offset)
                if way is not None and nbytes is not None:
                    return ReadResult(nbytes, way.path, way.why, 0, {way.path: nbytes})
        elif is_on_gpu(buffer):
            return await asyncio.to_thread(
                self.read_into,
                buffer,
                offset=offset,
                size=size,
                target_offset=target_offset,
                require=require,
                stream=stream,
            )
        _no_stream(stream)
        with _memory(buffer) as memory:
            wanted = self._range(memory, offset, size, target_offset)
            transfer = Transfer(self._origin, ring_of(memory), permitted(require))
            return await to_the_end_async(transfer.read(wanted))

    def read_many_into(
        self,
        buffer: Buffer,
        offsets: _Integers,
        sizes: _Integers,
        target_offsets: _Integers,
        *,
        require: Require = None,
        timeout: float | None = None,
    ) -> ReadResult:
        """Read n ranges, `sizes[i]` bytes from `offsets[i]` to `target_offsets[i]`, in one batch.

        All three are sequences of n integers; arrays of 64, 32 and 64 bits (array("Q"), array("I"),
        NumPy) are taken as they are. Where every range is of whole blocks, no object is made for
        any. `nbytes` of the result are all together. The errors are those of `read_into`, and
        ShortReadError for a range that ends beyond the file.
        """
        with _memory(buffer) as memory:
            plan = _plan(memory, offsets, sizes, target_offsets)
            transfer = Transfer(self._origin, ring_of(memory), permitted(require))
            return finish(transfer.read_many(plan), timeout)

    async def read_many_into_async(
        self,
        buffer: Buffer,
        offsets: _Integers,
        sizes: _Integers,
        target_offsets: _Integers,
        *,
        require: Require = None,
    ) -> ReadResult:
        """`read_many_into` for asyncio: other tasks run meanwhile."""
        with _memory(buffer) as memory:
            plan = _plan(memory, offsets, sizes, target_offsets)
            transfer = Transfer(self._origin, ring_of(memory), permitted(require))
            return await to_the_end_async(transfer.read_many(plan))

    @overload
    def stream(
        self,
        buffer: Buffer,
        *,
        chunk_size: int | None = None,
        offset: int = 0,
        size: int | None = None,
        require: Require = None,
    ) -> ChunkStream: ...

    @overload
    def stream(
        self,
        buffer: OnGpu,
        *,
        chunk_size: int | None = None,
        offset: int = 0,
        size: int | None = None,
        require: Require = None,
    ) -> GpuChunkStream: ...

    def stream(
        self,
        buffer: Buffer | OnGpu,
        *,
        chunk_size: int | None = None,
        offset: int = 0,
        size: int | None = None,
        require: Require = None,
    ) -> ChunkStream | GpuChunkStream:
        """Iterate `size` bytes from `offset` in chunks that land in slots of `buffer`, in order.

        For `for` and for `async for`. As many chunks are read ahead as there are slots, and a slot
        is used again when its chunk was released or dropped, so hold fewer than there are. Chunks
        have `chunk_size` bytes (1 MiB, or less in a buffer of less than 8), but for the last one.

        `buffer` is as for `read_into`. In GPU memory chunks are arrays of CUDA's; they get there by
        way of page-locked slots, from which they are copied while others are read.

        ValueError where the buffer has no room for one, else the errors of `read_into`.
        """
        if offset < 0 or (size is not None and size < 0):
            raise ValueError(f"offset is {offset}, size {size}: give bytes, 0 or more")
        have = max(0, self.size - offset)
        whole = Range(offset, have if size is None else min(size, have), 0)
        return stream_of(
            buffer,
            chunk_size,
            lambda most, ways: OneFile(self._origin, whole, most, ways),
            permitted(require),
            aligned=offset % GRAIN == 0,
        )

    def _range(
        self,
        memory: GpuMappedBuffer | DeviceMemory,
        offset: int,
        size: int | None,
        target_offset: int,
    ) -> Range:
        """What is to be read, checked against the buffer."""
        for name, value in (("offset", offset), ("target_offset", target_offset), ("size", size)):
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}: give bytes, 0 or more")
        room = memory.nbytes - target_offset
        if room < 0:
            raise ValueError(f"target_offset is {target_offset}: outside of {memory!r}")
        have = max(0, self.size - offset)
        if size is None and have > room:
            raise ValueError(
                f"{self.path} has {have} bytes from offset {offset} on, and the buffer has room "
                f"for {room}: give size=, or a larger buffer"
            )
        if size is not None and size > room:
            raise ValueError(
                f"size is {size}: the buffer has {memory.nbytes} bytes, and room for {room} from "
                f"target_offset {target_offset} on"
            )
        return Range(offset, have if size is None else size, target_offset)

    # ---- The end

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._source.closed

    def fileno(self) -> int:
        """The open file descriptor, still owned by this object; ValueError once closed."""
        return self._source.fileno()

    def close(self) -> None:
        """Close the file; reads in flight are not disturbed. More than once is harmless."""
        found = self._cufile
        if found is not None and not isinstance(found, Exception):
            found.close()
        self._origin.close()

    def __enter__(self) -> Self:
        self.fileno()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<File {self.path!r}{', closed' if self.closed else ''}>"


def _plan(
    memory: GpuMappedBuffer, offsets: _Integers, sizes: _Integers, target_offsets: _Integers
) -> Plan:
    """What is to be read, checked against the buffer."""
    plan = Plan(
        _array("offsets", "Q", offsets),
        _array("sizes", "I", sizes),
        _array("target_offsets", "Q", target_offsets),
    )
    lengths = [len(plan.offsets), len(plan.sizes), len(plan.targets)]
    if len(set(lengths)) != 1:
        raise ValueError(
            f"offsets, sizes and target_offsets have {lengths} numbers: give as many of each"
        )
    end = plan.common.target_end
    if end > memory.nbytes:
        raise ValueError(f"a range ends at byte {end} of the buffer, which has {memory.nbytes}")
    return plan


def _array(name: str, code: str, numbers: _Integers) -> array[int]:
    try:
        view = memoryview(numbers)  # type: ignore[arg-type]
    except TypeError:
        view = None
    if view is not None and view.itemsize == array(code).itemsize and view.c_contiguous:
        made = array(code)
        made.frombytes(view.cast("B"))
        if view.format in ("q", "l", "i") and max(made, default=0) >> (8 * view.itemsize - 1):
            raise ValueError(f"{name} has negative numbers: give bytes, 0 or more")
        return made
    try:
        return array(code, numbers)  # type: ignore[arg-type]
    except OverflowError:
        bits = 8 * array(code).itemsize
        raise ValueError(f"{name}: give integers from 0 to 2**{bits} - 1") from None


def _no_stream(stream: object) -> None:
    if stream is not None:
        raise ValueError(
            "stream= is for GPU memory, and this buffer is the host's: leave it out, or give a "
            "tensor on the GPU"
        )


def _no_timeout(timeout: float | None) -> None:
    if timeout is not None:
        raise ValueError(f"timeout is {timeout}: reads into GPU memory have none, leave it out")


@contextlib.contextmanager
def _memory(buffer: Buffer) -> Iterator[GpuMappedBuffer]:
    """`buffer` as memory for a drive, prepared for the time being if it isn't yet."""
    if isinstance(buffer, GpuMappedBuffer):
        yield buffer
        return
    memory = GpuMappedBuffer.from_object(buffer)
    try:
        yield memory
    finally:
        with contextlib.suppress(BufferError):  # what was given up is in flight
            memory.close()
