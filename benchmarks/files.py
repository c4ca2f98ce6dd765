"""Rows of file reads from the page cache: a copy of 4 KiB each, and what leads to it."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import gdsdirect
from benchmarks import packages, scratch
from benchmarks.rows import Bound, Contestant, Pair, Row
from benchmarks.yardstick import RECORD_BYTES, Loop, Work
from gdsdirect import AsyncUringStream, File, GpuMappedBuffer

_FILE = 64 << 20
_NBYTES = 4096
_READS = 4096
_BATCH = 64
_PACKAGES = (packages.liburing, packages.caio_ring, packages.caio_tasks)


def _cached_file(folder: Path) -> Path:
    path = folder / "contents"
    path.write_bytes(random.Random(_FILE).randbytes(_FILE))
    path.read_bytes()
    return path


def _ours(
    stream: AsyncUringStream, file: File | BinaryIO, offsets: array[int], targets: array[int]
) -> Callable[[], None]:
    records = bytearray(_BATCH * RECORD_BYTES)
    every = [
        (memoryview(offsets)[start : start + _BATCH], memoryview(targets)[start : start + _BATCH])
        for start in range(0, len(offsets), _BATCH)
    ]

    def run() -> None:
        submit, wait = stream.submit_reads_fixed, stream.wait_into
        for some_offsets, some_targets in every:
            submit(file, some_offsets, _NBYTES, some_targets)
            wait(records, _BATCH)

    return run


def _preadv(fd: int, slots: Sequence[memoryview], offsets: array[int]) -> Callable[[], None]:
    every = [([slots[i % _BATCH]], offset) for i, offset in enumerate(offsets)]

    def run() -> None:
        preadv = os.preadv
        for target, offset in every:
            if preadv(fd, target, offset) != _NBYTES:
                raise RuntimeError("preadv: a short read")

    return run


def _offsets() -> array[int]:
    chance = random.Random(_READS)
    return array("Q", (chance.randrange(0, _FILE, _NBYTES) for _ in range(_READS)))


@contextmanager
def cached() -> Iterator[Row]:
    offsets = _offsets()
    targets = array("Q", (i % _BATCH * _NBYTES for i in range(_READS)))
    with ExitStack() as stack:
        folder = stack.enter_context(scratch.folder())
        path = _cached_file(Path(folder))
        file = stack.enter_context(File(path, direct=False))
        buffer = stack.enter_context(GpuMappedBuffer.from_host_visible(_BATCH * _NBYTES))
        stream = stack.enter_context(AsyncUringStream(buffer, _BATCH))
        addresses = array("Q", (buffer.address + target for target in targets))
        work = Work(offsets, addresses, _NBYTES, depth=_BATCH, batch=_BATCH)
        loop = stack.enter_context(Loop([str(path)], buffer, work))

        ours = Contestant("gdsdirect", _ours(stream, file, offsets, targets), _READS)
        pairs = [Pair(ours, Contestant("C loop", loop.run, _READS), Bound(1.03))]
        plain = stack.enter_context(path.open("rb"))
        unregistered = Contestant(
            "gdsdirect, a file object", _ours(stream, plain, offsets, targets), _READS
        )
        pairs.append(Pair(unregistered, pairs[0].over))
        omitted = []
        for package in _PACKAGES:
            try:
                other = package(file.fileno(), offsets, _NBYTES, _BATCH)
                pairs.append(Pair(ours, stack.enter_context(other), Bound(1)))
            except packages.NotInstalledError as missing:
                omitted.append(str(missing))
        view = stack.enter_context(buffer.view())
        slots = [
            stack.enter_context(view[target : target + _NBYTES]) for target in targets[:_BATCH]
        ]
        preadv = _preadv(file.fileno(), slots, offsets)
        pairs.append(Pair(ours, Contestant("os.preadv", preadv, _READS)))
        yield Row(
            f"4 KiB of a cached file, {_BATCH} a batch", tuple(pairs), tuple(dict.fromkeys(omitted))
        )


@contextmanager
def singly() -> Iterator[Row]:
    """One call a read, as a user makes it who wants only that. The C loop is what a ring takes."""
    offsets = _offsets()
    with ExitStack() as stack:
        path = _cached_file(Path(stack.enter_context(scratch.folder())))
        file = stack.enter_context(gdsdirect.open(path, direct=False))
        buffer = stack.enter_context(GpuMappedBuffer.from_host_visible(_NBYTES))

        def ours() -> None:
            for offset in offsets:
                if file.read_into(buffer, offset=offset, size=_NBYTES).nbytes != _NBYTES:
                    raise RuntimeError("read_into: a short read")

        view = stack.enter_context(buffer.view())
        preadv = _preadv(file.fileno(), [view] * _BATCH, offsets)
        one = Contestant("os.preadv", preadv, _READS)
        read_into = Contestant("file.read_into", ours, _READS)
        work = Work(offsets, array("Q", [buffer.address] * _READS), _NBYTES)
        loop = stack.enter_context(Loop([str(path)], buffer, work))
        pairs = (
            Pair(read_into, one, Bound(6)),
            Pair(Contestant("C loop", loop.run, _READS), one),
        )
        yield Row("4 KiB of a cached file, one at a time", pairs)
