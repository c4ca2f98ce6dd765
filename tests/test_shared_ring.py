"""Shared rings: who waits for what, on pipes, whose reads come back when a test writes there."""

import asyncio
import gc
import os
import random
import signal
import threading
import time
import weakref
from array import array
from collections.abc import Iterator
from types import FrameType

import pytest
from support import run_python

from gdsdirect import AsyncUringStream, Geometry, GpuMappedBuffer, Namespace
from gdsdirect._uring_cmd import Request, Source
from gdsdirect.shared_ring import SharedRing, ring_of


class Pipe:
    """A source whose reads wait for `write`."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe()
        self.source = Source(reader, "pipe")

    def write(self, data: bytes) -> None:
        os.write(self._writer, data)

    def close(self) -> None:
        self.source.close()
        os.close(self._writer)


@pytest.fixture
def buffer() -> Iterator[GpuMappedBuffer]:
    with GpuMappedBuffer.from_host_visible(1 << 20) as made:
        yield made


@pytest.fixture
def pipes() -> Iterator[list[Pipe]]:
    made = [Pipe() for _ in range(20)]
    yield made
    for pipe in made:
        pipe.close()


def reads(ring: SharedRing, pipe: Pipe, targets: list[int]) -> Request:
    """A byte to each target."""
    zeros, ones = array("Q", bytes(8 * len(targets))), array("I", [1] * len(targets))
    return ring.reads(pipe.source, (zeros, ones, array("Q", targets)))


def start(ring: SharedRing, pipe: Pipe, targets: list[int]) -> Request:
    request = reads(ring, pipe, targets)
    assert ring._start((request,)) is None
    return request


def wait(request: Request, seconds: float | None = 60) -> None:
    """Wait until the request has finished; TimeoutError after a minute."""
    deadline = None if seconds is None else time.monotonic_ns() + int(seconds * 1e9)
    request.ring._carry_out((request,), deadline)


def test_requests_are_finished_in_any_order(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    ring = ring_of(buffer)
    requests = [start(ring, pipe, [i]) for i, pipe in enumerate(pipes)]
    order = list(range(len(pipes)))
    random.Random(1).shuffle(order)
    for i in order:
        assert not requests[i].finished
        pipes[i].write(bytes([i]))
        wait(requests[i])
        assert requests[i].finished
        assert requests[i].take() == []
    with buffer.view() as view:
        assert list(view[: len(pipes)]) == list(range(len(pipes)))


def test_each_thread_comes_back_with_its_own(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """Whoever waits in the kernel: a thread whose request is done doesn't wait for another's."""
    ring = ring_of(buffer)
    done: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            wait(reads(ring, pipes[i], [i]))
            done.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pipes))]
    for thread in threads:
        thread.start()
    chance = random.Random(2)
    left = [i for i in range(len(pipes)) for _ in range(30)]
    chance.shuffle(left)
    for count, i in enumerate(left, 1):
        pipes[i].write(b"x")
        deadline = time.monotonic() + 60
        while len(done) < count and time.monotonic() < deadline:
            time.sleep(0)
        assert done[count - 1] == i
    for thread in threads:
        thread.join()


def test_more_reads_than_the_ring_has_room_for(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """A large request does not keep a small one waiting, whose drive is free."""
    ring = ring_of(buffer)
    large = start(ring, pipes[0], list(range(300)))
    pipes[0].write(b"a")
    small = start(ring, pipes[1], [400, 401])
    pipes[1].write(b"bc")
    pipes[0].write(b"a" * 160)
    wait(small)
    pipes[0].write(b"a" * 139)
    wait(large)
    with buffer.view() as view:
        assert view[:300] == b"a" * 300
        assert sorted(view[400:402]) == sorted(b"bc")


def test_what_is_given_up_holds_the_buffer(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    request = reads(ring_of(buffer), pipes[0], [5])
    with pytest.raises(TimeoutError):
        wait(request, 0.02)
    del request
    with pytest.raises(BufferError, match="reads in flight"):
        buffer.close()
    pipes[0].write(b"z")
    buffer.close()


def test_what_nobody_has_any_more_is_given_up(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """Of 300 reads, the ring's 128 are in flight; the others are not sent any more."""
    ring = ring_of(buffer)
    start(ring, pipes[0], list(range(300)))
    assert ring.inflight == ring.depth == 128
    pipes[0].write(b"a" * 128)
    ring._clear_the_way()
    assert ring.inflight == 0
    pipes[0].write(b"b")
    wait(reads(ring, pipes[0], [500]))
    with buffer.view() as view:
        assert view[500] == ord("b")


@pytest.mark.parametrize("other", ["the same", "another buffer", "a stream"])
def test_a_read_waits_for_what_was_given_up_there(
    other: str, buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """By whichever ring, wherever in the buffer: it is used as a whole."""
    with buffer.view() as view, GpuMappedBuffer.from_object(view) as twin:
        ring = ring_of(buffer if other == "the same" else twin)
        with pytest.raises(TimeoutError):
            wait(reads(ring_of(buffer), pipes[0], [5]), 0.02)
        done = threading.Event()

        def later() -> None:
            pipes[1].write(b"c")
            if other == "a stream":
                with AsyncUringStream(twin) as stream:
                    stream.submit_read(pipes[1].source, 0, 1, 900)
                    stream.wait()
            else:
                wait(reads(ring, pipes[1], [900]))
            done.set()

        thread = threading.Thread(target=later)
        thread.start()
        assert not done.wait(0.1)
        pipes[0].write(b"a")
        assert done.wait(60)
        thread.join()
        assert (view[5], view[900]) == (ord("a"), ord("c"))


def test_several_wait_for_what_was_given_up(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """All whose reads it is in the way of."""
    ring = ring_of(buffer)
    request = start(ring, pipes[0], [5])
    other = start(ring, pipes[1], [6])
    request.give_up()
    threads = [
        threading.Thread(target=wait, args=(each,)) for each in (other, request, request, request)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    pipes[0].write(b"z")
    for thread in threads[1:]:
        thread.join(60)
        assert not thread.is_alive()
    pipes[1].write(b"z")
    threads[0].join(60)
    assert not threads[0].is_alive()


def test_a_thread_that_is_interrupted_hands_over(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """The one that waits in the kernel, and one that waits for it."""
    ring = ring_of(buffer)
    requests = [start(ring, pipe, [i]) for i, pipe in enumerate(pipes[:3])]
    others = [threading.Thread(target=wait, args=(request,)) for request in requests[1:]]

    class Alarm(Exception):
        pass

    def ring_bell(_: int, __: FrameType | None) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring_bell)
    try:
        for first in (True, False):
            if not first:
                for thread in others:
                    thread.start()
                time.sleep(0.05)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Alarm):
                wait(requests[0])
    finally:
        signal.signal(signal.SIGALRM, before)
    for pipe in pipes[:3]:
        pipe.write(b"x")
    for thread in others:
        thread.join(60)
        assert not thread.is_alive()
    wait(requests[0])


def test_a_source_that_is_closed_fails_its_own_request(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    ring = ring_of(buffer)
    other = start(ring, pipes[0], [0])
    gone = Pipe()
    request = reads(ring, gone, [1, 2, 3])
    gone.close()
    with pytest.raises(ValueError, match="pipe is closed"):
        wait(request)
    with pytest.raises(RuntimeError, match="given up"):
        request.take()
    pipes[0].write(b"y")
    wait(other)
    assert other.take() == []


def test_a_source_is_closed_once_nothing_needs_it(buffer: GpuMappedBuffer) -> None:
    """Its reads go on, and its number isn't another file's before they are back."""
    pipe = Pipe()
    request = start(ring_of(buffer), pipe, [0])
    writer = os.dup(pipe._writer)
    pipe.close()
    assert pipe.source.closed
    os.write(writer, b"x")
    os.close(writer)
    wait(request)
    with buffer.view() as view:
        assert view[0] == ord("x")


def test_what_a_request_may_not_be(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    ring, source = ring_of(buffer), pipes[0].source
    one, zero, far = array("I", [1]), array("Q", [0]), array("Q", [buffer.nbytes])
    with pytest.raises(ValueError, match="target_offset 1048576"):
        ring._request(source, zero, one, far, False)
    with pytest.raises(ValueError, match="nbytes 0"):
        ring._request(source, zero, array("I", [0]), zero, False)
    with pytest.raises(TypeError, match="source 0 must be a Source"):
        ring._request(5, zero, one, zero, False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 sources and 1 reads"):
        ring._request((source, source), zero, one, zero, False)
    with pytest.raises(ValueError, match="memory for bounce slots"):
        ring._request(source, zero, one, zero, False, one, one)
    with GpuMappedBuffer.from_host_visible(4096) as other:
        foreign = reads(ring_of(other), pipes[0], [0])
        with pytest.raises(TypeError, match="request 0 is none of this ring's"):
            ring._start((foreign,))
    slots = GpuMappedBuffer.from_host_visible(2 << 20)
    ring._lend_bounce(slots)
    for size, skip, wanted in ((65537, 0, 1), (512, 513, 0), (512, 512, 1), (512, 1, 512)):
        parts = array("I", [skip]), array("I", [wanted])
        with pytest.raises(ValueError, match="read 0"):
            ring._request(source, zero, array("I", [size]), zero, False, *parts)


def test_blocks_of_a_namespace_are_held_to_its_bounds(buffer: GpuMappedBuffer) -> None:
    """As commands of the caller's are; /dev/null takes each and reads nothing."""
    geometry = Geometry(nsid=7, lba_size=512, capacity=1000, max_transfer=65536)
    ring = ring_of(buffer)
    with Namespace("/dev/null", geometry=geometry) as namespace:

        def read(offset: int, size: int, target: int) -> Request:
            numbers = array("Q", [offset]), array("I", [size]), array("Q", [target])
            return ring.reads(namespace._source, numbers)

        for good in ((0, 512, 0), (999 * 512, 512, buffer.nbytes - 512), (512, 65536, 4)):
            wait(read(*good))
        for offset, size, target, said in (
            (1, 512, 0, "512 bytes at offset 1 of /dev/null are not 1 to 65536 whole blocks"),
            (0, 513, 0, "not 1 to 65536 whole blocks of 512"),
            (0, 0, 0, "not 1 to 65536 whole blocks"),
            (999 * 512, 1024, 0, "beyond the capacity"),
            (0, 66048, 0, "transfers at most 65536"),
            (0, 512, 2, "not a multiple of 4"),
            (0, 512, buffer.nbytes - 508, "outside the stream's buffer"),
            (0, 512, 1 << 63, "outside the stream's buffer"),
        ):
            with pytest.raises(ValueError, match=said):
                read(offset, size, target)
    assert ring.stats.submitted == 3


def test_tasks_of_a_loop(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    async def main() -> None:
        ring = ring_of(buffer)
        requests = [reads(ring, pipe, [i]) for i, pipe in enumerate(pipes)]
        waiting = [asyncio.create_task(ring.carry_out((request,))) for request in requests]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        for i in (3, 1, 2):
            pipes[i].write(b"x")
            await asyncio.wait_for(waiting[i], 60)
        waiting[0].cancel()
        for pipe in pipes:
            pipe.write(b"y")
        await asyncio.wait_for(asyncio.gather(*waiting[1:]), 60)
        await asyncio.wait_for(ring.carry_out((reads(ring, pipes[1], [0]),)), 60)

    asyncio.run(main())


def test_threads_and_loops_share_a_ring(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """A completion that another takes from the ring comes to its own."""
    ring = ring_of(buffer)

    def in_a_thread(i: int) -> None:
        for _ in range(50):
            wait(reads(ring, pipes[i], [i]))

    async def in_a_task(i: int) -> None:
        for _ in range(50):
            await ring.carry_out((reads(ring, pipes[i], [i]),))

    async def tasks(those: range) -> None:
        await asyncio.gather(*map(in_a_task, those))

    threads = [
        *(threading.Thread(target=in_a_thread, args=(i,)) for i in range(5)),
        threading.Thread(target=asyncio.run, args=(tasks(range(5, 10)),)),
        threading.Thread(target=asyncio.run, args=(tasks(range(10, 15)),)),
    ]
    for thread in threads:
        thread.start()
    order = [i for i in range(15) for _ in range(50)]
    random.Random(3).shuffle(order)
    for i in order:
        pipes[i].write(b"x")
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert ring.inflight == 0


def test_a_loop_that_ended_leaves_nothing(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        ring = ring_of(buffer)
        request = reads(ring, pipes[0], [0])
        pipes[0].write(b"x")
        await ring.carry_out((request,))

    for _ in range(10):
        asyncio.run(main())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the ring, and the last loop's event


def test_a_dropped_buffer_is_freed(pipes: list[Pipe]) -> None:
    """Its ring has the memory, and not the buffer, which would be a cycle."""
    buffer = GpuMappedBuffer.from_host_visible(1 << 20)
    ring = ring_of(buffer)
    request = reads(ring, pipes[0], [0])
    pipes[0].write(b"x")
    wait(request)
    gone = weakref.ref(ring)
    gc.disable()
    try:
        del request, ring, buffer
        assert gone() is None
    finally:
        gc.enable()


def test_a_dropped_buffer_with_reads_in_flight_stays_until_they_are_back(pipes: list[Pipe]) -> None:
    """And is let go of by whoever makes the next ring."""
    buffer = GpuMappedBuffer.from_host_visible(1 << 20)
    memory = weakref.ref(ring_of(buffer).buffer)
    with pytest.raises(TimeoutError):
        wait(reads(ring_of(buffer), pipes[0], [5]), 0.02)
    del buffer
    gc.collect()
    assert memory() is not None
    pipes[0].write(b"z")
    with GpuMappedBuffer.from_host_visible(4096) as other:
        ring_of(other)
    gc.collect()
    assert memory() is None


def test_a_fork_has_a_ring_of_its_own() -> None:
    run_python(
        """
import os
from gdsdirect import File, GpuMappedBuffer
buffer = GpuMappedBuffer.from_host_visible(8192)
with File(__import__("gdsdirect").__file__) as file:
    file.read_into(buffer, size=100)
    child = os.fork()
    if child == 0:
        result = file.read_into(buffer, offset=1, size=200)
        buffer.close()
        os._exit(0 if result.nbytes == 200 else 1)
    assert os.waitpid(child, 0)[1] == 0
    file.read_into(buffer, size=100)
buffer.close()
"""
    )


def test_threads_that_start_at_once_share_one_ring(buffer: GpuMappedBuffer) -> None:
    barrier = threading.Barrier(8)
    rings = []

    def work() -> None:
        barrier.wait()
        rings.append(ring_of(buffer))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, rings))) == 1
