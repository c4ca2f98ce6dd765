"""open() and File on this host: any range, by any way, of files that change too.

Namespaces, peer memory, other file systems and drives that fail: tests/lab.
"""

import asyncio
import gc
import os
import pickle
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reading import check_own_or_zero, punch, random_range, read_and_compare, read_randomly
from support import file_system, run_python

import gdsdirect
from gdsdirect import (
    AsyncUringStream,
    DataPath,
    File,
    GpuMappedBuffer,
    ShortReadError,
    WayClosedError,
)

MIB = 1 << 20
WAYS = (DataPath.FILE_FIXED, DataPath.FILE_DIRECT, DataPath.BUFFERED)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """On a file system that takes O_DIRECT: /tmp may not be one."""
    for parent in (Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()):
        if file_system(parent) not in ("tmpfs", "ramfs"):
            with tempfile.TemporaryDirectory(dir=parent) as made:
                yield Path(made)
                return
    pytest.skip("no file system that takes O_DIRECT")


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random("data").randbytes(5 * MIB + 1234)


@pytest.fixture(scope="module")
def path(folder: Path, data: bytes) -> Path:
    made = folder / "data"
    made.write_bytes(data)
    return made


@pytest.fixture
def buffer() -> Iterator[GpuMappedBuffer]:
    with GpuMappedBuffer.from_host_visible(6 * MIB) as made:
        yield made


# ---- Reading


def test_a_whole_file(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    with gdsdirect.open(path) as file:
        assert (file.path, file.size, file.closed) == (str(path), len(data), False)
        result = file.read_into(buffer)
        assert (result.nbytes, result.path, result.why) == (len(data), DataPath.FILE_FIXED, None)
        assert result.bounce_bytes == len(data) % file._origin.alignment
    with buffer.view() as view:
        assert view[: len(data)] == data


@pytest.mark.parametrize("way", WAYS)
def test_3400_random_reads(way: DataPath, path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    """10,200 in all. The lab has as many more, along the ways that need a drive."""
    read_randomly(path, data, buffer, [way], 3400, way)


@pytest.mark.parametrize("nbytes", [0, 1, 511, 512, 4095, 4096, 4097, 12345])
def test_small_files(nbytes: int, folder: Path, buffer: GpuMappedBuffer) -> None:
    path = folder / "small"
    path.write_bytes(contents := os.urandom(nbytes))
    read_randomly(path, contents, buffer, [None, *WAYS] if nbytes > 5000 else [None], 20, nbytes)
    with File(path) as file:
        assert file.read_into(buffer).nbytes == nbytes


def test_only_the_ends_are_copied(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    with File(path) as file:
        block = file._origin.alignment
        for offset, size, copied in (
            (0, block, 0),
            (4096, MIB, 0),
            (1, block - 1, block - 1),
            (1, 2 * block - 1, block - 1),
            (block - 1, MIB + 2, 2),
            (5, 7, 7),
        ):
            result = read_and_compare(file, buffer, data, offset, size, offset)
            assert result.bounce_bytes == copied


def test_a_file_with_holes(folder: Path, buffer: GpuMappedBuffer) -> None:
    path = folder / "holes"
    with path.open("wb") as file:
        file.write(b"begin")
        file.seek(3 * MIB)
        file.write(b"middle")
        file.truncate(5 * MIB + 77)
    read_randomly(path, path.read_bytes(), buffer, [None, *WAYS], 60, "holes")


def test_what_was_written_a_moment_ago(folder: Path, buffer: GpuMappedBuffer) -> None:
    """It is in the page cache only, and a direct read has it all the same."""
    path = folder / "fresh"
    for round_ in range(20):
        path.write_bytes(contents := os.urandom(100_000 + round_))
        with File(path) as file:
            read_and_compare(file, buffer, contents, 0, len(contents), 0)


def test_any_memory(path: Path, data: bytes) -> None:
    with File(path) as file:
        plain = bytearray(1000)
        assert file.read_into(plain, offset=77, size=1000).nbytes == 1000
        assert plain == data[77:1077]
        plain += b"it may be resized again"
        array = np.zeros((100, 100), np.float32)
        result = file.read_into(array, offset=4096, size=array.nbytes)
        assert array.tobytes() == data[4096 : 4096 + result.nbytes]
        with pytest.raises(ValueError, match="read-only"):
            file.read_into(bytes(10), size=10)


def test_memory_that_lies_askew(path: Path, data: bytes) -> None:
    """Address and offset are not apart by what the drive wants a multiple of: said, by slots."""
    memory = np.zeros(MIB + 8192, np.uint8)
    with File(path) as file:
        least, block = file._origin.memory_alignment, file._origin.alignment
        for by in {1, least, block}:
            start = -memory.ctypes.data % 4096 + by
            with GpuMappedBuffer.from_object(memory[start : start + MIB]) as askew:
                result = read_and_compare(file, askew, data, 0, MIB, 0)
                fixed = read_and_compare(file, askew, data, 0, MIB, 0, DataPath.FILE_FIXED)
            assert result.bounce_bytes == (MIB if by % least else 0)
            assert (result.why is None) == (by % block == 0)
            assert "not apart by a multiple of" in str(result.why) or by == block
            way = DataPath.FILE_DIRECT if by % block else DataPath.FILE_FIXED
            assert result.path is way
            assert fixed.bounce_bytes == (MIB if by % block else 0)


def test_a_device_is_read_like_a_file(buffer: GpuMappedBuffer) -> None:
    """A loop device; real drives are in the lab."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as image:
        image.write(contents := os.urandom(MIB))
        image.flush()
        made = subprocess.run(
            ["losetup", "--find", "--show", "--read-only", image.name],
            capture_output=True,
            text=True,
        )
        if made.returncode:
            pytest.skip(f"no loop device here: {made.stderr.strip()}")
        device = made.stdout.strip()
        try:
            read_randomly(device, contents, buffer, [None, *WAYS], 50, "loop")
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)


# ---- Ways


def test_the_page_cache_when_asked_for(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    with File(path, direct=False) as file:
        result = read_and_compare(file, buffer, data, 3, MIB, 5)
        assert (result.path, result.why) == (DataPath.BUFFERED, "it was opened with direct=False")
        assert result.bounce_bytes == 0
        with pytest.raises(WayClosedError, match="FILE_FIXED, it was opened with direct=False"):
            file.read_into(buffer, size=10, require=DataPath.FILE_FIXED)


@pytest.mark.parametrize(
    ("require", "taken"),
    [
        (DataPath.FILE_DIRECT, DataPath.FILE_DIRECT),
        ({DataPath.FILE_DIRECT, DataPath.BUFFERED}, DataPath.FILE_DIRECT),
        ([DataPath.BUFFERED, DataPath.FILE_FIXED], DataPath.FILE_FIXED),
        ({DataPath.NVME_PASSTHROUGH, DataPath.BUFFERED}, DataPath.BUFFERED),
    ],
)
def test_require(
    require: DataPath | set[DataPath],
    taken: DataPath,
    path: Path,
    data: bytes,
    buffer: GpuMappedBuffer,
) -> None:
    with File(path) as file:
        assert read_and_compare(file, buffer, data, 3, MIB, 5, require).path is taken


def test_what_may_not_be_taken_is_told_with_its_reason(path: Path, buffer: GpuMappedBuffer) -> None:
    with File(path) as file:
        with pytest.raises(WayClosedError) as caught:
            file.read_into(buffer, size=1, require={DataPath.NVME_PASSTHROUGH, DataPath.CUFILE})
        assert caught.value.obstacles.keys() == {"NVME_PASSTHROUGH", "CUFILE"}
        assert caught.value.filename == str(path)
        assert "not an NVMe namespace" in str(caught.value)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (str(copy), copy.obstacles) == (str(caught.value), caught.value.obstacles)
        for wrong in ("fixed", [DataPath.BUFFERED, 3]):
            with pytest.raises(TypeError, match="give DataPath members"):
                file.read_into(buffer, size=1, require=wrong)  # type: ignore[arg-type]


def test_a_file_in_memory_says_why() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as named:
        if file_system(Path(named.name)) != "tmpfs":
            pytest.skip("/dev/shm is no tmpfs")
        named.write(contents := os.urandom(8192))
        named.flush()
        with File(named.name) as file:
            target = bytearray(8191)
            result = file.read_into(target, offset=1)
            assert (result.path, target) == (DataPath.BUFFERED, contents[1:])
            assert "in memory" in str(result.why) or "takes no O_DIRECT" in str(result.why)


UNREGISTERED = """
import resource, sys
from gdsdirect import DataPath, File, GpuMappedBuffer
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
import os
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with File(sys.argv[1]) as file, GpuMappedBuffer.from_host_visible(1 << 20) as buffer:
    result = file.read_into(buffer, size=8192)
    assert result.path is DataPath.FILE_DIRECT, result
    assert "exceeds RLIMIT_MEMLOCK, 65536" in result.why, result
"""


def test_memory_that_cannot_be_registered(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become an ordinary user, for whom the limit holds")
    for each in (path, *path.parents):
        os.chmod(each, os.stat(each).st_mode | 0o005) if each.stat().st_uid == os.getuid() else None
    done = subprocess.run(
        [sys.executable, "-P", "-c", UNREGISTERED, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- Files that change


def test_a_file_that_shrinks(folder: Path, buffer: GpuMappedBuffer) -> None:
    """After it was opened, and after it was asked how large it is."""
    path = folder / "shrinks"
    for way in (None, *WAYS):
        path.write_bytes(contents := os.urandom(MIB))
        with File(path) as file:
            os.truncate(path, 500_001)
            read_and_compare(file, buffer, contents[:500_001], 0, MIB, 0, way)
            read_and_compare(file, buffer, contents[:500_001], 600_000, 10, 0, way)
            with pytest.raises(ValueError, match="give size=, or a larger buffer"):
                file.read_into(bytearray(10))


def test_a_file_that_grows(folder: Path, buffer: GpuMappedBuffer) -> None:
    path = folder / "grows"
    contents = os.urandom(MIB)
    path.write_bytes(contents[:1000])
    with File(path) as file:
        for size in (1000, 1001, 5000, 400_000, MIB):
            with path.open("r+b") as writer:
                writer.write(contents[:size])
            assert file.size == size
            for way in (None, *WAYS):
                read_and_compare(file, buffer, contents[:size], 0, MIB, 0, way)


def test_a_file_that_is_replaced_or_deleted_stays_itself(
    folder: Path, buffer: GpuMappedBuffer
) -> None:
    path = folder / "replaced"
    path.write_bytes(contents := os.urandom(100_000))
    with File(path) as file:
        (folder / "new").write_bytes(os.urandom(50_000))
        os.replace(folder / "new", path)
        read_and_compare(file, buffer, contents, 0, 100_000, 0)
        path.unlink()
        for way in WAYS:
            read_and_compare(file, buffer, contents, 11, 99_000, 0, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_writer_meanwhile(way: DataPath, folder: Path, buffer: GpuMappedBuffer) -> None:
    """Cut off, punched and written again all the time: each byte is 0 or the one of its place."""
    path, stop = folder / "changing", threading.Event()
    contents = random.Random(7).randbytes(2 * MIB)
    path.write_bytes(contents)
    writer = threading.Thread(target=_change, args=(path, contents, stop))
    writer.start()
    chance = random.Random(str(way))
    try:
        with File(path) as file:
            for _ in range(300):
                where = random_range(chance, len(contents), buffer.nbytes)
                check_own_or_zero(file, buffer, contents, where, way)
    finally:
        stop.set()
        writer.join()


def _change(path: Path, contents: bytes, stop: threading.Event) -> None:
    chance = random.Random(8)
    with path.open("r+b", buffering=0) as file:
        while not stop.is_set():
            at = chance.randrange(len(contents))
            size = chance.randrange(1, 300_000)
            match chance.randrange(4):
                case 0:
                    file.truncate(at)
                    file.truncate(len(contents))
                case 1:
                    punch(file.fileno(), at, size)
                case 2:
                    file.truncate(max(at, len(contents) - size))
                case _:
                    os.pwrite(file.fileno(), contents[at : at + size], at)


# ---- Many at a time


def test_threads(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    failures: list[BaseException] = []
    part = buffer.nbytes // 8

    def work(number: int) -> None:
        chance = random.Random(number)
        try:
            with buffer.view() as view:
                for _ in range(200):
                    offset, size, _ = random_range(chance, len(data), part)
                    target = number * part
                    result = file.read_into(buffer, offset=offset, size=size, target_offset=target)
                    assert view[target : target + result.nbytes] == data[offset : offset + size]
        except BaseException as error:
            failures.append(error)

    with File(path) as file:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_tasks(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    part = buffer.nbytes // 50 // 4096 * 4096

    async def work(file: File, view: memoryview, number: int) -> None:
        chance = random.Random(number)
        for _ in range(30):
            offset, size, _ = random_range(chance, len(data), part)
            target = number * part
            result = await file.read_into_async(
                buffer, offset=offset, size=size, target_offset=target
            )
            assert view[target : target + result.nbytes] == data[offset : offset + size]

    async def main() -> None:
        with File(path) as file, buffer.view() as view:
            await asyncio.gather(*(work(file, view, number) for number in range(50)))
            with pytest.raises(WayClosedError):
                await file.read_into_async(buffer, size=1, require=DataPath.CUFILE)
            assert (await file.read_into_async(target := bytearray(10), size=10)).nbytes == 10
            assert target == data[:10]

    asyncio.run(main())


def test_a_task_that_is_cancelled(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    """The next read waits for what it left in flight, and gets its own bytes."""

    async def main() -> None:
        with File(path) as file, buffer.view() as view:
            for _ in range(50):
                task = asyncio.create_task(file.read_into_async(buffer))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await file.read_into_async(buffer, offset=MIB, size=MIB)
                assert view[:MIB] == data[MIB : 2 * MIB]

    asyncio.run(main())


def test_a_loop_that_ends_with_a_read_in_flight(path: Path, data: bytes) -> None:
    """The buffer isn't held for ever."""
    buffer = GpuMappedBuffer.from_host_visible(6 * MIB)

    async def main(file: File) -> None:
        asyncio.create_task(file.read_into_async(buffer)).cancel()
        task = asyncio.create_task(file.read_into_async(buffer))
        await asyncio.sleep(0)
        task.cancel()

    with File(path) as file:
        asyncio.run(main(file))
        file.read_into(buffer, offset=MIB, size=MIB)
        with buffer.view() as view:
            assert view[:MIB] == data[MIB : 2 * MIB]
    deadline = time.monotonic() + 5
    while True:
        try:
            buffer.close()
            break
        except BufferError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# ---- Many ranges


def test_many_ranges(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    """Whole blocks, and any; arrays, NumPy's and lists."""
    chance = random.Random("many")
    with File(path) as file, buffer.view() as view:
        for grain, way in [(4096, None), (1, None), *((4096, way) for way in WAYS)]:
            sizes = [grain * chance.randrange(1, 4 if grain > 1 else 9000) for _ in range(200)]
            offsets = [chance.randrange(len(data) - size) // grain * grain for size in sizes]
            targets = [16384 * number + (number % 3 if grain == 1 else 0) for number in range(200)]
            arrays = chance.choice(
                [
                    (offsets, sizes, targets),
                    (array("Q", offsets), array("I", sizes), array("Q", targets)),
                    (np.array(offsets), np.array(sizes, np.int32), np.array(targets)),
                ]
            )
            result = file.read_many_into(buffer, *arrays, require=way)
            assert result.nbytes == sum(sizes) == sum(result.ways.values())
            assert way is None or result.path is way
            for offset, size, target in zip(offsets, sizes, targets, strict=True):
                assert view[target : target + size] == data[offset : offset + size]
        assert file.read_many_into(buffer, [], [], []).nbytes == 0
        assert file.read_many_into(buffer, [5, 9], [0, 3], [0, 1]).nbytes == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([0], [1], [0, 1]), r"have \[1, 1, 2\] numbers: give as many of each"),
        (([-1], [1], [0]), r"offsets: give integers from 0 to 2\*\*64 - 1"),
        (([0], [1 << 32], [0]), r"sizes: give integers from 0 to 2\*\*32 - 1"),
        ((np.array([-1]), [1], [0]), "offsets has negative numbers"),
        (([0], [2], [6 * MIB - 1]), "a range ends at byte 6291457 of the buffer, which has"),
        (([0], [1], [(1 << 64) - 1]), "a range ends at byte"),
    ],
)
def test_wrong_ranges(
    arguments: tuple[list[int], list[int], list[int]],
    text: str,
    path: Path,
    buffer: GpuMappedBuffer,
) -> None:
    with File(path) as file, pytest.raises(ValueError, match=text):
        file.read_many_into(buffer, *arguments)


def test_a_range_beyond_the_end(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    with File(path) as file:
        for way in (None, *WAYS):
            for offset in (len(data) - 1, len(data), len(data) + 5000, 1 << 62):
                with pytest.raises(ShortReadError):
                    file.read_many_into(buffer, [0, offset], [4096, 4096], [0, 4096], require=way)


# ---- What is refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"offset": -1}, "offset is -1: give bytes, 0 or more"),
        ({"target_offset": -5}, "target_offset is -5"),
        ({"size": -2}, "size is -2"),
        ({"size": 6 * MIB + 1}, "size is 6291457: the buffer has 6291456 bytes, and room for"),
        ({"size": 10, "target_offset": 6 * MIB - 9}, "room for 9 from target_offset 6291447"),
        ({"target_offset": 6 * MIB + 1}, "target_offset is 6291457: outside of"),
        ({"target_offset": MIB}, "has 5244114 bytes from offset 0 on, and the buffer has room"),
    ],
)
def test_wrong_numbers(
    arguments: dict[str, int], text: str, path: Path, buffer: GpuMappedBuffer
) -> None:
    with File(path) as file, pytest.raises(ValueError, match=text):
        file.read_into(buffer, **arguments)


def test_what_cannot_be_opened(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        File(folder / "missing")
    with pytest.raises(ValueError, match="is neither a file nor a device"):
        File(folder)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        with pytest.raises(ValueError, match="is neither a file nor a device"):
            File(folder / "socket")
    os.mkfifo(folder / "fifo")
    with pytest.raises(ValueError, match="is neither a file nor a device"):
        File(folder / "fifo")
    with pytest.raises(OSError, match="a file without an end"):
        File("/proc/version")
    with pytest.raises(ValueError, match="not an NVMe namespace"):
        File("/dev/null")
    with pytest.raises(TypeError):
        File(3)  # type: ignore[arg-type]


def test_closed(path: Path, buffer: GpuMappedBuffer) -> None:
    file = gdsdirect.open(os.fsencode(path))
    assert "closed" not in repr(file)
    file.close()
    file.close()
    assert file.closed
    assert "closed" in repr(file)
    for use in (lambda: file.size, file.fileno, lambda: file.read_into(buffer), file.__enter__):
        with pytest.raises(ValueError, match="is closed"):
            use()
    with File(path) as other, buffer.view() as view:
        view.release()
        buffer.close()
        with pytest.raises(ValueError, match="the memory is closed"):
            other.read_into(buffer)


def test_a_stream_takes_it_too(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    with File(path) as file, AsyncUringStream(buffer) as stream:
        stream.submit_read_fixed(file, 4096, 8192, 0)
        (completion,) = stream.wait()
        assert (completion.result(), completion.path) == (8192, DataPath.FILE_FIXED)
        with buffer.view() as view:
            assert view[:8192] == data[4096 : 4096 + 8192]


def test_nothing_is_left_open(path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            buffer = GpuMappedBuffer.from_host_visible(MIB)
            file = File(path)
            for way in WAYS:
                file.read_into(buffer, offset=1, size=1000, require=way)
            del file, buffer
        gc.collect()
        deadline = time.monotonic() + 5  # the kernel ends a ring a moment later
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_garbage_at_the_interpreters_end(path: Path) -> None:
    """The extension module may be gone before what it made."""
    run_python(
        """
import sys
import gdsdirect
class Cycle: pass
cycle = Cycle()
cycle.itself, cycle.file = cycle, gdsdirect.open(sys.argv[1])
cycle.buffer = gdsdirect.GpuMappedBuffer.from_host_visible(4096)
""",
        str(path),
    )
