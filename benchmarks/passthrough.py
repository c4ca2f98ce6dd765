"""Rows of passthrough commands to /dev/null, which completes each at once: what is left is cost."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from benchmarks.rows import Bound, Contestant, Pair, Row
from benchmarks.yardstick import RECORD_BYTES, SINGLE_THREAD, Loop, Work
from gdsdirect import (
    AsyncUringStream,
    Geometry,
    GpuMappedBuffer,
    Namespace,
    encode_nvme_read_sqe,
    encode_nvme_read_sqes,
)

NULL = "/dev/null"
GEOMETRY = Geometry(nsid=1, lba_size=512, capacity=1 << 40, max_transfer=1 << 20)
BLOCKS = 8
NBYTES = 4096
BUFFER = 1 << 20
_COMMANDS = 8192
_WIRE_BYTES = 64

_BATCHES = (1, 8, 32, 64, 128)
_BOUNDS = {1: Bound(1.7), 64: Bound(1.12)}


def pieces(buffer: GpuMappedBuffer, n: int) -> tuple[array[int], array[int]]:
    """Blocks anywhere on the drive, and places in the buffer, round and round."""
    chance = random.Random(n)
    slots = buffer.nbytes // NBYTES
    lbas = array("Q", (chance.randrange(0, 1 << 36, BLOCKS) for _ in range(n)))
    return lbas, array("Q", (buffer.address + i % slots * NBYTES for i in range(n)))


def _singly(
    stream: AsyncUringStream, namespace: Namespace, lbas: array[int], addresses: array[int]
) -> Callable[[], None]:
    nsid = namespace.nsid
    record = bytearray(RECORD_BYTES)
    every = list(zip(lbas, addresses, strict=True))

    def run() -> None:
        encode, wait = encode_nvme_read_sqe, stream.wait_into
        submit = stream.submit_nvme_passthrough
        for lba, address in every:
            submit(namespace, encode(nsid, lba, BLOCKS, address))
            wait(record)

    return run


def _in_batches(
    stream: AsyncUringStream,
    namespace: Namespace,
    lbas: array[int],
    addresses: array[int],
    batch: int,
) -> Callable[[], None]:
    nsid = namespace.nsid
    wire, records = bytearray(batch * _WIRE_BYTES), bytearray(batch * RECORD_BYTES)
    every = [
        (memoryview(lbas)[start : start + batch], memoryview(addresses)[start : start + batch])
        for start in range(0, len(lbas), batch)
    ]

    def run() -> None:
        encode, wait = encode_nvme_read_sqes, stream.wait_into
        submit = stream.submit_nvme_passthrough
        for some_lbas, some_addresses in every:
            encode(nsid, some_lbas, BLOCKS, some_addresses, wire)
            submit(namespace, wire)
            wait(records, batch)

    return run


def _pair(batch: int, single_thread: bool, stack: ExitStack) -> Pair:
    namespace = stack.enter_context(Namespace(NULL, geometry=GEOMETRY))
    buffer = stack.enter_context(GpuMappedBuffer.from_host_visible(BUFFER))
    stream = AsyncUringStream(buffer, batch, single_thread=single_thread)
    stack.enter_context(stream)
    lbas, addresses = pieces(buffer, _COMMANDS)
    if batch == 1:
        ours = _singly(stream, namespace, lbas, addresses)
    else:
        ours = _in_batches(stream, namespace, lbas, addresses, batch)
    work = Work(lbas, addresses, NBYTES, BLOCKS, (GEOMETRY.nsid,), batch, batch)
    loop = Loop([NULL], buffer, work, SINGLE_THREAD if single_thread else 0)
    stack.enter_context(loop)
    return Pair(
        Contestant(f"gdsdirect, {batch} a batch", ours, _COMMANDS),
        Contestant(f"C loop, {batch} a batch", loop.run, _COMMANDS),
        _BOUNDS.get(batch),
    )


@contextmanager
def commands(title: str, single_thread: bool) -> Iterator[Row]:
    with ExitStack() as stack:
        yield Row(title, tuple(_pair(batch, single_thread, stack) for batch in _BATCHES))


ROWS = (
    partial(commands, "commands to /dev/null", single_thread=False),
    partial(commands, "commands to /dev/null, single_thread", single_thread=True),
)
