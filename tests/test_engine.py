"""The engine below files, streams and rings: whatever others do meanwhile, nothing is lost.

Others are threads, signal handlers, finalizers, the caller's own objects, forked children, a server
that does not answer. They close, interrupt and give up at the worst moment. Calls then bring what
was asked for, or an exception that says why not; never another file's bytes, a crash, or a wait
without an end.

Each test is a process of its own, since what is wrong may be that it crashes or hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import functools
import gc
import json
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import fuse
import pytest
from disturbances import Storm

import gdsdirect
from gdsdirect import (
    AsyncUringStream,
    DataPath,
    File,
    Geometry,
    GpuMappedBuffer,
    Namespace,
    encode_nvme_read_sqe,
    safetensors,
)

HERE = Path(__file__).resolve().parent
PATIENCE = 20.0  # seconds, for what comes back at once unless it is lost
HUNG = 60.0  # seconds after which the process is ended: it waits for what never comes

SIZE = 1 << 20
DATA = random.Random(8).randbytes(SIZE)
GEOMETRY = Geometry(nsid=1, lba_size=512, capacity=1 << 20, max_transfer=64 << 10)

CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "import test_engine as tests; tests.run(sys.argv[2], sys.argv[3])"
)

Test = Callable[..., None]


def isolated(function: Test) -> Test:
    """A test that runs in a process of its own. It ends by itself, at last by `HUNG`."""

    @functools.wraps(function)
    def test(**arguments: Any) -> None:
        told = [str(HERE), function.__name__, json.dumps(arguments, default=str)]
        command = [sys.executable, "-P", "-W", "error", "-c", CHILD, *told]
        done = subprocess.run(command, capture_output=True, text=True)
        if (done.returncode, done.stdout, done.stderr) != (0, "done\n", ""):
            text = f"status {done.returncode}\n{done.stdout}{done.stderr}"
            pytest.fail(text, pytrace=False)

    return test


def run(name: str, arguments: str) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(HUNG, exit=True)
    globals()[name].__wrapped__(**json.loads(arguments))
    faulthandler.cancel_dump_traceback_later()
    print("done", flush=True)


needs_fuse = pytest.mark.skipif(
    fuse.missing() is not None, reason=f"for a file system of its own: {fuse.missing()}"
)
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="not root, who alone can become an ordinary user"
)


@contextlib.contextmanager
def crowd(*works: Callable[[], object]) -> Iterator[None]:
    """Threads beside the test, which must come to an end after it, and without an exception."""
    wrong: list[BaseException] = []

    def go(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=go, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong, f"in a thread: {wrong[0]!r}"
    assert not any(thread.is_alive() for thread in threads), "a thread never comes back"


def until(holds: Callable[[], object], text: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, text
        time.sleep(0.002)


def unless_closed(call: Callable[[], object]) -> bool:
    """Whether the call went well; False where it says that what it needs is closed."""
    try:
        call()
    except ValueError as error:
        if "closed" not in str(error):
            raise
        return False
    return True


def until_closed(call: Callable[[], object]) -> None:
    """Call it again and again."""
    while unless_closed(call):
        pass


def close(buffer: GpuMappedBuffer) -> None:
    """Close it, once what is in flight is back."""

    def is_closed() -> bool:
        with contextlib.suppress(BufferError):
            buffer.close()
        return buffer.closed

    until(is_closed, "the buffer can't be closed")


def buffer_of(nbytes: int = SIZE) -> GpuMappedBuffer:
    return GpuMappedBuffer.from_host_visible(nbytes)


def file_of(folder: str | Path, *, direct: bool = True) -> File:
    path = Path(folder) / "file"
    path.write_bytes(DATA)
    return gdsdirect.open(path, direct=direct)


def bytes_at(buffer: GpuMappedBuffer, place: int, size: int) -> bytes:
    with memoryview(buffer) as view:
        return bytes(view[place : place + size])


# ---- Closing a ring: by whom, and under what

PLACES = array("Q", range(0, 100 * 4096, 4096))  # more than the rings below have room for
ZEROS = array("Q", bytes(8 * len(PLACES)))
Use = Callable[[AsyncUringStream, File, Namespace, GpuMappedBuffer], object]


def submit_and_wait_async(ring: AsyncUringStream, file: File) -> None:
    async def wait() -> None:
        ring.submit_reads(file, ZEROS, 4096, PLACES)
        await ring.wait_async(len(PLACES))

    asyncio.run(wait())


def submit_and_iterate(ring: AsyncUringStream, file: File) -> None:
    async def iterate() -> None:
        ring.submit_reads(file, ZEROS, 4096, PLACES)
        async for completion in ring:
            assert completion.result() == 4096

    asyncio.run(iterate())


def submit_and_wait(ring: AsyncUringStream, file: File) -> None:
    ring.submit_reads(file, ZEROS, 4096, PLACES)
    for completion in ring.wait(len(PLACES)):
        assert completion.result() == 4096


def submit_and_wait_into(ring: AsyncUringStream, file: File) -> None:
    ring.submit_reads_fixed(file, ZEROS, 4096, PLACES)
    ring.wait_into(bytearray(16 * len(PLACES)), len(PLACES))


def commands(drive: Namespace, buffer: GpuMappedBuffer) -> bytes:
    return encode_nvme_read_sqe(drive.nsid, 0, 8, buffer.address) * 100


def one_by_one(ring: AsyncUringStream, file: File) -> None:
    for place in PLACES:
        ring.submit_read(file, place, 4096, place)


def facts(ring: AsyncUringStream, file: File) -> None:
    ring.submit_read(file, 0, 4096, 0)
    for _ in range(20):
        assert ring.inflight >= 0
        assert ring.stats.submitted >= 0
        assert ring.depth == 4
        ring.poll()


USES: dict[str, Use] = {
    "submit_reads": lambda ring, file, drive, buffer: ring.submit_reads(file, ZEROS, 4096, PLACES),
    "submit_reads_fixed": lambda ring, file, drive, buffer: ring.submit_reads_fixed(
        file, ZEROS, 4096, PLACES
    ),
    "submit_read": lambda ring, file, drive, buffer: one_by_one(ring, file),
    "submit_nvme_passthrough": lambda ring, file, drive, buffer: ring.submit_nvme_passthrough(
        drive, commands(drive, buffer)
    ),
    "submit_nvme_passthroughs": lambda ring, file, drive, buffer: ring.submit_nvme_passthroughs(
        (drive, commands(drive, buffer)) for _ in range(3)
    ),
    "wait": lambda ring, file, drive, buffer: submit_and_wait(ring, file),
    "wait_into": lambda ring, file, drive, buffer: submit_and_wait_into(ring, file),
    "wait_async": lambda ring, file, drive, buffer: submit_and_wait_async(ring, file),
    "async for": lambda ring, file, drive, buffer: submit_and_iterate(ring, file),
    "facts": lambda ring, file, drive, buffer: facts(ring, file),
}


@pytest.mark.parametrize("use", USES)
@isolated
def test_a_ring_is_closed_by_another_thread(use: str, tmp_path: str) -> None:
    chance = random.Random(use)
    drive = Namespace("/dev/null", geometry=GEOMETRY)
    with buffer_of() as buffer, file_of(tmp_path) as file:
        for _ in range(120):
            ring = AsyncUringStream(buffer, 4)

            work = functools.partial(USES[use], ring, file, drive, buffer)
            with crowd(*[functools.partial(until_closed, work)] * 2):
                time.sleep(chance.random() * 0.002)
                ring.close()
            assert ring.closed
    drive.close()


MILLION = array("Q", bytes(8 * 1_000_000))
LONG_USES: dict[str, Callable[[AsyncUringStream, File], object]] = {
    "submit_reads": lambda ring, file: ring.submit_reads(file, MILLION, 4096, MILLION),
    "submit_reads_fixed": lambda ring, file: ring.submit_reads_fixed(file, MILLION, 4096, MILLION),
    "wait": lambda ring, file: ring.wait(64),
    "wait_into": lambda ring, file: ring.wait_into(bytearray(16 * 64), 64),
}


@pytest.mark.parametrize("use", LONG_USES)
@isolated
def test_a_ring_is_closed_by_a_signals_handler(use: str, tmp_path: str) -> None:
    """Within a call that would take long: it waits for room, or for what never comes."""
    reader, writer = os.pipe()
    with buffer_of() as buffer, file_of(tmp_path) as file:
        for after in (0.001, 0.01, 0.05):
            ring = AsyncUringStream(buffer, 1 if use.startswith("submit") else 64)

            def handler(_: int, frame: object, ring: AsyncUringStream = ring) -> None:
                ring.close(timeout=0)

            signal.signal(signal.SIGALRM, handler)
            if use.startswith("wait"):
                ring.submit_reads(file, ZEROS[:10], 4096, PLACES[:10])
                ring.submit_read(reader, 0, 1, 0)
            signal.setitimer(signal.ITIMER_REAL, after)
            came = unless_closed(functools.partial(LONG_USES[use], ring, file))
            assert ring.closed
            assert came <= use.startswith("wait")  # what was there
    os.close(reader)
    os.close(writer)


class Cycle:
    """Garbage whose finalizer calls something."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.itself, self.call = self, call

    def __del__(self) -> None:
        self.call()


@isolated
def test_a_ring_is_closed_by_a_finalizer(tmp_path: str) -> None:
    """By the collector, while completions are made of what came."""
    count = 1000
    targets = array("Q", range(0, 512 * count, 512))
    with buffer_of() as buffer, file_of(tmp_path, direct=False) as file:
        for threshold in (20, 50, 200, 500):
            ring = AsyncUringStream(buffer, 1024)
            ring.submit_reads(file, targets, 512, targets)
            time.sleep(0.05)  # they are there
            gc.collect()
            Cycle(ring.close)
            gc.set_threshold(threshold)
            came: list[int] = []

            def take(ring: AsyncUringStream = ring, came: list[int] = came) -> None:
                came += [completion.result() for completion in ring.wait(count)]

            taken = unless_closed(take)
            gc.set_threshold(700)
            gc.collect()
            assert ring.closed
            assert came == [512] * count * taken


class Hook:
    """An argument that does something when it is asked for what it stands for."""

    def __init__(self, act: Callable[[], object], value: Any) -> None:
        self._act, self._value = act, value

    def _asked(self, *_: object) -> Any:
        self._act()
        return self._value

    fileno = __index__ = __float__ = _asked


class BufferHook(Hook):
    """The same for memory: CPython asks Python code for it since 3.12 (PEP 688)."""

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self._asked())


HOOKS: dict[str, Callable[[Callable[[], object], AsyncUringStream, File, Any], object]] = {
    "an iterator": lambda act, ring, file, batch: ring.submit_nvme_passthroughs(
        batch for _ in range(2) if act() is None
    ),
    "fileno()": lambda act, ring, file, batch: ring.submit_reads(
        Hook(act, file.fileno()), ZEROS, 4096, PLACES
    ),
    "fileno() of one": lambda act, ring, file, batch: ring.submit_read(
        Hook(act, file.fileno()), 0, 4096, 0
    ),
    "an offset": lambda act, ring, file, batch: ring.submit_read(file, Hook(act, 0), 4096, 0),
    "a target": lambda act, ring, file, batch: ring.submit_read(file, 0, 4096, Hook(act, 0)),
    "a size": lambda act, ring, file, batch: ring.submit_reads(
        file, ZEROS, Hook(act, 4096), PLACES
    ),
    "a timeout": lambda act, ring, file, batch: ring.wait(1, cast(Any, Hook(act, 0.1))),
    "a count": lambda act, ring, file, batch: ring.wait(cast(Any, Hook(act, 1)), 0.1),
    "memory of offsets": lambda act, ring, file, batch: ring.submit_reads(
        file, BufferHook(act, ZEROS), 4096, PLACES
    ),
    "memory of targets": lambda act, ring, file, batch: ring.submit_reads_fixed(
        file, ZEROS, 4096, BufferHook(act, PLACES)
    ),
    "memory of commands": lambda act, ring, file, batch: ring.submit_nvme_passthrough(
        batch[0], BufferHook(act, batch[1])
    ),
    "memory for records": lambda act, ring, file, batch: ring.wait_into(
        BufferHook(act, bytearray(1600)), 1, 0.1
    ),
}


asks_for_memory = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="CPython asks no Python code for memory before 3.12"
)


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(hook, marks=asks_for_memory if hook.startswith("memory") else ())
        for hook in HOOKS
    ],
)
@isolated
def test_a_ring_is_closed_by_an_argument_of_the_call(hook: str, tmp_path: str) -> None:
    """Between the check of the ring and the use of its memory."""
    drive = Namespace("/dev/null", geometry=GEOMETRY)
    with drive, buffer_of() as buffer, file_of(tmp_path) as file:
        batch = drive, commands(drive, buffer)
        ring = AsyncUringStream(buffer, 8)
        with pytest.raises(ValueError, match="closed"):
            HOOKS[hook](ring.close, ring, file, batch)
        if hook.startswith("fileno()"):
            return  # a number is the caller's to hold
        # The file that is closed instead is one that isn't read, or one that was held by then.
        for closed in (drive, file):
            with AsyncUringStream(buffer, 8) as ring:
                unless_closed(functools.partial(HOOKS[hook], closed.close, ring, file, batch))
                for completion in ring.wait(len(PLACES), PATIENCE):
                    assert completion.ok
                    assert completion.nbytes == 4096
        assert bytes_at(buffer, 0, 4096) in (bytes(4096), DATA[:4096])


# ---- Closing a file: its number is another file's then


def read_one(file: File, buffer: GpuMappedBuffer, size: int) -> bytes:
    file.read_into(buffer, offset=4096, size=size)
    return bytes_at(buffer, 0, size)


def read_many(file: File, buffer: GpuMappedBuffer, size: int) -> bytes:
    places = array("Q", range(0, size, 4096))
    file.read_many_into(buffer, places, array("I", [4096] * len(places)), places)
    return bytes_at(buffer, 0, len(places) * 4096)


def read_by_a_task(file: File, buffer: GpuMappedBuffer, size: int) -> bytes:
    asyncio.run(_read_by_a_task(file, buffer, size))
    return bytes_at(buffer, 0, size)


async def _read_by_a_task(file: File, buffer: GpuMappedBuffer, size: int) -> None:
    await file.read_into_async(buffer, offset=8192, size=size)


def read_by_the_page_cache(file: File, buffer: GpuMappedBuffer, size: int) -> bytes:
    """Also of a file that was opened for direct reads, by another descriptor."""
    file.read_into(buffer, size=size, require=DataPath.BUFFERED)
    return bytes_at(buffer, 0, size)


def read_chunks(file: File, buffer: GpuMappedBuffer, size: int) -> bytes:
    came = b""
    with file.stream(buffer, chunk_size=4096, size=size) as stream:
        for chunk in stream:
            came += bytes(chunk.view)
            chunk.release()
    return came


def read_by_a_ring(file: File, buffer: GpuMappedBuffer, size: int) -> bytes:
    with AsyncUringStream(buffer, 8) as ring:
        places = array("Q", range(0, size, 4096))
        ring.submit_reads(file, places, 4096, places)
        for completion in ring.wait(len(places)):
            completion.result()
    return bytes_at(buffer, 0, len(places) * 4096)


def read_singly_by_a_ring(file: File, buffer: GpuMappedBuffer, size: int) -> bytes:
    with AsyncUringStream(buffer, 8) as ring:
        ring.submit_read(file, 0, size + -size % 4096, 0)
        ring.wait()[0].result()
    return bytes_at(buffer, 0, size)


def size_of(file: File, buffer: GpuMappedBuffer, size: int) -> bytes:
    """As many letters as the file has bytes."""
    return (b"A" if file.size == SIZE else b"B") * size


READS: dict[str, Callable[[File, GpuMappedBuffer, int], bytes]] = {
    "read_into": read_one,
    "read_many_into": read_many,
    "read_into_async": read_by_a_task,
    "by the page cache": read_by_the_page_cache,
    "stream": read_chunks,
    "submit_reads": read_by_a_ring,
    "submit_read": read_singly_by_a_ring,
    "size": size_of,
}


@pytest.mark.parametrize("read", READS)
@isolated
def test_no_other_files_bytes_are_read(read: str, tmp_path: str) -> None:
    """Its number is given to another file as soon as a file is closed, whoever reads it then."""
    mine, other = Path(tmp_path) / "A", Path(tmp_path) / "B"
    mine.write_bytes(b"A" * SIZE)
    other.write_bytes(b"B" * (2 * SIZE))
    opened = [gdsdirect.open(mine)]
    done = threading.Event()
    outcomes: list[str] = []
    shared = buffer_of()

    def reader(number: int) -> None:
        chance = random.Random(number)
        apart = read in ("read_into_async", "stream", "submit_reads", "submit_read")
        while not done.is_set():
            buffer = buffer_of(1 << 17) if apart else shared
            size = chance.choice((4096, 65536, 1000))
            try:
                came = READS[read](opened[0], buffer, size)
            except ValueError:  # it was closed before
                came = b"A"
            # All who share a buffer read the same bytes into it.
            if came.strip(b"A"):
                outcomes.append(f"a read of A brought {came.strip(b'A')[:4]!r} among {size}")
                done.set()
            if apart:
                close(buffer)

    with crowd(*(functools.partial(reader, number) for number in range(4))):
        for number in range(300):
            opened[0].close()
            others = [os.open(other, os.O_RDONLY) for _ in range(3)]
            time.sleep(0.0005)
            for fd in others:
                os.close(fd)
            opened[0] = gdsdirect.open(mine, direct=number % 2 == 0)
            time.sleep(0.0005)
            if done.is_set():
                break
        done.set()
    assert not outcomes, outcomes[0]
    opened[0].close()
    close(shared)


# ---- Giving up: what was given up is waited for, by whatever ring comes next


class SlowDrive:
    """A file system's file on a loop device, and one that is read at once."""

    def __init__(self, folder: str) -> None:
        self.files = fuse.SlowFiles(Path(folder) / "mount")
        self._device, path = fuse.loop_device(self.files.slow)
        fast = Path(folder) / "fast"
        fast.write_bytes(b"F" * 65536)
        self.slow, self.fast = gdsdirect.open(path), gdsdirect.open(fast)
        self._places = iter(range(65536, fuse.SIZE, 131072))  # each is asked for once: it is cached

    def place(self) -> int:
        """Of what nobody has read."""
        return next(self._places)

    def close(self) -> None:
        self.files.let_go()
        self.slow.close()
        self.fast.close()
        os.close(self._device)
        self.files.close()


def give_up_in_a_thread(drive: SlowDrive, buffer: Any) -> Callable[[], None]:
    with pytest.raises(TimeoutError):
        drive.slow.read_into(buffer, offset=drive.place(), size=4096, timeout=0.2)
    return lambda: None


def give_up_a_task(drive: SlowDrive, buffer: Any) -> Callable[[], None]:
    """Of a loop that goes on in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def give_up() -> None:
        read = drive.slow.read_into_async(buffer, offset=drive.place(), size=4096)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read, 0.2)

    asyncio.run_coroutine_threadsafe(give_up(), loop).result(PATIENCE)

    def end() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    return end


def give_up_a_loop(drive: SlowDrive, buffer: Any) -> Callable[[], None]:
    """A task's read, and then its loop ends."""
    give_up_a_task(drive, buffer)()
    return lambda: None


def give_up_a_ring(drive: SlowDrive, buffer: Any) -> Callable[[], None]:
    ring = AsyncUringStream(buffer, 8)
    ring.submit_read(drive.slow, drive.place(), 4096, 0)
    assert ring.wait(1, 0.2) == []
    with pytest.raises(TimeoutError):
        ring.close(timeout=0.1)
    return ring.close


def take_in_a_thread(drive: SlowDrive, buffer: Any) -> None:
    drive.fast.read_into(buffer, size=4096)


def take_many(drive: SlowDrive, buffer: Any) -> None:
    drive.fast.read_many_into(buffer, ZEROS[:1], array("I", [4096]), ZEROS[:1])


def take_in_a_task(drive: SlowDrive, buffer: Any) -> None:
    async def take() -> None:
        await drive.fast.read_into_async(buffer, size=4096)

    asyncio.run(take())


def take_a_chunk(drive: SlowDrive, buffer: Any) -> None:
    with drive.fast.stream(buffer, chunk_size=4096) as stream:
        next(stream).release()


def take_by_a_ring(drive: SlowDrive, buffer: Any) -> None:
    with AsyncUringStream(buffer, 8) as ring:
        ring.submit_read(drive.fast, 0, 4096, 0)
        ring.wait()[0].result()


GIVERS = {
    "a thread": give_up_in_a_thread,
    "a task": give_up_a_task,
    "a loop": give_up_a_loop,
    "a ring": give_up_a_ring,
}
TAKERS = {
    "a thread": take_in_a_thread,
    "a thread, many": take_many,
    "a task": take_in_a_task,
    "a stream": take_a_chunk,
    "a ring": take_by_a_ring,
}


def is_kept(drive: SlowDrive, memory: Any, giver: str, taker: str) -> str | None:
    """None where what a later read brought stays, when the one that was given up comes too."""
    view = memoryview(memory)
    end = GIVERS[giver](drive, memory)
    until(drive.files.waiting, "the read is not on its way")
    timer = threading.Timer(0.3, drive.files.let_go)
    timer.start()
    try:
        TAKERS[taker](drive, memory)
    except (OSError, BufferError, RuntimeError):
        came = None  # it was told
    else:
        came = bytes(view[:4096])
    timer.join()
    until(lambda: drive.files.waiting() == 0, "the file's server doesn't answer")
    end()
    time.sleep(0.1)  # the drive's answer is on its way to the buffer
    later = bytes(view[:4096])
    view.release()
    drive.files.hold()
    if came is None or came == later == b"F" * 4096:
        return None
    return f"{giver} gave up, {taker} read {came[:2]!r}, and later there was {later[:2]!r}"


def say_wrong(wrong: list[str | None]) -> None:
    texts = list(filter(None, wrong))
    assert not texts, "\n".join(texts)


@needs_fuse
@pytest.mark.root
@pytest.mark.parametrize("giver", GIVERS)
@isolated
def test_what_was_given_up_overwrites_nothing(giver: str, tmp_path: str) -> None:
    drive = SlowDrive(tmp_path)
    wrong = []
    for taker in TAKERS:
        buffer = buffer_of(4096)
        wrong.append(is_kept(drive, buffer, giver, taker))
        close(buffer)
    drive.close()
    say_wrong(wrong)


@needs_fuse
@pytest.mark.root
@isolated
def test_what_was_given_up_overwrites_nothing_of_other_memory(tmp_path: str) -> None:
    """That is made ready for each read anew, and is the same; pages are read into directly."""
    drive = SlowDrive(tmp_path)
    wrong = [
        is_kept(drive, make(), giver, taker)
        for make in (functools.partial(mmap.mmap, -1, 4096), functools.partial(bytearray, 4096))
        for giver, taker in (
            ("a thread", "a task"),
            ("a task", "a thread"),
            ("a thread", "a thread"),
        )
    ]
    drive.close()
    say_wrong(wrong)


# ---- A server that does not answer


@contextlib.contextmanager
def unanswered(files: fuse.SlowFiles, file: File) -> Iterator[None]:
    """The server doesn't answer as long as the block runs. A block that waits for it fails."""
    files.hold()
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    timer = threading.Timer(PATIENCE, files.let_go)
    timer.start()
    try:
        yield
        assert files.holds, "it waited until the server answered"
    finally:
        timer.cancel()
        files.let_go()


BLOCKED: dict[str, Callable[[fuse.SlowFiles, File, File, GpuMappedBuffer], None]] = {}


def blocked(function: Callable[[fuse.SlowFiles, File, File, GpuMappedBuffer], None]) -> None:
    BLOCKED[function.__name__] = function


@blocked
def a_timeout(files: fuse.SlowFiles, slow: File, fast: File, buffer: GpuMappedBuffer) -> None:
    with unanswered(files, slow), pytest.raises(TimeoutError):
        slow.read_into(buffer, size=4096, timeout=0.2)


@blocked
def a_timeout_of_many(
    files: fuse.SlowFiles, slow: File, fast: File, buffer: GpuMappedBuffer
) -> None:
    sizes = array("I", [4096] * 10)
    with unanswered(files, slow), pytest.raises(TimeoutError):
        slow.read_many_into(buffer, PLACES[:10], sizes, PLACES[:10], timeout=0.2)


@blocked
def ctrl_c(files: fuse.SlowFiles, slow: File, fast: File, buffer: GpuMappedBuffer) -> None:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with unanswered(files, slow), pytest.raises(KeyboardInterrupt):
        slow.read_into(buffer, size=4096)


@blocked
def other_tasks(files: fuse.SlowFiles, slow: File, fast: File, buffer: GpuMappedBuffer) -> None:
    async def tasks() -> None:
        read = asyncio.ensure_future(slow.read_into_async(buffer, size=4096))
        with unanswered(files, slow):
            for _ in range(50):
                await asyncio.sleep(0.001)
            assert not read.done()
        assert (await read).nbytes == 4096

    asyncio.run(tasks())


@blocked
def other_threads(files: fuse.SlowFiles, slow: File, fast: File, buffer: GpuMappedBuffer) -> None:
    """They read into the same buffer."""
    with crowd(lambda: slow.read_into(buffer, size=4096)), unanswered(files, slow):
        until(files.waiting, "the read never began")
        fast.read_into(buffer, size=4096, target_offset=8192)
        assert bytes_at(buffer, 8192, 4096) == DATA[:4096]


@blocked
def a_ring(files: fuse.SlowFiles, slow: File, fast: File, buffer: GpuMappedBuffer) -> None:
    with AsyncUringStream(buffer, 8) as ring, unanswered(files, slow):
        ring.submit_read(slow, 0, 4096, 0)
        assert ring.wait(1, 0.1) == []
        assert (ring.inflight, ring.stats.submitted) == (1, 1)
        ring.submit_read(fast, 0, 4096, 8192)
        assert [completion.result() for completion in ring.wait(1, PATIENCE)] == [4096]
        with pytest.raises(TimeoutError):
            ring.close(timeout=0.1)


@blocked
def ctrl_c_at_a_stream(
    files: fuse.SlowFiles, slow: File, fast: File, buffer: GpuMappedBuffer
) -> None:
    """Whose threads copy from the page cache."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    stream = gdsdirect.stream_files([files.slow], buffer, chunk_size=fuse.SIZE, direct=False)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with unanswered(files, slow), pytest.raises(KeyboardInterrupt):
        next(stream)
    stream.close()


@blocked
def a_handlers_timeout(
    files: fuse.SlowFiles, slow: File, fast: File, buffer: GpuMappedBuffer
) -> None:
    def handler(*_: object) -> None:
        raise TimeoutError("the handler's")

    signal.signal(signal.SIGALRM, handler)
    for size in (4096, 5000):
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with unanswered(files, slow), pytest.raises(TimeoutError, match="the handler's"):
            slow.read_into(buffer, size=size, timeout=PATIENCE)


@needs_fuse
@pytest.mark.root
@isolated
def test_a_copy_ends_with_its_stream_though_the_task_that_waited_was_cancelled(
    tmp_path: str,
) -> None:
    """What is read into the same memory next stays there."""

    async def main(files: fuse.SlowFiles, slow: File, fast: File, buffer: GpuMappedBuffer) -> None:
        files.hold()
        os.posix_fadvise(slow.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        threading.Timer(0.5, files.let_go).start()
        stream = gdsdirect.stream_files([files.slow], buffer, chunk_size=fuse.SIZE, direct=False)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.2)
        await stream.aclose()
        await fast.read_into_async(buffer, size=4096)
        files.let_go()
        await asyncio.sleep(0.1)
        assert bytes_at(buffer, 0, 4096) == DATA[:4096]

    folder = Path(tmp_path)
    buffer = buffer_of()
    with (
        fuse.SlowFiles(folder / "mount") as files,
        file_of(folder) as fast,
        gdsdirect.open(files.slow) as slow,
    ):
        asyncio.run(main(files, slow, fast, buffer))
        close(buffer)


@needs_fuse
@pytest.mark.root
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("what", BLOCKED)
@isolated
def test_a_server_that_does_not_answer_holds_up(what: str, direct: bool, tmp_path: str) -> None:
    """Nobody but those who read from it, and they have their timeouts and signals."""
    folder = Path(tmp_path)
    buffer = buffer_of()
    with (
        fuse.SlowFiles(folder / "mount") as files,
        file_of(folder) as fast,
        gdsdirect.open(files.slow, direct=direct) as slow,
    ):
        BLOCKED[what](files, slow, fast, buffer)
        close(buffer)


# ---- Ctrl-C


@isolated
def test_the_read_after_ctrl_c(tmp_path: str) -> None:
    chance = random.Random(4)
    with file_of(tmp_path) as file:
        buffer = buffer_of()
        for _ in range(300):
            storm = Storm(KeyboardInterrupt, chance.random() * 0.0008 + 1e-6, 1, lambda _: True)
            size = chance.choice((65536, 30_001))
            with contextlib.suppress(KeyboardInterrupt):
                storm.run(functools.partial(file.read_into, buffer, offset=1024, size=size))
            offset = 4096 * chance.randrange(200)
            file.read_into(buffer, offset=offset, size=4097, timeout=PATIENCE)
            assert bytes_at(buffer, 0, 4097) == DATA[offset : offset + 4097]
        close(buffer)


@isolated
def test_other_threads_beside_ctrl_c(tmp_path: str) -> None:
    chance = random.Random(5)

    def work(number: int, file: File, buffer: GpuMappedBuffer) -> None:
        own = random.Random(number)
        for _ in range(20):
            offset, size = own.randrange(SIZE - 65536), own.choice((4096, 65536, 1000))
            file.read_into(buffer, offset=offset, size=size, target_offset=number * 65536)
            came = bytes_at(buffer, number * 65536, size)
            assert came == DATA[offset : offset + size]

    with file_of(tmp_path) as file:
        for _ in range(60):
            buffer = buffer_of()
            works = [functools.partial(work, number, file, buffer) for number in (1, 2, 3)]

            def again_and_again(buffer: GpuMappedBuffer = buffer) -> None:
                for _ in range(1000):
                    file.read_into(buffer, size=chance.choice((4096, 65536, 1000)))

            with crowd(*works), contextlib.suppress(KeyboardInterrupt):
                delay = chance.random() * 0.004 + 1e-5
                Storm(KeyboardInterrupt, delay, 1, lambda _: True).run(again_and_again)
            close(buffer)


class Paths:
    """Paths one by one; the next one after some of them is Ctrl-C."""

    def __init__(self, paths: list[Path], places: set[int]) -> None:
        self._paths, self._places, self._asked = iter(paths), places, 0

    def __iter__(self) -> Paths:
        return self

    def __next__(self) -> Path:
        self._asked += 1
        if self._asked in self._places:
            raise KeyboardInterrupt
        return next(self._paths)


@pytest.mark.parametrize("direct", [True, False])
@isolated
def test_a_stream_whose_paths_are_interrupted(direct: bool, tmp_path: str) -> None:
    """Ctrl-C in the caller's own iterator of paths: each file comes once, in order."""
    paths = [Path(tmp_path) / f"{number:03}" for number in range(600)]
    for number, path in enumerate(paths):
        path.write_bytes(number.to_bytes(2, "little") * 500)
    buffer = buffer_of()
    came, interrupts = [], 0
    places = {1, 40, 257, 258, 400, 601}
    with gdsdirect.stream_files(
        Paths(paths, places), buffer, chunk_size=4096, direct=direct
    ) as stream:
        while True:
            try:
                for chunk in stream:
                    came.append(int.from_bytes(bytes(chunk.view[:2]), "little"))
                    chunk.release()
                break
            except KeyboardInterrupt:
                interrupts += 1
    left_out = [number for number in range(600) if number not in came]
    assert came == list(range(600)), f"without {len(left_out)} files: {left_out[:5]}"
    assert interrupts == len(places)
    close(buffer)


# ---- Closing a buffer, beside those who read into it


def read_parts(file: File, buffer: GpuMappedBuffer, number: int, chance: random.Random) -> None:
    offset, size = chance.randrange(SIZE - 70_000), chance.choice((100, 4096, 65536))
    file.read_into(buffer, offset=offset, size=size, target_offset=number * 65536)


def read_blocks(file: File, buffer: GpuMappedBuffer, number: int, chance: random.Random) -> None:
    file.read_into(buffer, offset=4096, size=65536, target_offset=number * 65536)


def read_many_parts(
    file: File, buffer: GpuMappedBuffer, number: int, chance: random.Random
) -> None:
    targets = array("Q", range(number * 65536, (number + 1) * 65536, 4096))
    sizes = array("I", [chance.randrange(1, 4096)] * len(targets))
    file.read_many_into(buffer, targets, sizes, targets)


def read_parts_by_a_task(
    file: File, buffer: GpuMappedBuffer, number: int, chance: random.Random
) -> None:
    async def read() -> None:
        await file.read_into_async(buffer, offset=777, size=5000, target_offset=number * 65536)

    asyncio.run(read())


BESIDE = {
    "parts of blocks": read_parts,
    "whole blocks": read_blocks,
    "many": read_many_parts,
    "tasks": read_parts_by_a_task,
}


@pytest.mark.parametrize("kind", BESIDE)
@isolated
def test_a_buffer_is_closed_beside_readers(kind: str, tmp_path: str) -> None:
    """It is refused, or they are."""
    shared = [buffer_of()]
    done = threading.Event()
    chance = random.Random(99)
    old = []

    def reader(number: int, file: File) -> None:
        own = random.Random(number)
        while not done.is_set():
            unless_closed(functools.partial(BESIDE[kind], file, shared[0], number, own))

    file = file_of(tmp_path)
    with file, crowd(*(functools.partial(reader, number, file) for number in range(4))):
        for _ in range(200):
            time.sleep(chance.random() * 0.003)
            old.append(shared[0])
            shared[0] = buffer_of()
            with contextlib.suppress(BufferError):
                old[-1].close()
        done.set()
    for buffer in (*old, *shared):
        close(buffer)


# ---- What is pinned


def pinned() -> int:
    """KiB that the kernel holds of this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmPin:")[1].split()[0])


def read_and_close(file: File) -> None:
    with buffer_of(4 << 20) as buffer:
        file.read_into(buffer, size=65536, require=DataPath.FILE_FIXED)


def read_parts_and_close(file: File) -> None:
    with buffer_of(4 << 20) as buffer:
        file.read_into(buffer, offset=7, size=65536)


def read_by_a_task_and_close(file: File) -> None:
    async def read(buffer: GpuMappedBuffer) -> None:
        await file.read_into_async(buffer, size=65536, require=DataPath.FILE_FIXED)

    with buffer_of(4 << 20) as buffer:
        asyncio.run(read(buffer))


def read_into_a_bytearray(file: File) -> None:
    file.read_into(bytearray(4 << 20), size=65536)


def stream_and_close(file: File) -> None:
    with buffer_of(4 << 20) as buffer, file.stream(buffer, require=DataPath.FILE_FIXED) as stream:
        for chunk in stream:
            chunk.release()


def make_a_ring_and_close(file: File) -> None:
    with buffer_of(4 << 20) as buffer, AsyncUringStream(buffer, 8, register=True) as ring:
        ring.submit_read_fixed(file, 0, 4096, 0)
        ring.wait()[0].result()


PINS = {
    "read_into": read_and_close,
    "read_into parts of blocks": read_parts_and_close,
    "read_into_async": read_by_a_task_and_close,
    "a bytearray": read_into_a_bytearray,
    "a stream": stream_and_close,
    "a ring": make_a_ring_and_close,
}


@pytest.mark.parametrize("use", PINS)
@isolated
def test_nothing_is_pinned_once_a_buffer_is_closed(use: str, tmp_path: str) -> None:
    with file_of(tmp_path) as file:
        for _ in range(10):
            before = pinned()
            PINS[use](file)
            assert pinned() == before, f"{before} KiB were pinned, and now {pinned()}"


def become_ordinary(limit: int) -> None:
    """A user of nobody else's, whose memory is counted for this process alone."""
    number = 60_000 + os.getpid() % 5000
    os.setgroups([])
    os.setgid(number)
    os.setuid(number)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: its /proc is its own still
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("use", PINS)
@isolated
def test_an_ordinary_users_next_buffer_is_registered_too(use: str, tmp_path: str) -> None:
    """Two of these would be beyond the limit."""
    with file_of(tmp_path) as file:
        PINS[use](file)  # what is imported is found now
        become_ordinary(8 << 20)
        for _ in range(30):
            PINS[use](file)


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("direct", [True, False])
@isolated
def test_an_ordinary_users_threads_lack_no_memory(direct: bool, tmp_path: str) -> None:
    """Each tensor is memory of its own, and rings count for a user's limit too."""
    count = 1500
    header = {
        f"{number}": {
            "dtype": "F64",
            "shape": [64],
            "data_offsets": [number * 512, number * 512 + 512],
        }
        for number in range(count)
    }
    text = json.dumps(header).encode()
    path = Path(tmp_path) / "file"
    numbers = array("d", [number for number in range(count) for _ in range(64)])
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers.tobytes())
    with safetensors.safe_open(path, direct=direct) as tensors, ThreadPoolExecutor(8) as threads:
        tensors.get_tensor("0")  # the file is open now
        become_ordinary(8 << 20)
        found = threads.map(tensors.get_tensor, header)
        assert [tensor[0] for tensor in found] == list(range(count))


# ---- Forking


STREAMS: dict[str, Callable[[Path, list[Path], GpuMappedBuffer], Any]] = {
    "stream_files": lambda path, paths, buffer: gdsdirect.stream_files(
        paths, buffer, chunk_size=8192
    ),
    "stream_files, cached": lambda path, paths, buffer: gdsdirect.stream_files(
        paths, buffer, chunk_size=8192, direct=False
    ),
    "stream": lambda path, paths, buffer: gdsdirect.open(path).stream(buffer, chunk_size=1024),
}


def child(work: Callable[[], object]) -> int:
    """The status of a forked child that does this."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that are there
        pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, chain=True)
        signal.alarm(int(PATIENCE))  # it hangs: this says where, and ends it
        try:
            work()
        except BaseException as error:
            sys.stderr.write(f"in the child: {error!r}\n")
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("kind", STREAMS)
@isolated
def test_a_forks_child_is_refused_a_stream(kind: str, tmp_path: str) -> None:
    """At once, and may read into the buffer by itself; the parent goes on."""
    paths = [Path(tmp_path) / f"{number:04}" for number in range(1000)]
    for number, path in enumerate(paths):
        path.write_bytes(number.to_bytes(2, "little") * 512)
    whole = Path(tmp_path) / "whole"
    whole.write_bytes(b"".join(number.to_bytes(2, "little") * 512 for number in range(1000)))
    buffer = buffer_of()
    stream = STREAMS[kind](whole, paths, buffer)
    came = []
    for chunk in stream:
        came.append(int.from_bytes(bytes(chunk.view[:2]), "little"))
        chunk.release()
        if len(came) == 300:
            break

    def work() -> None:
        with pytest.raises(RuntimeError, match="fork"):
            list(stream)
        with contextlib.suppress(RuntimeError):  # it is the parent's to close
            stream.close()
        gdsdirect.open(whole).read_into(buffer, size=4096)

    assert child(work) == 0
    for chunk in stream:
        came.append(int.from_bytes(bytes(chunk.view[:2]), "little"))
        chunk.release()
    assert came == list(range(1000))
    stream.close()
    close(buffer)


@isolated
def test_a_fork_beside_threads_that_read(tmp_path: str) -> None:
    """Whatever they were at when it was made, the child reads into the same buffer."""
    done = threading.Event()
    buffer = buffer_of()

    def reader(number: int, file: File) -> None:
        own = random.Random(number)
        while not done.is_set():
            read_parts(file, buffer, number, own)

    with file_of(tmp_path) as file:

        def work() -> None:
            for offset, size in ((0, 4096), (777, 5000)):
                file.read_into(buffer, offset=offset, size=size, target_offset=8 * 65536)
                assert bytes_at(buffer, 8 * 65536, size) == DATA[offset : offset + size]

        with crowd(*(functools.partial(reader, number, file) for number in range(3))):
            statuses = [child(work) for _ in range(40)]
            done.set()
    assert statuses == [0] * 40, statuses
    close(buffer)


# ---- The ring's descriptor


@isolated
def test_the_descriptor_of_a_ring_that_is_closed_meanwhile(tmp_path: str) -> None:
    """It is one, or the ring is closed; no errno of somebody else's."""
    chance = random.Random(2)
    with buffer_of() as buffer, file_of(tmp_path) as file:
        for _ in range(120):
            ring = AsyncUringStream(buffer, 64)

            def submit(ring: AsyncUringStream = ring) -> None:
                ring.submit_reads(file, ZEROS[:64], 4096, PLACES[:64])
                ring.poll()

            def ask(ring: AsyncUringStream = ring) -> None:
                assert ring.fileno() >= 0

            def watch(ring: AsyncUringStream = ring) -> None:
                async def wait() -> None:
                    while True:
                        await ring.wait_async(1)

                asyncio.run(wait())

            works = submit, submit, ask, ask, watch
            with crowd(*(functools.partial(until_closed, work) for work in works)):
                time.sleep(chance.random() * 0.002)
                ring.close()


# ---- Descriptors of a stream's files


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("end", ["an error", "an error of the consumer's", "left", "closed"])
@pytest.mark.parametrize("direct", [True, False])
@isolated
def test_a_streams_files_are_closed_with_it(end: str, direct: bool, tmp_path: str) -> None:
    """At once, and not when the collector comes, also those that were opened ahead."""
    paths = [Path(tmp_path) / f"{number:03}" for number in range(600)]
    for path in paths:
        path.write_bytes(b"x" * 5000)
    if end == "an error":
        paths[3] = Path(tmp_path) / "gone"
    gc.disable()
    with buffer_of() as buffer:
        with gdsdirect.stream_files(paths[:2], buffer, direct=direct) as stream:
            assert [chunk.nbytes for chunk in stream] == [5000, 5000]
        there = descriptors()  # with the buffer's ring
        for _ in range(4):
            try:
                with gdsdirect.stream_files(
                    paths, buffer, chunk_size=65536, direct=direct
                ) as stream:
                    for count, chunk in enumerate(stream):
                        chunk.release()
                        if end == "left" and count == 5:
                            break
                        if end == "closed" and count == 5:
                            stream.close()
                            break
                        if end == "an error of the consumer's" and count == 5:
                            raise LookupError
            except (FileNotFoundError, LookupError):
                assert end.startswith("an error")
            assert descriptors() == there, f"{descriptors()}, and there were {there}"
