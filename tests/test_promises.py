"""Promises of docs/reliability.md, each by what would be seen of it if it were broken.

On pipes, whose reads come back when a test writes there, on /dev/null and on files. Where a thread
that isn't woken would look again by itself a second later, there are so many turns that these
seconds are more than `make mutants` waits.
"""

import asyncio
import contextlib
import gc
import mmap
import os
import resource
import select
import signal
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from test_shared_ring import Pipe, buffer, pipes, reads, start, wait

from gdsdirect import (
    AsyncUringStream,
    ChunkStream,
    Completion,
    DataPath,
    File,
    Geometry,
    GpuMappedBuffer,
    Namespace,
    encode_nvme_read_sqe,
    stream_files,
)
from gdsdirect._uring_cmd import (
    Request,
    Slots,
    Source,
    Then,
    Turn,
    Watch,
    open_sources,
    read_sources,
)
from gdsdirect.shared_ring import Requests, SharedRing, ring_of
from gdsdirect.supply import Landed, Load, Loaded, Place, RingLoad

__all__ = ["buffer", "pipes"]  # fixtures

GEOMETRY = Geometry(nsid=3, lba_size=512, capacity=1000, max_transfer=64 << 10)
PATIENCE = 60.0  # seconds, for what comes at once unless it never comes


class Alarm(Exception):
    """What the signal handler raises."""


def ring_bell(_: int, __: FrameType | None) -> None:
    raise Alarm


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    """A signal interrupts what is waited for here, and must come out."""
    before = signal.signal(signal.SIGALRM, ring_bell)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Alarm):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def unreachable() -> Iterator[None]:
    """Each system call that submits to a ring fails, and takes nothing."""
    rings = [
        int(name)
        for name in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{name}")
        and os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[io_uring]"
    ]
    null = os.open("/dev/null", os.O_RDONLY)
    saved = [os.dup(fd) for fd in rings]
    for fd in rings:
        os.dup2(null, fd, inheritable=False)
    try:
        yield
    finally:
        for fd, copy in zip(rings, saved, strict=True):
            os.dup2(copy, fd, inheritable=False)
            os.close(copy)
        os.close(null)


@contextlib.contextmanager
def beside(work: Callable[[], object]) -> Iterator[threading.Event]:
    """A thread that must come to its end after the test has done what it waits for."""
    done = threading.Event()

    def go() -> None:
        work()
        done.set()

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    yield done
    assert done.wait(PATIENCE)
    thread.join()


def until_in_flight(ring: AsyncUringStream, count: int) -> None:
    """Wait until so many commands are in flight."""
    while ring.inflight < count:
        time.sleep(0.001)


def is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def heard(watch: Watch) -> bool:
    """Whether an event loop is told to look again; then it isn't any more."""
    told = is_readable(watch.event)
    if told:
        os.read(watch.event, 8)
    return told


def has_reader(pipe: Pipe) -> bool:
    """Whether anybody has the pipe's other end open."""
    poll = select.poll()
    poll.register(pipe._writer, 0)
    return not poll.poll(0)


def bounced(ring: SharedRing, pipe: Pipe, count: int, target: int = 0, size: int = 8) -> Request:
    """`count` reads of `size` bytes into bounce slots; the 2nd and 3rd of each are wanted."""
    arrays = (
        array("Q", bytes(8 * count)),
        array("I", [size] * count),
        array("Q", [target + 2 * i for i in range(count)]),
    )
    return ring.bounced(pipe.source, arrays, [(1, 2)] * count, fixed=False)


def command(memory: GpuMappedBuffer, count: int = 1) -> bytes:
    return encode_nvme_read_sqe(GEOMETRY.nsid, 0, 1, memory.address) * count


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("/dev/null", geometry=GEOMETRY) as opened:
        yield opened


@pytest.fixture
def stream(buffer: GpuMappedBuffer) -> Iterator[AsyncUringStream]:
    with AsyncUringStream(buffer) as opened:
        yield opened


# ---- Completions on their way to the caller


class Faulty(AsyncUringStream):
    """A ring whose last completion can't be handed over: `fail` does something, and raises."""

    fail: Callable[[], None] | None

    @staticmethod
    def _completion(self: Any, record: Any) -> Completion:  # type: ignore[override]
        completion = Completion(self, record)
        if self.fail is not None and completion.user_data == 63:
            fail, self.fail = self.fail, None
            fail()
            raise MemoryError
        return completion


def test_completions_that_cannot_be_handed_over_are_there_again(
    buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    """In their order, with as many that came meanwhile behind them."""
    with Faulty(buffer) as ring:
        watch = ring._watch()

        def more() -> None:
            ring.submit_nvme_passthrough(namespace, command(buffer, 64))
            assert ring._look() == (64, 0)
            heard(watch)

        ring.submit_nvme_passthrough(namespace, command(buffer, 64))
        ring.fail = more
        with pytest.raises(MemoryError):
            ring.wait(64)
        assert heard(watch)
        assert [completion.user_data for completion in ring.wait(128)] == list(range(128))
        assert ring.inflight == 0


def test_a_loop_hears_of_what_others_consume_and_take(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    watch = stream._watch()
    assert not heard(watch)
    stream.submit_nvme_passthrough(namespace, command(buffer))
    assert stream._look() == (1, 0)
    assert heard(watch)
    assert len(stream.poll()) == 1
    assert heard(watch), "nothing is left to wait for"


def test_a_loop_hears_of_the_end(stream: AsyncUringStream, pipes: list[Pipe]) -> None:
    """As soon as it has begun, and not when the last read is back."""
    watch = stream._watch()
    stream.submit_read(pipes[0].source, 0, 1, 0)
    with alarm():
        stream.close()
    assert heard(watch)
    pipes[0].write(b"x")
    stream.close()


def test_a_loop_hears_that_the_buffer_is_closed(buffer: GpuMappedBuffer) -> None:
    watch = ring_of(buffer)._watch()
    assert not heard(watch)
    buffer.close()
    assert heard(watch)


def test_completions_that_come_while_others_are_taken_in_are_told(
    buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    """By the descriptor of a ring whose kernel signals it: some are consumed for the room that the
    others need, and these are there when it is cleared."""
    with AsyncUringStream(buffer, 4, single_thread=True) as ring:
        watch = ring._watch()
        assert not is_readable(watch.arrivals)
        ring.submit_nvme_passthrough(namespace, command(buffer, 6))
        assert is_readable(watch.arrivals)
        assert len(ring.wait(6)) == 6
        assert not is_readable(watch.arrivals)


def test_a_source_is_let_go_with_its_last_completion(
    buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    """However that is taken, or not taken at all."""
    takes: tuple[Callable[[AsyncUringStream], object], ...] = (
        lambda ring: ring.wait(5),
        lambda ring: ring.wait_into(bytearray(80), 5),
        lambda ring: None,
    )
    source = namespace._source
    before = sys.getrefcount(source)
    for take in takes:
        with AsyncUringStream(buffer) as ring:
            ring.submit_nvme_passthrough(namespace, command(buffer, 5))
            take(ring)
        del ring
        assert sys.getrefcount(source) == before


# ---- What the kernel does not take


def test_commands_that_are_not_taken_are_not_counted(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    with Namespace("/dev/null", geometry=GEOMETRY) as other:
        with unreachable():
            with pytest.raises(OSError, match="io_uring_enter") as raised:
                stream.submit_nvme_passthrough(namespace, command(buffer, 10))
            assert not hasattr(raised.value, "__notes__")
            with pytest.raises(OSError, match="io_uring_enter") as raised:
                stream.submit_nvme_passthroughs(
                    [(namespace, command(buffer, 10)), (other, command(buffer, 20))]
                )
            assert not hasattr(raised.value, "__notes__")
        stats = stream.stats
        assert (stream.inflight, stats.submitted, stats.registered) == (0, 0, 0)
        tokens = stream.submit_nvme_passthrough(namespace, command(buffer, 300))
        assert [completion.user_data for completion in stream.wait(300)] == list(tokens)


def test_a_batch_that_is_interrupted_says_how_far_it_came(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    zeros, targets = array("Q", bytes(80)), array("Q", range(10))
    with AsyncUringStream(buffer, 4) as ring:
        with pytest.raises(Alarm) as raised, alarm_inside():
            ring.submit_reads(pipes[0].source, zeros, 1, targets)
        pipes[0].write(b"abcd")
        assert [completion.ok for completion in ring.wait(4)] == [True] * 4
        assert ring.inflight == 0
    assert raised.value.__notes__ == [
        "4 of 10 commands were submitted before this and will complete, user_data 0 up"
    ]


@contextlib.contextmanager
def alarm_inside() -> Iterator[None]:
    """The signal alone, for a test that looks at what comes out."""
    before = signal.signal(signal.SIGALRM, ring_bell)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("by_slots", [False, True])
def test_a_request_that_is_not_taken_fails_whole(
    by_slots: bool, buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """Its error is told, and slots, memory and descriptor are as before it."""
    ring = ring_of(buffer)
    gone = Pipe()

    def made(pipe: Pipe) -> Request:
        return bounced(ring, pipe, 40) if by_slots else reads(ring, pipe, list(range(40)))

    for _ in range(3):
        with unreachable():
            request = made(gone)
            assert ring._start((request,)) is None
            assert request.finished
            with pytest.raises(OSError, match="io_uring_enter"):
                request.take()
    assert (ring.inflight, ring.stats.submitted) == (0, 0)
    gone.source.close()
    assert not has_reader(gone)
    request = made(pipes[0])
    assert ring._start((request,)) is None
    assert ring.inflight == (32 if by_slots else 40)
    pipes[0].write(bytes(40 * 8))
    wait(request)
    assert ring.stats.submitted == 40


def test_a_batch_that_waits_for_room_hears_of_the_end(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """And before what it has sent is back."""
    zeros, targets = array("Q", bytes(80)), array("Q", range(10))
    ring = AsyncUringStream(buffer, 2)

    def submit() -> None:
        with pytest.raises(ValueError, match="the stream is closed") as raised:
            ring.submit_reads(pipes[0].source, zeros, 1, targets)
        assert raised.value.__notes__[0].startswith("2 of 10 commands were submitted")

    with beside(submit) as submitted:
        until_in_flight(ring, 2)
        with beside(ring.close):
            assert submitted.wait(PATIENCE)
            pipes[0].write(b"ab")


# ---- Threads that wait


def test_a_thread_that_waits_for_much_does_so_no_longer_when_another_comes(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """The one in the kernel waits for three reads, the other for one."""
    ring = ring_of(buffer)
    for _ in range(200):
        with beside(partial(wait, reads(ring, pipes[0], [0, 1, 2]))):
            until_in_flight(ring, 3)
            time.sleep(0.002)
            with beside(partial(wait, start(ring, pipes[1], [5]))):
                time.sleep(0.002)
                pipes[1].write(b"x")
            pipes[0].write(b"abc")


def test_a_thread_that_goes_has_another_wait_in_its_place(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    ring = ring_of(buffer)
    for _ in range(200):
        one, two = start(ring, pipes[0], [0]), start(ring, pipes[1], [1])
        with beside(partial(wait, one)) as done:
            time.sleep(0.002)
            with beside(partial(wait, two)):
                time.sleep(0.002)
                pipes[0].write(b"x")
                assert done.wait(PATIENCE)
                pipes[1].write(b"x")


def test_threads_that_wait_sleep(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """None of them wakes another, but once a second; each time would be a switch or more."""
    ring = ring_of(buffer)
    with beside(partial(wait, reads(ring, pipes[0], [0, 1, 2]))):
        time.sleep(0.01)
        with beside(partial(wait, reads(ring, pipes[1], [3, 4, 5]))):
            time.sleep(0.01)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
            time.sleep(0.2)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before < 100
            pipes[1].write(b"abc")
        pipes[0].write(b"abc")


def test_a_short_request_is_not_held_up_by_a_long_one(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """The thread that waits in the kernel waits for three reads, and two others for one each."""
    ring = ring_of(buffer)
    with beside(partial(wait, reads(ring, pipes[0], [0, 1, 2]))):
        until_in_flight(ring, 3)
        for _ in range(200):
            one, two = start(ring, pipes[1], [5]), start(ring, pipes[2], [6])
            with beside(partial(wait, one)) as done:
                time.sleep(0.002)
                with beside(partial(wait, two)):
                    time.sleep(0.002)
                    pipes[1].write(b"x")
                    assert done.wait(PATIENCE)
                    pipes[2].write(b"x")
        pipes[0].write(b"abc")


def test_whoever_waits_for_less_is_woken(stream: AsyncUringStream, pipes: list[Pipe]) -> None:
    """The same of completions: what one thread consumes is another's to take."""
    source: Any = pipes[0].source
    for place in range(3):
        stream.submit_read(source, 0, 1, place)
    with beside(partial(stream.wait, 3)):
        for _ in range(200):
            for _ in range(3):
                stream.submit_read(source, 0, 1, 0)
            with beside(stream.wait) as done:
                time.sleep(0.002)
                with beside(partial(stream.wait, 2)):
                    time.sleep(0.002)
                    pipes[0].write(b"x")
                    assert done.wait(PATIENCE)
                    pipes[0].write(b"xx")
        pipes[0].write(b"abc")


def test_whoever_is_about_to_wait_hears_of_what_others_consume(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace, pipes: list[Pipe]
) -> None:
    """A thread that has let go of the lock, and is not in the kernel yet, when what it is to wait
    for is consumed: as often as not, one that was made a moment ago."""
    stream.submit_read(pipes[0].source, 0, 1, 0)
    for _ in range(800):
        with beside(stream.wait):
            stream.submit_nvme_passthrough(namespace, command(buffer))
            stream._look()
    pipes[0].write(b"x")


def test_all_who_wait_hear_of_the_end(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """Before the last read is back."""

    def refused(ring: AsyncUringStream) -> None:
        with pytest.raises(ValueError, match="closed"):
            ring.wait()

    for _ in range(200):
        ring = AsyncUringStream(buffer)
        ring.submit_read(pipes[0].source, 0, 1, 0)
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(beside(partial(refused, ring))) for _ in range(3)]
            time.sleep(0.005)
            with beside(ring.close):
                for done in waiting:
                    assert done.wait(PATIENCE)
                pipes[0].write(b"x")


def test_all_who_wait_for_what_was_given_up_are_woken(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """Also beside others, one of which waits in the kernel."""
    ring = ring_of(buffer)
    with beside(partial(wait, start(ring, pipes[1], [6]))):
        time.sleep(0.005)
        for _ in range(200):
            other = start(ring, pipes[2], [7])
            start(ring, pipes[0], [5]).give_up()
            with beside(ring._clear_the_way) as done:
                time.sleep(0.002)
                with beside(partial(wait, other)):
                    time.sleep(0.002)
                    pipes[0].write(b"x")
                    assert done.wait(PATIENCE)
                    pipes[2].write(b"x")
        pipes[1].write(b"x")


# ---- What was given up


def read_later(how: str, path: Path, memory: GpuMappedBuffer) -> None:
    """The file's first 8 KiB to the start of the buffer, by this way."""
    zeros, sizes = array("Q", [0]), array("I", [8192])
    with File(path, direct="cached" not in how) as file:
        if how == "read_into":
            file.read_into(memory, size=8192)
        elif how == "read_into by choice":
            file.read_into(memory)
        elif how == "read_many_into":
            file.read_many_into(memory, zeros, sizes, zeros)
        elif how == "read_into_async":
            asyncio.run(file.read_into_async(memory, size=8192))
        elif how == "read_into_async by choice":
            asyncio.run(file.read_into_async(memory))
        elif how == "a ring":
            with AsyncUringStream(memory) as ring:
                ring.submit_reads(file, zeros, sizes, zeros)
                ring.wait()
        else:
            asyncio.run(stream_later(how, path, file, memory))


async def stream_later(how: str, path: Path, file: File, memory: GpuMappedBuffer) -> None:
    if "files" in how:
        made = stream_files([path], memory, chunk_size=8192, direct="cached" not in how)
    else:
        made = file.stream(memory, chunk_size=8192)
    async with made as stream:
        if "async" in how:
            [chunk async for chunk in stream]
        else:
            list(stream)


@pytest.mark.parametrize(
    "how",
    [
        "read_into",
        "read_into by choice",
        "read_many_into",
        "read_into_async",
        "read_into_async by choice",
        "a ring",
        "stream",
        "stream, async",
        "files",
        "files, async",
        "files, cached",
        "files, cached, async",
    ],
)
def test_whoever_reads_next_waits_for_what_was_given_up(
    how: str, buffer: GpuMappedBuffer, pipes: list[Pipe], tmp_path: Path
) -> None:
    """What was given up writes into the same place, and not over what was read later."""
    path = tmp_path / "file"
    path.write_bytes(data := os.urandom(8192))
    start(ring_of(buffer), pipes[0], [5, 8000]).give_up()
    with beside(partial(read_later, how, path, buffer)) as done:
        assert not done.wait(0.1)
        pipes[0].write(b"\0\0")
    with buffer.view() as view:
        assert view[:8192] == data


def test_a_bounced_read_that_was_given_up_is_in_nobodys_way(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """What it brings goes nowhere."""
    ring = ring_of(buffer)
    request = bounced(ring, pipes[0], 2, 100)
    assert ring._start((request,)) is None
    request.give_up()
    assert ring._in_the_way() is None
    pipes[0].write(b"abcdefghABCDEFGH")
    while ring.inflight:
        ring._collect()
    with buffer.view() as view:
        assert bytes(view) == bytes(buffer.nbytes)


def test_what_is_wanted_of_a_bounced_read_and_nothing_beside(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """More of them than there are slots; the last one is short."""
    ring = ring_of(buffer)
    request = bounced(ring, pipes[0], 100, 4096)
    pipes[0].write(b"01234567" * 99 + b"01")
    wait(request)
    [(index, result, nbytes)] = request.take()
    assert (result, nbytes) == (2, 2)
    with buffer.view() as view:
        wanted = bytearray(b"12" * 100)
        wanted[2 * index + 1] = 0
        assert bytes(view) == bytes(4096) + bytes(wanted) + bytes(buffer.nbytes - 4096 - 200)


def test_a_short_read_is_told(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    zeros = array("Q", bytes(16))
    request = ring_of(buffer).reads(
        pipes[0].source, (zeros, array("I", [4, 4]), array("Q", [0, 4]))
    )
    pipes[0].write(b"abcdef")
    wait(request)
    assert [(result, nbytes) for _, result, nbytes in request.take()] == [(2, 2)]


def test_the_rest_of_what_is_given_up_is_not_sent(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """Also when there is room for it."""
    ring = ring_of(buffer)
    request = start(ring, pipes[0], list(range(300)))
    request.give_up()
    assert ring.inflight == 128
    pipes[0].write(b"a")
    while ring.stats.completed == 0:
        ring._collect()
    assert ring.inflight == 127
    pipes[0].write(b"a" * 127)
    ring._clear_the_way()


def test_a_bounce_slot_is_the_next_reads_once_its_own_is_back(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    ring = ring_of(buffer)
    request = bounced(ring, pipes[0], 40)
    assert ring._start((request,)) is None
    assert ring.inflight == 32
    pipes[0].write(bytes(8))
    while ring.stats.completed == 0:
        ring._collect()
    assert ring.inflight == 32
    pipes[0].write(bytes(8 * 39))
    wait(request)


def test_what_was_given_up_has_its_ring(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """Whoever else lets go of that; and not beyond its end."""
    ring = ring_of(buffer)
    request = start(ring, pipes[0], [5])
    before = sys.getrefcount(ring)
    request.give_up()
    assert sys.getrefcount(ring) == before + 1
    pipes[0].write(b"x")
    while ring.inflight:
        ring._collect()
    assert sys.getrefcount(ring) == before


def test_a_bounced_read_does_not_leave_the_buffer(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    ring = ring_of(buffer)
    bounced(ring, pipes[0], 1, buffer.nbytes - 2)
    with pytest.raises(ValueError, match="read 0: "):
        bounced(ring, pipes[0], 1, buffer.nbytes - 1)


def test_a_short_read_does_not_leave_the_buffer(tmp_path: Path) -> None:
    """Though there is memory behind it."""
    (tmp_path / "file").write_bytes(bytes(8192))
    memory = mmap.mmap(-1, 16384)
    memory[:] = b"x" * 16384
    part = GpuMappedBuffer.from_object(memoryview(memory)[:8192])
    with File(tmp_path / "file") as file, part:
        for target in (4097, 8192):
            with pytest.raises(ValueError, match="has 8192 bytes"):
                file.read_into(part, size=4096, target_offset=target)
            # What isn't registered no check of the kernel's would keep.
            source, ring = file._origin.source, ring_of(part)
            assert ring._read(source, 0, 4096, target, 1, 1, False, None) is None
    assert memory[:] == b"x" * 16384


def test_a_short_read_touches_nothing_behind_the_files_end(
    buffer: GpuMappedBuffer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"a" * 5000)
    with buffer.view() as view, File(tmp_path / "file") as file:
        view[:8192] = b"x" * 8192
        assert file.read_into(buffer, offset=4096, size=4096).nbytes == 904
        assert view[:8192] == b"a" * 904 + b"x" * (8192 - 904)


def test_a_short_read_that_came_short_is_to_be_done_the_long_way(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    ring, source = ring_of(buffer), pipes[0].source
    pipes[0].write(b"ab")
    assert ring._read(source, 0, 4, 0, 1, 1, False, None) is None
    pipes[0].write(b"abcd")
    assert ring._read(source, 0, 4, 0, 1, 1, False, None) == 4


def test_the_end_of_what_was_given_up_is_heard_of(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    ring = ring_of(buffer)
    watch = ring._watch()
    start(ring, pipes[0], [5]).give_up()
    assert not heard(watch)
    pipes[0].write(b"x")
    while ring.inflight:
        ring._collect()
    assert heard(watch)


def test_a_stream_that_was_left_with_reads_in_flight_goes_with_them(pipes: list[Pipe]) -> None:
    """With its memory, once the next ring is made."""

    class Owner(bytearray):
        pass

    owner = Owner(4096)
    alive = weakref.ref(owner)
    left = AsyncUringStream(GpuMappedBuffer.from_object(owner))
    del owner
    left.submit_read(pipes[0].source, 0, 1, 0)
    with pytest.warns(ResourceWarning, match="1 commands in flight"):
        del left
    gc.collect()
    assert alive() is not None
    pipes[0].write(b"x")
    with GpuMappedBuffer.from_host_visible(4096) as other:
        AsyncUringStream(other).close()
    gc.collect()
    assert alive() is None


def test_what_a_parent_gave_up_is_in_no_childs_way(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    start(ring_of(buffer), pipes[0], [5]).give_up()
    child = os.fork()
    if child == 0:
        os._exit(0 if ring_of(buffer)._in_the_way() is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ring_of(buffer)._in_the_way() is ring_of(buffer)
    pipes[0].write(b"x")


# ---- Sources


def test_the_rest_of_a_closed_sources_request_is_its_own(
    buffer: GpuMappedBuffer, tmp_path: Path
) -> None:
    """It waits for room, and the descriptor's number is another file's by then, if it can be."""
    pipe = Pipe()
    fd = pipe.source.fileno()
    (tmp_path / "other").write_bytes(b"evil" * 100)
    request = start(ring_of(buffer), pipe, list(range(300)))
    pipe.source.close()
    other = os.open(tmp_path / "other", os.O_RDONLY)
    assert other != fd
    os.write(pipe._writer, b"a" * 300)
    wait(request)
    os.close(other)
    with buffer.view() as view:
        assert view[:300] == b"a" * 300
    assert not has_reader(pipe), "and then it is closed"
    os.close(pipe._writer)


def test_sources_of_a_request_that_is_not_started_are_let_go(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """One of several is closed: the others are held no longer, nor is the buffer."""
    gone, kept = Pipe(), Pipe()
    numbers = array("Q", [0, 0]), array("I", [1, 1]), array("Q", [0, 1])
    request = ring_of(buffer).files((kept.source, gone.source), numbers, fixed=False)
    gone.close()
    with pytest.raises(ValueError, match="pipe is closed"):
        wait(request)
    kept.source.close()
    assert not has_reader(kept)
    os.close(kept._writer)
    buffer.close()


def test_a_descriptor_is_there_as_long_as_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    source = Source(os.open(path, os.O_RDONLY), "file")

    def use(fd: int) -> int:
        source.close()
        return os.fstat(fd).st_size

    assert source.using(use) == 1000
    with pytest.raises(ValueError, match="file is closed"):
        source.size()


def test_a_job_holds_the_files_that_it_copies(tmp_path: Path, buffer: GpuMappedBuffer) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    source = Source(os.open(path, os.O_RDONLY), "file")
    fd = source.fileno()
    job = read_sources(buffer, (source,), (1000,), (0,))
    source.close()
    assert os.fstat(fd).st_size == 1000
    assert job.result() == [1000]
    del job
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_job_that_is_dropped_has_ended() -> None:
    """It writes nothing after that; what it had begun is done to its end."""
    size = 256 << 20
    source = Source(os.open("/dev/zero", os.O_RDONLY), "zeros")
    with GpuMappedBuffer.from_host_visible(size) as memory, memory.view() as view:
        view[0] = view[size - 1] = 1
        job = read_sources(memory, (source,), (size,), (0,))
        while view[0] != 0:
            time.sleep(0)
        del job
        assert view[size - 1] == 0
    source.close()


def test_what_was_opened_and_not_asked_for_is_closed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = os.listdir("/proc/self/fd")
    job = open_sources([str(tmp_path / "file")] * 10, os.O_RDONLY)
    while not job.done:
        time.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 10
    del job
    assert os.listdir("/proc/self/fd") == before


# ---- Rings of threads


def test_a_ring_that_another_thread_ends_takes_nothing_of_that_threads_own(
    buffer: GpuMappedBuffer, tmp_path: Path
) -> None:
    """Each thread counts the rings that are registered with it, and both are the first: with
    liburing 2.4 or later, files and buffers went too."""
    (tmp_path / "file").write_bytes(bytes(4096))
    with AsyncUringStream(buffer, single_thread=True, register=True) as mine:
        left: list[AsyncUringStream] = []

        def make() -> None:
            left.append(AsyncUringStream(buffer, single_thread=True, register=True))

        with beside(make):
            pass
        with pytest.warns(ResourceWarning, match="unclosed stream"):
            left.clear()
        with File(tmp_path / "file") as file:
            mine.submit_read_fixed(file, 0, 4096, 0)
            assert mine.wait()[0].result() == 4096


def pinned() -> str:
    """What the kernel holds of this process's memory."""
    status = Path("/proc/self/status").read_text()
    return status.split("VmPin:")[1].split("\n")[0]


def test_nothing_of_a_closed_buffer_is_pinned(pipes: list[Pipe]) -> None:
    """And its ring is good for the next one."""
    for _ in range(3):
        before = pinned()
        memory = GpuMappedBuffer.from_host_visible(1 << 20)
        ring = ring_of(memory)
        assert ring.registered
        pipes[0].write(b"x")
        wait(reads(ring, pipes[0], [0]))
        del ring
        memory.close()
        assert pinned() == before


# ---- Event loops


class Future:
    """A future whose setting an exception interrupts, the first time."""

    def __init__(self) -> None:
        self.interrupted = self.result_set = False

    def done(self) -> bool:
        return self.result_set

    def set_result(self, _: None) -> None:
        if not self.interrupted:
            self.interrupted = True
            raise Alarm
        self.result_set = True


def test_futures_of_a_request(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """Each is set, but for one that was cancelled."""
    ring, loop = ring_of(buffer), asyncio.new_event_loop()
    watch = ring._watch()
    request = start(ring, pipes[0], [0])
    cancelled, waiting = loop.create_future(), loop.create_future()
    cancelled.cancel()
    for future in (cancelled, waiting):
        assert request.attach(watch, future)
    assert watch.requests == 1
    ring._arrived(watch)
    assert not waiting.done()
    pipes[0].write(b"x")
    while not request.finished:
        ring._collect()
    assert heard(watch)
    ring._arrived(watch)
    assert waiting.done()
    assert watch.requests == 0
    assert not request.attach(watch, loop.create_future())
    loop.close()


def test_a_future_that_is_not_set_for_an_exception_is_set_later(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    ring = ring_of(buffer)
    watch = ring._watch()
    request = start(ring, pipes[0], [0])
    future: Any = Future()
    assert request.attach(watch, future)
    pipes[0].write(b"x")
    while not request.finished:
        ring._collect()
    assert heard(watch)
    with pytest.raises(Alarm):
        ring._arrived(watch)
    assert heard(watch)
    ring._arrived(watch)
    assert future.done()


def test_who_awaits_what_is_given_up_hears_of_it(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    ring, loop = ring_of(buffer), asyncio.new_event_loop()
    watch = ring._watch()
    request = start(ring, pipes[0], [0])
    future = loop.create_future()
    assert request.attach(watch, future)
    request.give_up()
    assert heard(watch)
    ring._arrived(watch)
    assert future.done()
    pipes[0].write(b"x")
    loop.close()


def test_an_await_begins_anew_where_nothing_is_left_to_take() -> None:
    """Another task had it."""
    left: list[object] = [NotImplemented, NotImplemented, (1, 2)]
    prepared = []

    async def prepare() -> None:
        prepared.append(len(left))
        await asyncio.sleep(0)

    async def main() -> object:
        return await Then(prepare, lambda: left.pop(0))

    assert asyncio.run(main()) == (1, 2)
    assert prepared == [3, 2, 1]


# ---- Turns


def test_a_turn_is_left_and_may_be_come_to_again() -> None:
    turn: Turn = Turn()
    assert turn.run(turn.run, len, "abc") == 3
    with pytest.raises(TypeError):
        turn.run(len, 5)
    came: list[int] = []
    with beside(partial(turn.run, came.append, 1)):
        pass
    assert came == [1]


# ---- Streams of chunks, of which each is a read of a pipe


class Pipes:
    """A supply: chunk i is two bytes of pipe i."""

    total: int | None = None
    first: Place = (0, 0)

    def __init__(self, pipes: list[Pipe]) -> None:
        self.pipes = pipes
        self.failing = 0  # loads that can't be made

    def is_open(self, place: Place) -> bool:
        return True

    def is_coming(self, place: Place) -> bool:
        return False

    def opening(self, place: Place) -> None: ...

    def open(self, place: Place) -> None: ...

    def exhausted(self, place: Place) -> bool:
        return place[0] >= len(self.pipes)

    def load(self, place: Place, ring: SharedRing, slots: Slots) -> Load | None:
        if self.exhausted(place):
            return None
        found = slots.peek(1)
        if not found:
            return None
        [slot] = found

        def steps() -> Generator[Requests, None, Loaded]:
            if self.failing:
                self.failing -= 1
                raise OSError("not now")
            pipe, at = self.pipes[place[0]], slot
            request = reads(ring, pipe, [at, at + 1])
            yield (request,)
            assert request.take() == []
            return [Landed(slot, 0, 2, "pipe", place[0], DataPath.BUFFERED, None)]

        return RingLoad(steps, [slot], 2, (place[0] + 1, 0))

    def close(self) -> None: ...


@pytest.fixture
def chunks(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> ChunkStream:
    return ChunkStream(Pipes(pipes[:5]), buffer, range(0, 3 * 4096, 4096), ours=False)


def test_chunks_come_in_order_whatever_interrupts(chunks: ChunkStream, pipes: list[Pipe]) -> None:
    found = []
    for number in range(5):
        with alarm():
            next(chunks)
        pipes[number].write(bytes([number, number]))
        chunk = next(chunks)
        found.append((chunk.offset, *chunk.view))
        chunk.release()
    assert found == [(number, number, number) for number in range(5)]
    with pytest.raises(StopIteration):
        next(chunks)
    chunks.close()


def test_a_load_that_fails_once_is_made_again(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    supply = Pipes(pipes[:2])
    supply.failing = 3  # both loads as they are begun, and one when it is its turn
    for pipe in pipes:
        pipe.write(b"xx")
    with ChunkStream(supply, buffer, [0, 4096], ours=False) as chunks:
        with pytest.raises(OSError, match="not now"):
            next(chunks)
        assert [chunk.offset for chunk in chunks] == [0, 1]


def test_a_step_that_fails_is_made_anew(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """From the first one on, which reads once more."""
    ring, failures = ring_of(buffer), [OSError("not now")]

    def steps() -> Generator[Requests, None, Loaded]:
        yield (reads(ring, pipes[0], [0]),)
        if failures:
            raise failures.pop()
        return []

    load = RingLoad(steps, [], 0, (1, 0))
    pipes[0].write(b"xy")
    with pytest.raises(OSError, match="not now"):
        load.finish()
    assert load.finish() == []
    with buffer.view() as view:
        assert view[0] == ord("y")


def test_a_stream_is_closed_once_its_reads_are_back(
    chunks: ChunkStream, pipes: list[Pipe], buffer: GpuMappedBuffer
) -> None:
    pipes[0].write(b"xx")
    next(chunks).release()
    with beside(chunks.close) as done:
        assert not done.wait(0.1)
        for pipe in pipes:
            pipe.write(b"xx")
    assert ring_of(buffer).inflight == 0


def test_a_task_closes_a_stream_once_its_reads_are_back(
    chunks: ChunkStream, pipes: list[Pipe], buffer: GpuMappedBuffer
) -> None:
    async def main() -> None:
        pipes[0].write(b"xx")
        (await anext(chunks)).release()
        closing = asyncio.create_task(chunks.aclose())
        done, _ = await asyncio.wait([closing], timeout=0.1)
        assert not done
        for pipe in pipes:
            pipe.write(b"xx")
        await asyncio.wait_for(closing, PATIENCE)

    asyncio.run(main())
    assert ring_of(buffer).inflight == 0


def test_each_of_several_tasks_has_a_chunk_of_its_own(
    chunks: ChunkStream, pipes: list[Pipe]
) -> None:
    """All wait for the same load; one is cancelled, and takes nothing along."""

    async def main() -> None:
        tasks = [asyncio.ensure_future(anext(chunks)) for _ in range(4)]
        await asyncio.sleep(0.01)
        tasks.pop(1).cancel()
        for number, pipe in enumerate(pipes[:3]):
            pipe.write(bytes([number]) * 2)
        found = await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        assert sorted(chunk.offset for chunk in found) == [0, 1, 2]
        assert sorted(bytes(chunk.view) for chunk in found) == [b"\0\0", b"\1\1", b"\2\2"]
        del found
        for pipe in pipes[3:]:
            pipe.write(b"xx")
        await chunks.aclose()

    asyncio.run(main())


class Interrupted:
    """Paths; before every third comes Ctrl-C."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths, self._asked = iter(paths), 0

    def __iter__(self) -> Iterator[Path]:
        return self

    def __next__(self) -> Path:
        self._asked += 1
        if self._asked % 3 == 0:
            raise KeyboardInterrupt
        return next(self._paths)


def test_paths_that_came_before_an_exception_stay(tmp_path: Path, buffer: GpuMappedBuffer) -> None:
    paths = [tmp_path / f"{number:02}" for number in range(20)]
    for path in paths:
        path.write_text(path.name)
    found: list[str] = []
    with stream_files(Interrupted(paths), buffer) as stream:
        while len(found) < 20:
            with contextlib.suppress(KeyboardInterrupt):
                for chunk in stream:
                    found.append(bytes(chunk.view).decode())
                    chunk.release()
                break
    assert found == [path.name for path in paths]
