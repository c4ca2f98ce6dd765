"""Bench: how fast a path is read, for each way, block size and number of reads in flight.

So that the drive is measured and not Python, reads go out and come back in batches, as slices of
arrays that are made before the clock runs: no object is made for a single one.
"""

from __future__ import annotations

import platform
import random
import statistics
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from gdsdirect._nvme_sqe import encode_nvme_read_sqes
from gdsdirect.errors import completion_error
from gdsdirect.memory import GpuMappedBuffer, MemoryKind
from gdsdirect.origin import Origin
from gdsdirect.shared_ring import ring_of
from gdsdirect.stream import COMPLETION_FORMAT, AsyncUringStream, DataPath

_PLACES = 1 << 18  # reads that are laid out for a round; those that follow are the same again
_WARM_UP = 0.1  # of the seconds that are measured
_PAGE = 4096
_MOST_BYTES = 0x7FFFF000  # of one read of a file: MAX_RW_COUNT, include/linux/fs.h
_GIB = 1 << 30
_RECORD = struct.Struct("=" + COMPLETION_FORMAT)

# FILE_FIXED and FILE_DIRECT differ by it; else memory is registered if that works.
_REGISTER = {DataPath.FILE_FIXED: True, DataPath.FILE_DIRECT: False}


class Pattern(StrEnum):
    """Where one read begins after another."""

    RANDOM = "random"
    """At any block of the path."""

    SEQUENTIAL = "sequential"
    """Where the one before ends, from a random block on."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is to be measured.

    Each combination of `ways`, `block_sizes` (bytes) and `depths` (reads in flight, 1..32768) is a
    cell, measured for `seconds` in each of `rounds`. `peer` is the file that maps to peer memory,
    None for host memory. `seed` decides the places and the cells' order.
    """

    path: str
    ways: Sequence[DataPath]
    block_sizes: Sequence[int]
    depths: Sequence[int]
    pattern: Pattern
    seconds: float
    rounds: int
    seed: int
    peer: str | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """Reads of `block_size` bytes by one way, `depth` of them in flight at any time."""

    way: DataPath
    block_size: int
    depth: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"way": self.way.value, "block_size": self.block_size, "depth": self.depth}


@dataclass(frozen=True, slots=True)
class Round:
    """`reads` that came back whole in `seconds`, and what they cost this process, in seconds."""

    reads: int
    seconds: float
    cpu_seconds: float

    @property
    def iops(self) -> float:
        """Reads a second."""
        return self.reads / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "reads": self.reads,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "iops": self.iops,
        }


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell's figures: medians of its rounds. `registered` tells of the memory read into."""

    cell: Cell
    registered: bool
    rounds: tuple[Round, ...]

    @property
    def iops(self) -> float:
        """Reads a second."""
        return statistics.median(each.iops for each in self.rounds)

    @property
    def bytes_per_second(self) -> float:
        """Bytes a second."""
        return self.iops * self.cell.block_size

    @property
    def mean_latency(self) -> float:
        """Seconds from a read's submission until it is seen to be back, by Little's law."""
        return self.cell.depth / self.iops

    @property
    def cpu_seconds_per_gib(self) -> float:
        """Seconds of this process, kernel included, for 1 GiB."""
        size = self.cell.block_size
        return statistics.median(
            each.cpu_seconds * _GIB / (each.reads * size) for each in self.rounds
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.cell.to_dict(),
            "registered": self.registered,
            "iops": self.iops,
            "bytes_per_second": self.bytes_per_second,
            "mean_latency_seconds": self.mean_latency,
            "cpu_seconds_per_gib": self.cpu_seconds_per_gib,
            "rounds": [each.to_dict() for each in self.rounds],
        }


@dataclass(frozen=True, slots=True)
class Results:
    """What was measured, and why other cells were not.

    `closed` has the ways that lead nowhere from this path into this memory, `refused` the ways
    and block sizes that the path doesn't take, `failed` the cells in which a read did not bring
    all of its bytes, each with its reason. `size` is the path's, in bytes.
    """

    settings: Settings
    size: int
    memory: MemoryKind
    kernel: str
    cells: tuple[Measured, ...]
    closed: dict[DataPath, str]
    refused: dict[tuple[DataPath, int], str]
    failed: dict[Cell, str]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values, as `gdsdirect bench --json` writes."""
        settings = self.settings
        return {
            "path": settings.path,
            "size": self.size,
            "memory": self.memory.value,
            "pattern": settings.pattern.value,
            "seconds": settings.seconds,
            "rounds": settings.rounds,
            "seed": settings.seed,
            "kernel": self.kernel,
            "cells": [each.to_dict() for each in self.cells],
            "closed": [{"way": way.value, "why": why} for way, why in self.closed.items()],
            "refused": [
                {"way": way.value, "block_size": block_size, "why": why}
                for (way, block_size), why in self.refused.items()
            ],
            "failed": [{**cell.to_dict(), "why": why} for cell, why in self.failed.items()],
        }


class Bench:
    """A path, open to be measured: `cells` are those that it and the memory take.

    The errors of `gdsdirect.open` and `GpuMappedBuffer.from_bar1_peer` for what can't be opened.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._origin = Origin(settings.path, direct=True)
        try:
            self._size = self._origin.size
            with self._memory(_PAGE) as buffer:
                ring = ring_of(buffer)
                obstacles = {way: self._origin.obstacle(way, ring) for way in settings.ways}
                self._kind = buffer.kind
        except BaseException:
            self._origin.close()
            raise
        self._closed = {way: why for way, why in obstacles.items() if why is not None}
        refusals = {
            (way, block_size): self._refusal(way, block_size)
            for block_size in settings.block_sizes
            for way in settings.ways
            if way not in self._closed
        }
        self._refused = {key: why for key, why in refusals.items() if why is not None}
        self.cells = tuple(
            Cell(*key, depth)
            for key in refusals
            if key not in self._refused
            for depth in settings.depths
        )

    def _memory(self, nbytes: int) -> GpuMappedBuffer:
        if self._settings.peer is None:
            return GpuMappedBuffer.from_host_visible(nbytes)
        return GpuMappedBuffer.from_bar1_peer(self._settings.peer, nbytes)

    def _refusal(self, way: DataPath, block_size: int) -> str | None:
        """Why the path takes no reads of this size by this way; None: it does."""
        if block_size > self._size:
            return f"the path has no more than {self._size} bytes"
        if way is not DataPath.BUFFERED and block_size % self._origin.alignment:
            return f"direct reads of it are multiples of {self._origin.alignment} bytes"
        namespace = self._origin.namespace
        most = _MOST_BYTES if namespace is None else namespace.max_transfer
        if block_size > most:
            return f"one read brings {most} bytes at most"
        return None

    def run(self, advance: Callable[[], object]) -> Results:
        """Measure all cells; `advance` is called after each of them in each round.

        A cell in which a read fails is told of as failed and tried no more.
        """
        settings, chance = self._settings, random.Random(self._settings.seed)
        rounds: dict[Cell, list[Round]] = {cell: [] for cell in self.cells}
        registered: dict[Cell, bool] = {}
        failed: dict[Cell, str] = {}
        for _ in range(settings.rounds):
            # In another order each time, so that no cell has the same disturbance in all rounds.
            for cell in chance.sample(self.cells, len(self.cells)):
                if cell not in failed:
                    try:
                        taken, registered[cell] = self._round(cell, chance)
                        rounds[cell].append(taken)
                    except (OSError, ValueError) as error:
                        strerror = error.strerror if isinstance(error, OSError) else None
                        failed[cell] = strerror or str(error)
                advance()
        return Results(
            settings,
            self._size,
            self._kind,
            platform.release(),
            tuple(
                Measured(cell, registered[cell], tuple(taken))
                for cell, taken in rounds.items()
                if cell not in failed
            ),
            self._closed,
            self._refused,
            {cell: failed[cell] for cell in self.cells if cell in failed},
        )

    def _round(self, cell: Cell, chance: random.Random) -> tuple[Round, bool]:
        """A round of one cell, and whether its memory is registered."""
        # Whole pages, since O_DIRECT can want more of an address than of a size.
        stride = -(-cell.block_size // _PAGE) * _PAGE
        register = _REGISTER.get(cell.way)
        with (
            self._memory(cell.depth * stride) as buffer,
            AsyncUringStream(buffer, cell.depth, register=register) as stream,
        ):
            flight = _Flight(self._origin, cell, stream, self._places(cell, chance), stride)
            flight.run(self._settings.seconds * _WARM_UP)
            return flight.run(self._settings.seconds), stream.registered

    def _places(self, cell: Cell, chance: random.Random) -> array[int]:
        """Where reads begin: bytes of a file, blocks of a namespace.

        The last `depth` are the first ones again, so that a batch can begin at each of the others.
        """
        namespace = self._origin.namespace
        step = cell.block_size // (1 if namespace is None else namespace.lba_size)
        blocks = self._size // cell.block_size
        count = _PLACES // cell.depth * cell.depth
        if self._settings.pattern is Pattern.RANDOM:
            places = array("Q", chance.choices(range(0, blocks * step, step), k=count))
        else:
            first = chance.randrange(blocks)
            places = array("Q", ((first + turn) % blocks * step for turn in range(count)))
        return places + places[: cell.depth]

    # ---- The end

    def close(self) -> None:
        """Close the path."""
        self._origin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Flight:
    """`depth` reads in flight, each followed by another when it is back.

    The n-th goes to the (n mod depth)-th place of the buffer. Where one is overtaken by those that
    came after it, two in flight share a place: nobody looks at the bytes.
    """

    def __init__(
        self,
        origin: Origin,
        cell: Cell,
        stream: AsyncUringStream,
        places: array[int],
        stride: int,
    ) -> None:
        self._origin = origin
        self._cell = cell
        self._stream = stream
        self._places = places
        self._next = 0
        self._records = bytearray(cell.depth * _RECORD.size)
        # The third field of each record, compared without an object for any.
        self._came = memoryview(self._records).cast("I")[3::4]
        self._whole = memoryview(array("I", [cell.block_size]) * cell.depth)
        self._submit = self._submitter(stride)
        self._refill(cell.depth)

    def _submitter(self, stride: int) -> Callable[[int, int], object]:
        """Submits the reads from one number to another; user_data is a read's number."""
        origin, cell, stream = self._origin, self._cell, self._stream
        first = 0 if origin.namespace is None else stream.buffer.address
        targets = array("Q", range(first, first + cell.depth * stride, stride))
        targets *= len(self._places) // cell.depth
        if origin.namespace is not None:
            namespace = origin.namespace
            blocks = cell.block_size // namespace.lba_size
            commands = memoryview(
                encode_nvme_read_sqes(namespace.nsid, self._places, blocks, targets)
            )
            send = stream.submit_nvme_passthrough
            return lambda start, stop: send(
                namespace, commands[start * 64 : stop * 64], user_data=start
            )
        source = origin.buffered if cell.way is DataPath.BUFFERED else origin.source
        read = stream.submit_reads_fixed if stream.registered else stream.submit_reads
        offsets, into = memoryview(self._places), memoryview(targets)
        return lambda start, stop: read(
            source, offsets[start:stop], cell.block_size, into[start:stop], user_data=start
        )

    def _refill(self, count: int) -> None:
        self._submit(self._next, self._next + count)
        self._next = (self._next + count) % (len(self._places) - self._cell.depth)

    def run(self, seconds: float) -> Round:
        """Go on for so many seconds; OSError for a read that did not bring all of its bytes."""
        wait, refill, now = self._stream.wait_into, self._refill, time.perf_counter
        records, came, whole = self._records, self._came, self._whole
        reads = 0
        cpu, begun = time.process_time(), now()
        while (passed := now() - begun) < seconds or reads == 0:
            count = wait(records)
            if came[:count] != whole[:count]:
                raise self._error(count)
            refill(count)
            reads += count
        return Round(reads, passed, time.process_time() - cpu)

    def _error(self, count: int) -> OSError:
        """Of the first of `count` records that tells of one."""
        expected, namespace = self._cell.block_size, self._origin.namespace
        number, result, nbytes = next(
            record
            for record in _RECORD.iter_unpack(self._records[: count * _RECORD.size])
            if record[2] != expected
        )
        place, path = self._places[number], self._origin.path
        peer = self._stream.buffer.kind is MemoryKind.BAR1_PEER
        if namespace is None:
            return completion_error(result, nbytes, expected, path=path, offset=place, peer=peer)
        return completion_error(
            result,
            nbytes,
            expected,
            path=path,
            namespace_id=namespace.nsid,
            starting_lba=place,
            blocks=expected // namespace.lba_size,
            peer=peer,
        )
