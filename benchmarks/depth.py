"""Depth: what one command costs, in time and in memory, must not grow with how many are in flight.

The others in flight are reads of a pipe that nobody writes to; closing it ends them.

    python -m benchmarks.depth DEPTH    prints the memory that a full stream takes, in bytes
"""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.passthrough import BLOCKS, GEOMETRY, NBYTES, NULL
from benchmarks.results import Result
from benchmarks.rows import Bound, Contestant, Pair, Row
from benchmarks.yardstick import RECORD_BYTES
from gdsdirect import AsyncUringStream, GpuMappedBuffer, Namespace, encode_nvme_read_sqe

_DEPTHS = (1, 16, 256, 4096)
_MEMORY_DEPTHS = (1024, 4096)  # of fewer, whole pages are much of the memory
_COMMANDS = 4096
_ZEROS = memoryview(array("Q", [0] * 1024))
_FLAT = Bound(1.1)  # 1, and what runs of the same differ by


@contextmanager
def _in_flight(commands: int, depth: int) -> Iterator[tuple[AsyncUringStream, GpuMappedBuffer]]:
    """A stream of this depth with so many commands in flight."""
    reading, writing = os.pipe()
    with (
        os.fdopen(reading, "rb") as pipe,
        GpuMappedBuffer.from_host_visible(NBYTES) as buffer,
        AsyncUringStream(buffer, depth) as stream,
        os.fdopen(writing, "wb"),
    ):
        # In batches, for what a batch needs while it is submitted is not meant here.
        for start in range(0, commands, len(_ZEROS)):
            zeros = _ZEROS[: commands - start]
            stream.submit_reads_fixed(pipe, zeros, NBYTES, zeros)
        yield stream, buffer


def _one_more(
    stream: AsyncUringStream, namespace: Namespace, buffer: GpuMappedBuffer
) -> Callable[[], None]:
    record = bytearray(RECORD_BYTES)
    address = buffer.address

    def run() -> None:
        encode, wait = encode_nvme_read_sqe, stream.wait_into
        submit = stream.submit_nvme_passthrough
        for lba in range(_COMMANDS):
            submit(namespace, encode(GEOMETRY.nsid, lba, BLOCKS, address))
            wait(record)

    return run


@contextmanager
def time() -> Iterator[Row]:
    with ExitStack() as stack:
        namespace = stack.enter_context(Namespace(NULL, geometry=GEOMETRY))
        contestants = []
        for depth in _DEPTHS:
            stream, buffer = stack.enter_context(_in_flight(depth - 1, depth))
            run = _one_more(stream, namespace, buffer)
            contestants.append(Contestant(f"depth {depth:,}", run, _COMMANDS))
        first, *deeper = contestants
        yield Row(
            "one command, depth - 1 others in flight",
            tuple(Pair(contestant, first, _FLAT) for contestant in deeper),
        )


# ---- Memory


def _resident() -> int:
    """Bytes of this process that are in memory, the rings that it shares with the kernel too."""
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))


def _growth(depth: int) -> int:
    """By a second full stream, for the first one takes memory that malloc had free."""
    with _in_flight(depth, depth):
        before = _resident()
        with _in_flight(depth, depth):
            return _resident() - before


def memory(rounds: int = 3) -> list[Result]:
    """Bytes a command in flight. Each is taken in a process of its own, less what depth 1 takes.

    The kernel's own memory of a request is not in it: it is the same for every user of io_uring.
    """

    def per_command(depth: int) -> float:
        return (_ask(depth) - _ask(1)) / (depth - 1)

    base, compared = _MEMORY_DEPTHS
    figures = [(per_command(compared), per_command(base)) for _ in range(rounds)]
    ours, theirs = zip(*figures, strict=True)
    return [
        Result(
            "memory a command in flight",
            f"depth {compared:,}",
            f"depth {base:,}",
            "bytes",
            ours,
            theirs,
            _FLAT,
        )
    ]


def _ask(depth: int) -> int:
    command = [sys.executable, "-m", "benchmarks.depth", str(depth)]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


if __name__ == "__main__":
    print(_growth(int(sys.argv[1])))
