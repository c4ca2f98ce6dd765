"""Lanes: who waits for what, on pipes, whose reads come back when this test writes into them."""

import asyncio
import gc
import os
import random
import signal
import threading
import time
import warnings
import weakref
from array import array
from collections.abc import Iterator
from types import FrameType

import pytest
from support import run_python

from gdsdirect import AsyncUringStream, GpuMappedBuffer
from gdsdirect._uring_cmd import Source
from gdsdirect.lane import FileReads, Lane, LaneRing, Request, lane_of


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


def reads(lane: Lane, pipe: Pipe, targets: list[int]) -> FileReads:
    """A byte to each target."""
    zeros, ones = array("Q", bytes(8 * len(targets))), array("I", [1] * len(targets))
    return FileReads(lane, pipe.source, (zeros, ones, array("Q", targets)), fixed=False)


def test_requests_are_finished_in_any_order(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    lane = lane_of(buffer, None)
    requests = [lane.start(reads(lane, pipe, [i])) for i, pipe in enumerate(pipes)]
    order = list(range(len(pipes)))
    random.Random(1).shuffle(order)
    for i in order:
        pipes[i].write(bytes([i]))
        lane.wait(requests[i], None)
        assert requests[i].left == 0
    with buffer.view() as view:
        assert list(view[: len(pipes)]) == list(range(len(pipes)))


def test_each_thread_comes_back_with_its_own(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """Whoever waits in the kernel: a thread whose request is done doesn't wait for another's."""
    lane = lane_of(buffer, None)
    done: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            lane.wait(lane.start(reads(lane, pipes[i], [i])), 5 + time.monotonic())
            done.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pipes))]
    for thread in threads:
        thread.start()
    chance = random.Random(2)
    left = [i for i in range(len(pipes)) for _ in range(30)]
    chance.shuffle(left)
    for count, i in enumerate(left, 1):
        pipes[i].write(b"x")
        deadline = time.monotonic() + 5
        while len(done) < count and time.monotonic() < deadline:
            time.sleep(0)
        assert done[count - 1] == i
    for thread in threads:
        thread.join()


def test_more_reads_than_the_ring_has_room_for(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """A large request does not keep a small one waiting, whose drive is free."""
    lane = Lane(buffer, depth=8)
    large = lane.start(reads(lane, pipes[0], list(range(100))))
    pipes[0].write(b"a")
    small = lane.start(reads(lane, pipes[1], [200, 201]))
    pipes[1].write(b"bc")
    pipes[0].write(b"a" * 60)
    lane.wait(small, 5 + time.monotonic())
    pipes[0].write(b"a" * 39)
    lane.wait(large, 5 + time.monotonic())
    with buffer.view() as view:
        assert view[:100] == b"a" * 100
        assert sorted(view[200:202]) == sorted(b"bc")
    lane.close()


def test_what_is_given_up_holds_the_buffer(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    lane = lane_of(buffer, None)
    request = lane.start(reads(lane, pipes[0], [5]))
    with pytest.raises(TimeoutError):
        lane.wait(request, time.monotonic() + 0.02)
    lane.abandon(request)
    assert lane.abandoned == [request]
    with pytest.raises(BufferError, match="1 reads into the buffer are in flight"):
        buffer.close()
    pipes[0].write(b"z")
    buffer.close()
    assert lane.abandoned == []


def test_several_wait_for_what_was_given_up(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """All whose reads it is in the way of."""
    lane = lane_of(buffer, None)
    other = lane.start(reads(lane, pipes[1], [6]))
    request = lane.start(reads(lane, pipes[0], [5]))
    lane.abandon(request)
    threads = [
        threading.Thread(target=lane.wait, args=(each, None))
        for each in (other, request, request, request)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    pipes[0].write(b"z")
    for thread in threads[1:]:
        thread.join(5)
        assert not thread.is_alive()
    pipes[1].write(b"z")
    threads[0].join(5)
    assert not threads[0].is_alive()


def test_garbage_under_the_lock(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    """The collector may end a transfer while this very thread has the lane's lock."""
    lane = lane_of(buffer, None)
    request = lane.start(reads(lane, pipes[0], [5]))
    with lane._lock:
        lane.abandon(request)
    pipes[0].write(b"z")
    lane.wait(request, 5 + time.monotonic())


def test_a_thread_that_is_interrupted_hands_over(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    """The one that waits in the kernel, and one that waits for it."""
    lane = lane_of(buffer, None)
    requests = [lane.start(reads(lane, pipe, [i])) for i, pipe in enumerate(pipes[:3])]
    others = [
        threading.Thread(target=lane.wait, args=(request, 10 + time.monotonic()))
        for request in requests[1:]
    ]

    class Alarm(Exception):
        pass

    def ring(_: int, __: FrameType | None) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        for first in (True, False):
            if not first:
                for thread in others:
                    thread.start()
                time.sleep(0.05)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Alarm):
                lane.wait(requests[0], 10 + time.monotonic())
    finally:
        signal.signal(signal.SIGALRM, before)
    for pipe in pipes[:3]:
        pipe.write(b"x")
    for thread in others:
        thread.join(5)
        assert not thread.is_alive()
    lane.wait(requests[0], 5 + time.monotonic())


def test_a_source_that_is_closed_fails_its_own_request(
    buffer: GpuMappedBuffer, pipes: list[Pipe]
) -> None:
    lane = lane_of(buffer, None)
    other = lane.start(reads(lane, pipes[0], [0]))
    gone = Pipe()
    gone.close()
    request = lane.start(reads(lane, gone, [1, 2, 3]))
    lane.wait(request, None)
    assert (request.left, request.total) == (0, 0)
    assert isinstance(request.error, ValueError)
    pipes[0].write(b"y")
    lane.wait(other, 5 + time.monotonic())
    assert other.error is None


def test_tasks_of_a_loop(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        lane = lane_of(buffer, loop)
        assert lane_of(buffer, loop) is lane
        assert lane_of(buffer, None) is not lane
        requests = [lane.start(reads(lane, pipe, [i])) for i, pipe in enumerate(pipes)]
        waiting = [asyncio.create_task(lane.wait_async(request)) for request in requests]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        for i in (3, 1, 2):
            pipes[i].write(b"x")
            await asyncio.wait_for(waiting[i], 5)
        waiting[0].cancel()
        lane.abandon(requests[0])
        for pipe in pipes:
            pipe.write(b"y")
        await asyncio.wait_for(asyncio.gather(*waiting[1:]), 5)
        await asyncio.wait_for(lane.wait_async(requests[0]), 5)
        assert lane.abandoned == []

    asyncio.run(main())


def test_a_loop_that_ended_leaves_nothing(buffer: GpuMappedBuffer, pipes: list[Pipe]) -> None:
    lanes = []

    async def main() -> None:
        lane = lane_of(buffer, asyncio.get_running_loop())
        lanes.append(weakref.ref(lane))
        request = lane.start(reads(lane, pipes[0], [0]))
        pipes[0].write(b"x")
        await lane.wait_async(request)

    for _ in range(3):
        asyncio.run(main())
    gc.collect()
    assert [lane() for lane in lanes] == [None] * 3


def test_a_dropped_buffer_is_freed(pipes: list[Pipe]) -> None:
    """Its ring has the memory, and not the buffer, which would be a cycle."""
    buffer = GpuMappedBuffer.from_host_visible(1 << 20)
    lane = lane_of(buffer, None)
    request: Request = lane.start(reads(lane, pipes[0], [0]))
    pipes[0].write(b"x")
    lane.wait(request, None)
    gone = weakref.ref(lane)
    gc.disable()
    try:
        del request, lane, buffer
        assert gone() is None
    finally:
        gc.enable()


def test_a_fork_has_a_lane_of_its_own() -> None:
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


def test_threads_that_start_at_once_share_one_lane(buffer: GpuMappedBuffer) -> None:
    barrier = threading.Barrier(8)
    lanes = []

    def work() -> None:
        barrier.wait()
        lanes.append(lane_of(buffer, None))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, lanes))) == 1


def drop(kind: type[AsyncUringStream], buffer: GpuMappedBuffer) -> None:
    kind(buffer, 8)
    gc.collect()


def test_a_ring_that_the_collector_ends_before_its_lane() -> None:
    """Only a program's own stream is to be closed by it."""
    with GpuMappedBuffer.from_host_visible(4096) as buffer:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drop(LaneRing, buffer)
        with pytest.warns(ResourceWarning, match="unclosed stream"):
            drop(AsyncUringStream, buffer)
