"""Chaos, what is compared: files whose bytes are known, and the parts of buffers that have them."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from gdsdirect import Chunk, ChunkStream, File, GpuMappedBuffer

SIZES = (0, 1, 100, 4095, 4096, 5000, 65536 + 17, 300_000, 1 << 20, (2 << 20) + 513)
"""Bytes of the files that are read."""

REGION = 64 << 10  # bytes of a buffer that are one reader's
_GAP = 4096  # bytes between two of them, which no read may touch
_FILLING = b"\xa5"


def make_files(folder: Path) -> None:
    """The files of all rounds, each of other bytes."""
    for number, size in enumerate(SIZES):
        (folder / f"{number}.bin").write_bytes(random.Random(number).randbytes(size))


class WrongError(Exception):
    """Something that must not be: of what kind, without numbers, and then all that is known."""


class Closable(Protocol):
    """What tells whether it was closed."""

    @property
    def closed(self) -> bool: ...


def says_closed(error: Exception, things: Iterable[Closable]) -> bool:
    """Whether it says that something is closed, and one of these is."""
    if not isinstance(error, ValueError) or "closed" not in str(error):
        return False
    return any(thing.closed for thing in things)


# ---- What is read


class Library:
    """The files' paths and bytes."""

    def __init__(self, folder: Path) -> None:
        self.bytes = {str(path): path.read_bytes() for path in sorted(folder.glob("*.bin"))}
        self.paths = list(self.bytes)
        self.long = [path for path in self.paths if len(self.bytes[path]) >= 4095]

    def compare(self, got: bytes, path: str, offset: int, what: str) -> None:
        """WrongError if these aren't the bytes of the file from `offset` on."""
        expected = self.bytes[path][offset : offset + len(got)]
        if got != expected:
            where = f"{path} at {offset}, {len(got)} bytes"
            raise WrongError(f"{what} brought {self.difference(got, expected)}", where)

    def difference(self, got: bytes, expected: bytes) -> str:
        """What the first bytes are that should not be where they are."""
        if len(got) != len(expected):
            return "more bytes than there are"
        pairs = zip(got, expected, strict=True)
        first = next(place for place, (one, other) in enumerate(pairs) if one != other)
        some = got[first : first + 16]
        if not some.strip(_FILLING):
            return "nothing where it says that it did"
        if not some.strip(b"\0"):
            return "zeros"
        if len(some) < 8:
            return "bytes too few to tell whose"
        known = any(some in data for data in self.bytes.values())
        return "bytes of another file or place" if known else "bytes from nowhere"


class Part(NamedTuple):
    """Some bytes of a file, and the place in the buffer where they go."""

    offset: int
    size: int
    target: int


class Region:
    """A part of a buffer, of one reader; `expected` is what it has as long as nobody reads there.

    It is None after a read that was given up, which may write there until the next one is done.
    """

    def __init__(self, buffer: GpuMappedBuffer, start: int) -> None:
        self.buffer = buffer
        self.start = start
        self.expected: bytes | None = bytes(REGION)

    def now(self) -> bytes:
        """What it has."""
        with self.buffer.view() as view:
            return bytes(view[self.start : self.start + REGION])

    def settle(self, library: Library) -> None:
        """WrongError if anything was written since the last read was done."""
        if self.expected is not None:
            now = self.now()
            if now != self.expected:
                raise WrongError(
                    "something wrote into a buffer when no read was under way: "
                    + library.difference(now, self.expected)
                )


class Attempt:
    """A read of some parts of a file into a region: all of one call."""

    def __init__(self, library: Library, file: File, region: Region, parts: list[Part]) -> None:
        self._library = library
        self._file = file
        self._region = region
        self._parts = parts
        self._before, region.expected = region.expected, None

    def _columns(self) -> tuple[list[int], list[int], list[int]]:
        parts = self._parts
        return [p.offset for p in parts], [p.size for p in parts], [p.target for p in parts]

    def make(self, timeout: float | None = None) -> None:
        """Make the call, and see what came."""
        buffer, (offset, size, target) = self._region.buffer, self._parts[0]
        if len(self._parts) == 1:
            result = self._file.read_into(
                buffer, offset=offset, size=size, target_offset=target, timeout=timeout
            )
        else:
            result = self._file.read_many_into(buffer, *self._columns(), timeout=timeout)
        self._check(result.nbytes)

    async def make_async(self) -> None:
        """The same, by the call for asyncio."""
        buffer, (offset, size, target) = self._region.buffer, self._parts[0]
        if len(self._parts) == 1:
            result = await self._file.read_into_async(
                buffer, offset=offset, size=size, target_offset=target
            )
        else:
            result = await self._file.read_many_into_async(buffer, *self._columns())
        self._check(result.nbytes)

    def _check(self, nbytes: int) -> None:
        total = sum(part.size for part in self._parts)
        if nbytes != total:
            raise WrongError("a read says another number of bytes", nbytes, total)
        region, path = self._region, self._file.path
        now = region.now()
        should = bytearray(self._before or now)
        for offset, size, target in self._parts:
            start = target - region.start
            self._library.compare(now[start : start + size], path, offset, "a read")
            should[start : start + size] = now[start : start + size]
        if now != should:
            beside = self._library.difference(now, bytes(should))
            raise WrongError(f"a read wrote beside its parts: {beside}", path, self._parts)
        region.expected = now


class Place:
    """A buffer, with a region for each reader and a gap behind each."""

    def __init__(self, readers: int) -> None:
        self.buffer = GpuMappedBuffer.from_host_visible(readers * (REGION + _GAP))
        self.regions = [Region(self.buffer, reader * (REGION + _GAP)) for reader in range(readers)]

    def check(self) -> None:
        """WrongError if anything was written into a gap."""
        with self.buffer.view() as view:
            for region in self.regions:
                end = region.start + REGION
                if any(view[end : end + _GAP]):
                    raise WrongError("a read wrote beyond its part of a buffer", region.start)


class Course:
    """What a stream is to bring, in order."""

    def __init__(self, library: Library, ranges: Iterable[tuple[str, int, int]]) -> None:
        """`ranges` are paths, offsets and sizes."""
        self._library = library
        self._left = deque(ranges)

    def take(self, chunk: Chunk) -> None:
        """WrongError if this is not the next chunk."""
        if not self._left:
            raise WrongError("a stream brought more than there is", chunk)
        path, offset, size = self._left.popleft()
        if (chunk.file, chunk.offset) != (path, offset) or chunk.nbytes > size:
            raise WrongError("a stream left something out", chunk, path, offset, size)
        try:
            got = bytes(chunk.view)
        except ValueError as error:
            raise ValueError("the chunk was released: its stream is closed") from error
        self._library.compare(got, path, offset, "a chunk")
        if chunk.nbytes < size:
            self._left.appendleft((path, offset + chunk.nbytes, size - chunk.nbytes))

    def end(self) -> None:
        """WrongError if there should have been more."""
        if self._left:
            raise WrongError("a stream ended before its end", *self._left)


class Shown:
    """A stream that others may close, and its reader closes."""

    def __init__(self, stream: ChunkStream) -> None:
        self.stream = stream
        self.closed = False

    def close(self) -> None:
        """Close it, in whatever thread."""
        self.closed = True
        self.stream.close()

    def __enter__(self) -> ChunkStream:
        return self.stream

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> ChunkStream:
        return self.stream

    async def __aexit__(self, *exception: object) -> None:
        self.closed = True
        await self.stream.aclose()
