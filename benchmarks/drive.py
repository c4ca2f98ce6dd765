"""Rows of small reads past the page cache, of the drive that this folder is on.

Each contestant has a registered file and registered memory. The drive is what all wait for: so time
is compared where one read is waited for, and processor time where many are on their way.
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import gdsdirect
from benchmarks import scratch
from benchmarks.rows import Bound, Contestant, Pair, Row
from benchmarks.yardstick import Loop, Work
from gdsdirect import DataPath, File, GpuMappedBuffer, WayClosedError

_FILE = 256 << 20
_NBYTES = 4096
_DEPTH = 64
_WAY = DataPath.FILE_FIXED


@dataclass(frozen=True)
class _Reads:
    """Of one file, anywhere in it; the buffer has a place for each of `depth`, taken in turn."""

    file: File
    buffer: GpuMappedBuffer
    offsets: array[int]
    depth: int

    def loop(self) -> Loop:
        """By the C loop: each read that is back is followed by another."""
        first = self.buffer.address
        places = (first + i % self.depth * _NBYTES for i in range(len(self.offsets)))
        work = Work(self.offsets, array("Q", places), _NBYTES, depth=self.depth)
        return Loop([self.file.path], self.buffer, work, direct=True)


@contextmanager
def _row(
    title: str,
    reads: int,
    depth: int,
    ours: Callable[[_Reads, ExitStack], Contestant],
    bound: Bound,
    *,
    cpu: bool = False,
) -> Iterator[Row]:
    chance = random.Random(depth)
    offsets = array("Q", (chance.randrange(0, _FILE, _NBYTES) for _ in range(reads)))
    with ExitStack() as stack:
        path = Path(stack.enter_context(scratch.folder()), "contents")
        scratch.write(path, _FILE)
        scratch.forget(path)
        file = stack.enter_context(gdsdirect.open(path))
        buffer = stack.enter_context(GpuMappedBuffer.from_host_visible(depth * _NBYTES))
        try:
            file.read_into(buffer, size=_NBYTES, require=_WAY)
        except WayClosedError as error:
            yield Row(title, (), (f"{title}: {error}",))
            return
        some = _Reads(file, buffer, offsets, depth)
        loop = Contestant("C loop", stack.enter_context(some.loop()).run, reads)
        yield Row(title, (Pair(ours(some, stack), loop, bound),), cpu=cpu)


def _singly(some: _Reads, _: ExitStack) -> Contestant:
    file, buffer, offsets = some.file, some.buffer, some.offsets

    def run() -> None:
        for offset in offsets:
            result = file.read_into(buffer, offset=offset, size=_NBYTES, require=_WAY)
            if result.nbytes != _NBYTES:
                raise RuntimeError("read_into: a short read")

    return Contestant("file.read_into", run, len(offsets))


def _by_tasks(some: _Reads, stack: ExitStack) -> Contestant:
    file, buffer, offsets = some.file, some.buffer, some.offsets

    async def task(place: int) -> None:
        target = place * _NBYTES
        for offset in offsets[place :: some.depth]:
            result = await file.read_into_async(
                buffer, offset=offset, size=_NBYTES, target_offset=target, require=_WAY
            )
            if result.nbytes != _NBYTES:
                raise RuntimeError("read_into_async: a short read")

    async def every() -> None:
        await asyncio.gather(*map(task, range(some.depth)))

    runner = stack.enter_context(asyncio.Runner())
    return Contestant("read_into_async", lambda: runner.run(every()), len(offsets))


@contextmanager
def singly() -> Iterator[Row]:
    title = "4 KiB of the drive, O_DIRECT, one at a time"
    with _row(title, 256, 1, _singly, Bound(1.1)) as row:
        yield row


@contextmanager
def by_tasks() -> Iterator[Row]:
    title = f"4 KiB of the drive, O_DIRECT, {_DEPTH} tasks: processor time"
    with _row(title, 8192, _DEPTH, _by_tasks, Bound(4), cpu=True) as row:
        yield row
