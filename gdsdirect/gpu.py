"""Reads into GPU memory: by cuFile where that is direct, else through page-locked slots."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING

from gdsdirect import cufile
from gdsdirect.chunks import host_stream_of
from gdsdirect.cuda import LEGACY, Copies, Device, DeviceMemory, Event, device, stream_handle
from gdsdirect.errors import CudaError, WayClosedError
from gdsdirect.memory import GpuMappedBuffer
from gdsdirect.plan import Range
from gdsdirect.relay import UndrainedError, relay
from gdsdirect.stream import DataPath
from gdsdirect.supply import GRAIN, OneFile
from gdsdirect.transfer import ReadResult, Require, permitted, result_of

if TYPE_CHECKING:
    from gdsdirect.file import File

_SLOT = 1 << 20  # bytes of a chunk: as large as a read of a file is
_SLOTS = 64


class Slots:
    """Memory that one transfer's chunks go through, and the stream that they are copied on."""

    def __init__(self, gpu: Device) -> None:
        self.buffer = GpuMappedBuffer.from_host_visible(_SLOTS * _SLOT, device=gpu.ordinal)
        self.copies = Copies(gpu)


class Pool:
    """A device's slots: made when all are in use, and kept for the transfers to come."""

    def __init__(self, gpu: Device) -> None:
        self._gpu = gpu
        self._lock = threading.Lock()
        self._free: list[Slots] = []
        # With the event that tells when their copies are done.
        self._busy: list[tuple[Event, Slots]] = []
        self._lost: list[object] = []

    def take(self) -> Slots:
        """Slots that nothing uses."""
        with self._lock:
            self._collect()
            if self._free:
                return self._free.pop()
        return Slots(self._gpu)

    def give_back(self, slots: Slots) -> None:
        """Nothing uses them any more."""
        with self._lock:
            self._free.append(slots)

    def lend(self, slots: Slots, memory: DeviceMemory, until: Event) -> None:
        """They are in use until the event; so is `memory`, which the event keeps."""
        until.keep(memory)
        with self._lock:
            self._busy.append((until, slots))
        _pools.watch_the_end()

    def lose(self, slots: Slots, memory: DeviceMemory) -> None:
        """Nobody can tell whether they are in use: they stay, as does `memory`."""
        with self._lock:
            self._lost.append((slots, memory))

    def _collect(self) -> None:
        busy, self._busy = self._busy, []
        for entry in busy:
            until, slots = entry
            try:
                done = until.query()
            except CudaError:  # the copies' own error, which the event's owner sees too
                self._lost.append(entry)
                continue
            if done:
                self._free.append(slots)
            else:
                self._busy.append(entry)

    def drain(self) -> None:
        """Wait for all copies."""
        for until, _ in self._busy:
            if not self._gpu.forked():
                with contextlib.suppress(CudaError):
                    until.synchronize()


class Pools:
    """The pools of all devices."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_ordinal: dict[int, Pool] = {}
        self._watches_the_end = False

    def of(self, gpu: Device) -> Pool:
        """The device's."""
        with self._lock:
            return self._by_ordinal.setdefault(gpu.ordinal, Pool(gpu))

    def watch_the_end(self) -> None:
        """See to it that the interpreter's end waits for copies before it unregisters their slots.

        What is called there is called in reverse order, and slots have been registered before.
        """
        with self._lock:
            if not self._watches_the_end:
                self._watches_the_end = True
                atexit.register(self.drain)

    def drain(self) -> None:
        """Wait for all copies on streams of others."""
        for pool in list(self._by_ordinal.values()):
            pool.drain()


_pools = Pools()


def pool_of(gpu: Device) -> Pool:
    """The slots for transfers into a device's memory."""
    return _pools.of(gpu)


def read_into(
    file: File,
    target: object,
    *,
    offset: int,
    size: int | None,
    target_offset: int,
    require: Require,
    stream: object,
) -> ReadResult:
    """`File.read_into` for GPU memory."""
    handle = None if stream is None else stream_handle(stream)
    memory = DeviceMemory.of(target, stream=LEGACY if handle is None else handle)
    wanted = file._range(memory, offset, size, target_offset)
    ways = permitted(require)
    obstacle = "require= leaves it out"
    if ways is None or DataPath.CUFILE in ways:
        try:
            return _by_cufile(file, memory, wanted, handle)
        except cufile.RefusedError as refused:
            obstacle = str(refused)
    try:
        return _by_relay(file, memory, wanted, ways_to_slots(ways), handle, obstacle)
    except WayClosedError as error:
        if ways is None or DataPath.CUFILE not in ways:
            raise
        closed = {**error.obstacles, DataPath.CUFILE.name: obstacle}
        raise WayClosedError(file.path, closed) from None


def ways_to_slots(ways: Collection[DataPath] | None) -> Collection[DataPath] | None:
    """Of the ways that are allowed, those that lead into memory of the host."""
    return None if ways is None else [way for way in ways if way is not DataPath.CUFILE]


# ---- cuFile


def _by_cufile(file: File, memory: DeviceMemory, wanted: Range, handle: int | None) -> ReadResult:
    """All of it by cuFile, or RefusedError."""
    opened = _handle_of(file)
    gpu = device(memory.device)
    # It knows nothing of streams: whatever is to come before, comes before.
    Copies(gpu, memory.after).drain()
    nbytes = opened.read(memory, wanted, gpu)
    event = None if handle is None else Copies(gpu, handle).mark()
    ways = {DataPath.CUFILE: nbytes} if nbytes else {}
    return ReadResult(nbytes, DataPath.CUFILE, None, 0, ways, event)


def _handle_of(file: File) -> cufile.Handle:
    """What cuFile has of the file, registered at its first read; RefusedError where it has none."""
    origin = file._origin
    if origin.namespace is not None:
        raise cufile.RefusedError("cuFile reads files, not a namespace's character device")
    if origin.undirected is not None:
        raise cufile.RefusedError(origin.undirected)
    obstacle = cufile.library.obstacle()
    if obstacle is not None:
        raise cufile.RefusedError(obstacle)
    with file._cufile_lock:
        if file._cufile is None:
            try:
                file._cufile = cufile.Handle(origin.source)
            except cufile.RefusedError as refused:
                file._cufile = refused
        found = file._cufile
    if isinstance(found, cufile.RefusedError):
        raise cufile.RefusedError(str(found))
    return found


# ---- Relay


def _by_relay(
    file: File,
    memory: DeviceMemory,
    wanted: Range,
    ways: Collection[DataPath] | None,
    handle: int | None,
    obstacle: str,
) -> ReadResult:
    """All of it through slots; on the stream `handle`, or else until it is there."""
    if ways is not None and not ways:
        raise WayClosedError(file.path, {})
    gpu = device(memory.device)
    pool = pool_of(gpu)
    theirs = None if handle is None else Copies(gpu, handle)
    if theirs is not None:
        theirs.mark()  # raises for a stream of another device, before anything is under way
    slots = pool.take()
    try:
        copies = theirs or slots.copies
        copies.follow(memory.after)
        whole = wanted._replace(size=max(0, min(wanted.size, file.size - wanted.offset)))
        with host_stream_of(
            slots.buffer,
            _SLOT,
            lambda most, ways: OneFile(
                file._origin, whole, most, ways, even_if_empty=whole.size == 0
            ),
            ways,
            aligned=wanted.offset % GRAIN == 0,
        ) as chunks:
            place = memory.address + wanted.target
            relayed = relay(chunks, copies, wanted.offset, place, wait=handle is None)
    except UndrainedError as error:
        pool.lose(slots, memory)
        raise error.cause from None
    except BaseException:
        pool.give_back(slots)
        raise
    if relayed.mark is None:
        pool.give_back(slots)
    else:
        pool.lend(slots, memory, relayed.mark)
    nbytes, reasons = relayed.nbytes, [f"CUFILE is closed: {obstacle}", *relayed.reasons]
    return result_of(nbytes, relayed.ways, relayed.path, reasons, nbytes, relayed.mark)
