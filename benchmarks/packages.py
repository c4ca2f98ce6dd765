"""The other Python packages that read files by io_uring, each as fast as its interface allows.

They are imported by name: they may not be installed, and the stubs of one don't parse.
"""

import asyncio
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.rows import Contestant

_IOSQE_FIXED_FILE = 1


class NotInstalledError(Exception):
    """Its text says what is missing."""


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalledError(f"{name} is left out, {error}: pip install .[bench]") from None


def _batches(offsets: Sequence[int], batch: int) -> list[list[int]]:
    return [list(offsets[start : start + batch]) for start in range(0, len(offsets), batch)]


@contextmanager
def liburing(fd: int, offsets: Sequence[int], nbytes: int, batch: int) -> Iterator[Contestant]:
    """READ_FIXED of a registered file into registered buffers."""
    lib = _package("liburing")
    ring, cqe, files = lib.Ring(), lib.Cqe(), lib.FileIndex([fd])
    targets = [bytearray(nbytes) for _ in range(batch)]
    memory = lib.Iovec(targets)
    every = [list(enumerate(some)) for some in _batches(offsets, batch)]

    def run() -> None:
        get, prepare = lib.io_uring_get_sqe, lib.io_uring_prep_read_fixed
        for some in every:
            for index, offset in some:
                sqe = get(ring)
                prepare(sqe, 0, targets[index], index, offset)
                sqe.flags = _IOSQE_FIXED_FILE
                sqe.user_data = index
            lib.io_uring_submit_and_wait(ring, batch)
            for _ in lib.CqeIter(ring, cqe):
                entry = cqe[0]
                if entry.res != nbytes:
                    raise RuntimeError(f"liburing: read {entry.user_data} gave {entry.res}")
            lib.io_uring_cq_advance(ring, batch)

    lib.io_uring_queue_init(batch, ring)
    try:
        lib.io_uring_register_ring_fd(ring)
        lib.io_uring_register_files(ring, files)
        lib.io_uring_register_buffers(ring, memory)
        yield Contestant("liburing", run, len(offsets))
    finally:
        lib.io_uring_queue_exit(ring)


@contextmanager
def caio_ring(fd: int, offsets: Sequence[int], nbytes: int, batch: int) -> Iterator[Contestant]:
    """caio's io_uring context without asyncio."""
    _package("caio")
    lib = _package("caio.linux_uring")
    context = lib.Context(batch)
    every = _batches(offsets, batch)

    def run() -> None:
        read = lib.Operation.read
        for some in every:
            operations = [read(nbytes, fd, offset) for offset in some]
            context.submit(*operations)
            done = context.flush()
            while done < batch:
                done += context.process_events(batch, 1, 1)
            for operation in operations:
                if len(operation.get_value()) != nbytes:
                    raise RuntimeError("caio: a short read")

    yield Contestant("caio, no asyncio", run, len(offsets))


@contextmanager
def caio_tasks(fd: int, offsets: Sequence[int], nbytes: int, batch: int) -> Iterator[Contestant]:
    """caio as its manual shows it, with as many tasks as a batch has reads.

    But without the kernel's polling thread, which would go on through the turns of others.
    """
    _package("caio")
    lib = _package("caio.linux_uring_asyncio")
    every = _batches(offsets, batch)

    async def make() -> Any:  # the context takes the loop that runs
        return lib.AsyncioContext(batch, sqpoll=False)

    async def read() -> None:
        for some in every:
            pieces = await asyncio.gather(*(context.read(nbytes, fd, offset) for offset in some))
            if any(len(piece) != nbytes for piece in pieces):
                raise RuntimeError("caio: a short read")

    with asyncio.Runner() as runner:
        context = runner.run(make())
        yield Contestant(f"caio, {batch} tasks", lambda: runner.run(read()), len(offsets))
        context.close()
