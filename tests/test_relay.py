"""The relay without CUDA: chunks of real files, and copies that a thread does."""

import ctypes
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gdsdirect
from gdsdirect import ChunkStream, DataPath, GpuMappedBuffer
from gdsdirect.relay import Relayed, UndrainedError, relay

DATA = random.Random(3).randbytes((1 << 20) + 333)
SLOT = 64 << 10


class Mark:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None

    def query(self) -> bool:
        if self.done.is_set() and self.error is not None:
            raise self.error
        return self.done.is_set()

    def synchronize(self) -> None:
        assert self.done.wait(30)
        self.query()


class Copier:
    """Copies by a thread, in order, each after `delay` seconds and when the gate is open."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.gate = threading.Event()
        self.gate.set()
        self.pending = self.most_pending = self.started = 0
        self.raise_at: int | None = None
        self.fail_at: int | None = None
        self.undrainable = False
        self._work: queue.Queue[tuple[int, int, int, Mark] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for source, target, nbytes, mark in iter(self._work.get, None):
            assert self.gate.wait(30)
            time.sleep(self.delay)
            ctypes.memmove(target, source, nbytes)
            self.pending -= 1
            mark.done.set()

    def copy(self, source: int, target: int, nbytes: int) -> Mark:
        if self.started == self.raise_at:
            raise RuntimeError("this copy can't be started")
        mark = Mark()
        if self.started == self.fail_at:
            mark.error = RuntimeError("this copy failed")
        self.started += 1
        self.pending += 1
        self.most_pending = max(self.most_pending, self.pending)
        self._work.put((source, target, nbytes, mark))
        return mark

    def mark(self) -> Mark:
        mark = Mark()
        self._work.put((0, 0, 0, mark))
        self.pending += 1
        return mark

    def drain(self) -> None:
        if self.undrainable:
            raise RuntimeError("nobody can tell")
        last = self.mark()
        last.synchronize()

    def close(self) -> None:
        self.gate.set()
        self._work.put(None)
        self._thread.join()


@pytest.fixture
def copier() -> Iterator[Copier]:
    made = Copier()
    yield made
    made.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("relay") / "file"
    made.write_bytes(DATA)
    return made


class Target:
    """Memory that copies go into, and nothing beside it."""

    def __init__(self, nbytes: int) -> None:
        self.memory = bytearray(b"\xa5" * (nbytes + 200))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + 100

    def found(self) -> bytes:
        assert not (self.memory[:100] + self.memory[-100:]).strip(b"\xa5")
        return bytes(self.memory[100:-100])


def run(
    path: Path, copier: Copier, target: Target, slots: int, offset: int, size: int, *, wait: bool
) -> Relayed[Mark]:
    room = SLOT + (4096 if offset % 4096 else 0)
    with (
        GpuMappedBuffer.from_host_visible(slots * room) as buffer,
        gdsdirect.open(path) as file,
        file.stream(buffer, chunk_size=SLOT, offset=offset, size=size) as stream,
    ):
        relayed = relay(stream, copier, offset, target.address, wait=wait)
        if relayed.mark is not None:
            relayed.mark.synchronize()
        return relayed


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 3, 16])
@pytest.mark.parametrize(("offset", "size"), [(0, len(DATA)), (777, 500_000), (4096, 5), (9, 0)])
def test_all_bytes_arrive(
    offset: int, size: int, slots: int, wait: bool, path: Path, copier: Copier
) -> None:
    copier.delay = 0.001
    target = Target(size)
    relayed = run(path, copier, target, slots, offset, size, wait=wait)
    assert relayed.nbytes == size
    assert sum(relayed.ways.values()) == size
    assert (relayed.mark is None) is wait
    assert target.found() == DATA[offset : offset + size]
    assert copier.most_pending <= max(1, slots // 2 + 1)


def test_the_ways_and_reasons_are_told_once(path: Path, copier: Copier) -> None:
    target = Target(len(DATA))
    buffer = GpuMappedBuffer.from_host_visible(8 * SLOT)
    with (
        buffer,
        gdsdirect.open(path, direct=False) as file,
        file.stream(buffer, chunk_size=SLOT) as stream,
    ):
        relayed = relay(stream, copier, 0, target.address, wait=True)
    assert relayed.ways == {DataPath.BUFFERED: len(DATA)}
    assert relayed.path is DataPath.BUFFERED
    assert relayed.reasons == ["it was opened with direct=False"]


def test_reads_go_on_while_copies_pend(path: Path, copier: Copier) -> None:
    """No copy ends, and still half of the slots, and one more, are read and handed on."""
    copier.gate.clear()
    target = Target(len(DATA))
    arguments = (path, copier, target, 8, 0, len(DATA))
    thread = threading.Thread(target=run, args=arguments, kwargs={"wait": True})
    thread.start()
    deadline = time.monotonic() + 30
    while copier.started < 5:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.1)
    assert copier.started == copier.pending == 5
    copier.gate.set()
    thread.join(30)
    assert target.found() == DATA


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("how", ["raise_at", "fail_at"])
def test_errors_are_raised_once_nothing_is_under_way(
    how: str, at: int, path: Path, copier: Copier
) -> None:
    copier.delay = 0.005
    setattr(copier, how, at)
    with pytest.raises(RuntimeError, match="this copy"):
        run(path, copier, Target(len(DATA)), 8, 0, len(DATA), wait=True)
    assert copier.pending == 0


def test_errors_of_the_file_wait_for_copies_too(path: Path, copier: Copier) -> None:
    class Ending(ChunkStream):
        def __next__(self) -> gdsdirect.Chunk:
            if copier.started == 3:
                raise OSError(5, "the drive has had enough")
            return super().__next__()

    copier.delay = 0.01
    target = Target(len(DATA))
    with (
        GpuMappedBuffer.from_host_visible(8 * SLOT) as buffer,
        gdsdirect.open(path) as file,
        file.stream(buffer, chunk_size=SLOT) as stream,
    ):
        stream.__class__ = Ending
        with pytest.raises(OSError, match="had enough"):
            relay(stream, copier, 0, target.address, wait=True)
        assert copier.pending == 0
        assert target.found()[: 3 * SLOT] == DATA[: 3 * SLOT]


def test_copies_that_nobody_can_wait_for(path: Path, copier: Copier) -> None:
    copier.raise_at = 3
    copier.undrainable = True
    with (
        GpuMappedBuffer.from_host_visible(8 * SLOT) as buffer,
        gdsdirect.open(path) as file,
        file.stream(buffer, chunk_size=SLOT) as stream,
    ):
        target = Target(len(DATA))
        with pytest.raises(UndrainedError) as caught:
            relay(stream, copier, 0, target.address, wait=True)
        assert str(caught.value.cause) == "this copy can't be started"
        copier.undrainable = False
        copier.drain()
