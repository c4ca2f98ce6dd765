"""Streams of chunks: right bytes in order, slots that are not used twice, and constant memory."""

import asyncio
import gc
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import run_python

import gdsdirect
from gdsdirect import ChunkStream, DataPath, File, GpuMappedBuffer, WayClosedError, stream_files

MIB = 1 << 20


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random("chunks").randbytes(5 * MIB + 1234)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> Path:
    made = tmp_path_factory.mktemp("chunks") / "data"
    made.write_bytes(data)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small ones, empty ones, and a few that are several chunks."""
    folder, chance = tmp_path_factory.mktemp("files"), random.Random("files")
    made = {}
    for number in range(600):
        size = chance.choice([0, 1, 511, 4096, 5000, 100_000, chance.randrange(100_000)])
        if number % 97 == 50:
            size = 700_000 + number
        path = folder / f"{number:03}"
        made[str(path)] = contents = chance.randbytes(size)
        path.write_bytes(contents)
    return made


@pytest.fixture
def buffer() -> Iterator[GpuMappedBuffer]:
    with GpuMappedBuffer.from_host_visible(4 * MIB) as made:
        yield made


def collected(stream: ChunkStream) -> dict[str, bytes]:
    """All bytes by file; each chunk must go on where the one before it ended."""
    found: dict[str, bytearray] = {}
    for chunk in stream:
        so_far = found.setdefault(chunk.file, bytearray())
        assert chunk.offset in (0, len(so_far)) or len(so_far) == 0
        assert chunk.nbytes == chunk.view.nbytes
        so_far += chunk.view
    return {name: bytes(contents) for name, contents in found.items()}


# ---- One file


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1000, 4096, 70_001, 512 << 10, MIB])
@pytest.mark.parametrize(
    ("offset", "size"), [(0, None), (1, None), (4096, 3 * MIB), (12345, 54321), (5 * MIB, 9 * MIB)]
)
def test_a_file(
    offset: int,
    size: int | None,
    chunk_size: int | None,
    direct: bool,
    path: Path,
    data: bytes,
    buffer: GpuMappedBuffer,
) -> None:
    expected = data[offset:] if size is None else data[offset : offset + size]
    with gdsdirect.open(path, direct=direct) as file:
        with file.stream(buffer, offset=offset, size=size, chunk_size=chunk_size) as stream:
            assert stream.progress.total == len(expected)
            at = offset
            found = []
            for chunk in stream:
                assert (chunk.file, chunk.offset) == (str(path), at)
                at += chunk.nbytes
                found.append(bytes(chunk.view))
        assert b"".join(found) == expected
        if chunk_size is not None:
            assert {len(each) for each in found[:-1]} <= {chunk_size}
        assert stream.progress.nbytes == sum(stream.progress.ways.values()) == len(expected)


def test_nothing_to_read(path: Path, data: bytes, buffer: GpuMappedBuffer, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with File(path) as file, File(tmp_path / "empty") as empty:
        for stream in (
            file.stream(buffer, offset=len(data)),
            file.stream(buffer, offset=len(data) + 9999),
            file.stream(buffer, size=0),
            empty.stream(buffer),
        ):
            with stream:
                assert list(stream) == []
                assert list(stream) == []


def test_a_file_that_is_cut_off_meanwhile(tmp_path: Path, buffer: GpuMappedBuffer) -> None:
    path = tmp_path / "data"
    path.write_bytes(contents := os.urandom(8 * MIB))
    with File(path) as file, file.stream(buffer, chunk_size=MIB) as stream:
        found = b""
        for chunk in stream:
            if not found:
                os.truncate(path, 5_500_001)
            found += chunk.view
        assert contents.startswith(found)
        assert len(found) == 5_500_001


def test_progress(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    with File(path) as file, file.stream(buffer, chunk_size=512 << 10) as stream:
        assert (stream.progress.seconds, stream.progress.rate) == (0, 0)
        seen = 0
        for number, chunk in enumerate(stream, 1):
            seen += chunk.nbytes
            progress = stream.progress
            assert (progress.nbytes, progress.total) == (seen, len(data))
            assert progress.held in (1, 2) if number > 1 else progress.held == 1
            assert progress.in_flight <= len(data) - seen
            assert progress.rate > 0
            assert set(progress.ways) == {chunk.path}
        assert stream.progress.in_flight == 0


# ---- Slots


def test_held_chunks_are_not_overwritten(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    with File(path) as file, file.stream(buffer, chunk_size=256 << 10) as stream:
        kept = [next(stream) for _ in range(10)]
        for chunk in stream:
            chunk.release()
        for chunk in kept:
            assert chunk.view == data[chunk.offset : chunk.offset + chunk.nbytes]


def test_when_all_are_held(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    with File(path) as file, file.stream(buffer, chunk_size=MIB) as stream:
        kept = [next(stream) for _ in range(4)]
        with pytest.raises(BufferError, match="all 4 slots of the buffer are held: release"):
            next(stream)
        kept.pop(2)
        kept.append(next(stream))
        assert kept[-1].view == data[4 * MIB : 5 * MIB]
        kept[0].release()
        kept[0].release()
        assert len(list(stream)) == 1


@pytest.mark.parametrize("releasing", [True, False])
def test_an_array_keeps_the_slot_of_a_chunk_that_is_gone(
    releasing: bool, path: Path, data: bytes, buffer: GpuMappedBuffer
) -> None:
    with File(path) as file, file.stream(buffer, chunk_size=MIB) as stream:
        chunk = next(stream)
        array = np.frombuffer(chunk.view, np.uint8)
        if releasing:
            chunk.release()
        del chunk
        rest = [bytes(chunk.view) for chunk in stream]
        assert array.tobytes() == data[:MIB]
        assert b"".join(rest) == data[MIB:]
        assert stream.progress.held == 1
    assert array.tobytes() == data[:MIB]
    with pytest.raises(BufferError, match="in use by 1"):
        buffer.close()
    del array
    buffer.close()


def test_arrays_by_the_way(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    """What most will do: an array of each chunk, gone before the next is asked for, or with it."""
    total = 0
    with File(path) as file, file.stream(buffer, chunk_size=512 << 10) as stream:
        for chunk in stream:
            total += int(np.frombuffer(chunk.view, np.uint8).astype(np.int64).sum())
    assert total == sum(data)


def test_the_end_of_the_stream_releases_its_chunks(path: Path, buffer: GpuMappedBuffer) -> None:
    with File(path) as file, file.stream(buffer, chunk_size=MIB) as stream:
        chunk = next(stream)
    with pytest.raises(ValueError, match="released"):
        chunk.view[0]
    chunk.release()
    with pytest.raises(ValueError, match="the stream is closed"):
        next(stream)
    stream.close()
    buffer.close()


def test_leaving_early(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    """What is in flight may not hit those who use the buffer next."""
    with File(path) as file:
        for closing in (True, False) * 20:
            stream = file.stream(buffer, chunk_size=64 << 10)
            next(stream).release()
            if closing:
                stream.close()
            del stream
            file.read_into(buffer, offset=MIB, size=MIB)
            with buffer.view() as view:
                assert view[:MIB] == data[MIB : 2 * MIB]


def test_leaving_copies_early(
    files: dict[str, bytes], path: Path, data: bytes, buffer: GpuMappedBuffer
) -> None:
    """The same of what threads copy from the page cache."""
    with File(path) as file:
        for _ in range(20):
            stream = stream_files(files, buffer, chunk_size=64 << 10, direct=False)
            next(stream).release()
            del stream
            file.read_into(buffer, offset=MIB, size=MIB)
            with buffer.view() as view:
                assert view[:MIB] == data[MIB : 2 * MIB]


def test_chunks_released_by_other_threads(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    sums: dict[int, int] = {}

    def work(chunk: gdsdirect.Chunk) -> None:
        with chunk:
            sums[chunk.offset] = sum(chunk.view)

    with File(path) as file, file.stream(buffer, chunk_size=64 << 10) as stream:
        for chunk in stream:
            thread = threading.Thread(target=work, args=(chunk,))
            del chunk
            thread.start()
            thread.join()
    assert sum(sums.values()) == sum(data)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"offset": -1}, "offset is -1"),
        ({"size": -1}, "size -1"),
        ({"chunk_size": 0}, "chunk_size is 0: give bytes, 1 or more"),
        ({"chunk_size": 5 * MIB}, "no room for a chunk of 5242880 in whole pages"),
        ({"chunk_size": 4 * MIB, "offset": 1}, "no room for a chunk"),
    ],
)
def test_wrong_numbers(
    arguments: dict[str, int], text: str, path: Path, buffer: GpuMappedBuffer
) -> None:
    with File(path) as file, pytest.raises(ValueError, match=text):
        file.stream(buffer, **arguments)


def test_a_way_that_is_closed(path: Path, buffer: GpuMappedBuffer) -> None:
    with (
        File(path) as file,
        file.stream(buffer, require=DataPath.NVME_PASSTHROUGH) as stream,
        pytest.raises(WayClosedError),
    ):
        next(stream)
    with (
        stream_files([path, path], buffer, require=DataPath.CUFILE) as many,
        pytest.raises(WayClosedError),
    ):
        next(many)


# ---- Many files


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 8192, 100_000, 300_000])
def test_many_files(
    chunk_size: int | None, direct: bool, files: dict[str, bytes], buffer: GpuMappedBuffer
) -> None:
    with stream_files(files, buffer, chunk_size=chunk_size, direct=direct) as stream:
        assert stream.progress.total is None
        found = collected(stream)
    assert list(found) == list(files)
    assert found == files


def test_a_file_that_cannot_be_read_is_one_error(
    files: dict[str, bytes], buffer: GpuMappedBuffer, tmp_path: Path
) -> None:
    """When it is its turn; those around it are there."""
    names = list(files)[:40]
    os.mkfifo(tmp_path / "fifo")
    wrong: list[str | bytes | Path] = [tmp_path / "missing", tmp_path, str(tmp_path / "fifo")]
    paths = [*names[:20], *wrong, *map(os.fsencode, names[20:])]
    errors, found = [], []
    with stream_files(paths, buffer) as stream:
        while True:
            try:
                found.append(next(stream))
            except StopIteration:
                break
            except (OSError, ValueError) as error:
                errors.append((len(found), type(error)))
            else:
                assert found[-1].view == files[found[-1].file]
                found[-1].release()
    assert [chunk.file for chunk in found] == names
    assert errors == [(20, FileNotFoundError), (20, ValueError), (20, ValueError)]


def test_one_that_fails_takes_no_other_along(tmp_path: Path, buffer: GpuMappedBuffer) -> None:
    """A file that is cut off when it was opened already, and its path leads elsewhere."""
    paths = [tmp_path / f"{number:03}" for number in range(100)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    with stream_files(paths, buffer, chunk_size=4096) as stream:
        found = [next(stream).file]
        for path in paths[60:70]:
            os.truncate(path, 5)
            path.unlink()
            path.write_bytes(b"another file")
        for chunk in stream:
            whole = chunk.view == Path(chunk.file).name.encode() * 1000
            assert whole or chunk.view == (Path(chunk.file).name.encode() * 1000)[:5]
            found.append(chunk.file)
    assert found == list(map(str, paths))


def test_threads_share_a_stream(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    """Each chunk is handed out once."""
    found: dict[int, bytes] = {}

    def work(stream: ChunkStream) -> None:
        for chunk in stream:
            with chunk:
                found[chunk.offset] = bytes(chunk.view)

    with File(path) as file, file.stream(buffer, chunk_size=16 << 10) as stream:
        threads = [threading.Thread(target=work, args=(stream,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert b"".join(found[offset] for offset in sorted(found)) == data


def test_a_file_that_shrinks_between_opening_and_reading(
    tmp_path: Path, buffer: GpuMappedBuffer
) -> None:
    paths = [tmp_path / str(number) for number in range(200)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    lengths = {}
    with stream_files(paths, buffer, chunk_size=100_000) as stream:
        for chunk in stream:
            lengths[chunk.file] = chunk.nbytes
            assert bytes(chunk.view) == (Path(chunk.file).name.encode() * 1000)[: chunk.nbytes]
            for path in paths[150:]:
                os.truncate(path, 5)
    assert lengths[str(paths[0])] == 1000
    assert lengths[str(paths[199])] == 5


def test_any_iterable_of_paths(files: dict[str, bytes], buffer: GpuMappedBuffer) -> None:
    with stream_files((Path(name) for name in files), buffer) as stream:
        assert sum(chunk.nbytes for chunk in stream) == sum(map(len, files.values()))
    with stream_files([], buffer) as stream:
        assert list(stream) == []
    plain = bytearray(MIB)
    with stream_files(files, plain) as stream:
        assert sum(chunk.nbytes for chunk in stream) == sum(map(len, files.values()))
    plain += b"may be resized again"
    with stream_files([b"x\0y"], buffer) as stream, pytest.raises(ValueError, match="null byte"):
        next(stream)


# ---- asyncio


def test_async_for(
    path: Path, data: bytes, files: dict[str, bytes], buffer: GpuMappedBuffer
) -> None:
    async def main() -> None:
        with File(path) as file:
            async with file.stream(buffer, chunk_size=70_000) as stream:
                assert b"".join([bytes(chunk.view) async for chunk in stream]) == data
        async with stream_files(files, buffer) as stream:
            seen = 0
            async for chunk in stream:
                assert chunk.offset or chunk.view == files[chunk.file][: chunk.nbytes]
                seen += chunk.nbytes
            assert seen == sum(map(len, files.values()))

    asyncio.run(main())


def test_tasks_share_a_stream_and_may_be_cancelled(
    files: dict[str, bytes], buffer: GpuMappedBuffer
) -> None:
    """Also while the next files are being opened; no chunk is lost, or comes twice."""

    async def main() -> None:
        found: dict[tuple[str, int], int] = {}

        async def work(stream: ChunkStream) -> None:
            async for chunk in stream:
                found[chunk.file, chunk.offset] = chunk.nbytes
                chunk.release()
                await asyncio.sleep(0)

        async with stream_files(files, buffer) as stream:
            for _ in range(5):
                hasty = asyncio.create_task(anext(stream))
                await asyncio.sleep(0)
                hasty.cancel()
                [chunk] = await asyncio.gather(hasty, return_exceptions=True)
                if isinstance(chunk, gdsdirect.Chunk):  # it was faster
                    found[chunk.file, chunk.offset] = chunk.nbytes
                    chunk.release()
            await asyncio.gather(*(work(stream) for _ in range(4)))
        assert sum(found.values()) == sum(map(len, files.values()))

    asyncio.run(main())


def test_async_for_waits_for_a_slot(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    async def main() -> None:
        with File(path) as file:
            async with file.stream(buffer, chunk_size=MIB) as stream:
                kept = [await anext(stream) for _ in range(4)]
                task = asyncio.create_task(anext(stream))
                await asyncio.sleep(0.02)
                assert not task.done()
                threading.Thread(target=kept.pop(1).release).start()
                chunk = await asyncio.wait_for(task, 5)
                assert chunk.view == data[4 * MIB : 5 * MIB]
                kept.append(chunk)
                array = np.frombuffer(kept[0].view, np.uint8)
                kept.clear()
                del chunk
                kept = [await anext(stream) for _ in range(1)]
                assert array.tobytes() == data[:MIB]

    asyncio.run(main())


def test_async_for_left_early(path: Path, data: bytes, buffer: GpuMappedBuffer) -> None:
    async def main() -> None:
        with File(path) as file, buffer.view() as view:
            for _ in range(10):
                async with file.stream(buffer, chunk_size=64 << 10) as stream:
                    async for chunk in stream:
                        chunk.release()
                        break
                await file.read_into_async(buffer, offset=MIB, size=MIB)
                assert view[:MIB] == data[MIB : 2 * MIB]

    asyncio.run(main())


def test_not_both_kinds_of_loop(path: Path, buffer: GpuMappedBuffer) -> None:
    async def main(stream: ChunkStream) -> None:
        with pytest.raises(RuntimeError, match="not both"):
            await anext(stream)

    with File(path) as file, file.stream(buffer) as stream:
        next(stream)
        asyncio.run(main(stream))


# ---- Memory


def test_a_stream_that_is_dropped_leaves_nothing(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    buffer = GpuMappedBuffer.from_host_visible(MIB)
    with File(path) as file:
        gc.disable()
        try:
            stream = file.stream(buffer)
            next(stream)
            del stream
            file.read_into(buffer, size=10)
            buffer.close()
        finally:
            gc.enable()
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the kernel ends a ring a moment later


CONSTANT = """
import os, resource, sys
import gdsdirect
from gdsdirect import GpuMappedBuffer
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with GpuMappedBuffer.from_host_visible(64 << 20) as buffer, gdsdirect.open(sys.argv[1]) as file:
    total = 0
    with file.stream(buffer) as stream:
        for chunk in stream:
            total += chunk.nbytes
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
print(total, grown)
"""


def test_a_gigabyte_takes_no_more_than_the_buffer(tmp_path: Path) -> None:
    """A hole, for which nothing need be written. `make bench` has 8 GiB."""
    path = tmp_path / "hole"
    path.touch()
    os.truncate(path, 1 << 30)
    total, grown = map(int, run_python(CONSTANT, str(path)).split())
    assert total == 1 << 30
    assert grown <= 100
