"""Rows of opening a file: what comes on top of the system calls until it can be read, and is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gdsdirect
from benchmarks import scratch
from benchmarks.rows import Bound, Contestant, Pair, Row
from gdsdirect import GpuMappedBuffer

_TIMES = 64
_NBYTES = 4096
_BUFFER = 64 << 10
_ALONE, _WITH_A_READ = Bound(60_000, unit="ns"), Bound(50_000, unit="ns")
_FLAGS = os.O_RDONLY | os.O_CLOEXEC


@contextmanager
def _row(
    title: str,
    ours: Callable[[str], object],
    name: str,
    theirs: Callable[[str], object],
    on_top: Bound,
) -> Iterator[Row]:
    with scratch.folder() as folder:
        path = str(Path(folder, "contents"))
        scratch.write(path, _BUFFER)

        def repeated(once: Callable[[str], object]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(_TIMES):
                    once(path)

            return run

        pair = Pair(
            Contestant("gdsdirect", repeated(ours), _TIMES),
            Contestant(name, repeated(theirs), _TIMES),
            on_top,
        )
        yield Row(title, (pair,))


@contextmanager
def alone() -> Iterator[Row]:
    def ours(path: str) -> None:
        gdsdirect.open(path).close()

    def theirs(path: str) -> None:
        os.close(os.open(path, _FLAGS))

    title = "open a file and close it"
    with _row(title, ours, "os.open, os.close", theirs, _ALONE) as row:
        yield row


@contextmanager
def with_a_read() -> Iterator[Row]:
    """Into memory that has no ring yet: it is made, and ended, within. Making the memory itself is
    a part of both, so that it isn't in the difference."""

    def ours(path: str) -> None:
        with (
            GpuMappedBuffer.from_host_visible(_BUFFER) as buffer,
            gdsdirect.open(path, direct=False) as file,
        ):
            file.read_into(buffer, size=_NBYTES)

    def theirs(path: str) -> None:
        with (
            GpuMappedBuffer.from_host_visible(_BUFFER) as buffer,
            buffer.view() as view,
            view[:_NBYTES] as target,
        ):
            fd = os.open(path, _FLAGS)
            os.preadv(fd, [target], 0)
            os.close(fd)

    title = "open a cached file, read 4 KiB into new memory, close both"
    with _row(title, ours, "os.open, os.preadv", theirs, _WITH_A_READ) as row:
        yield row
