"""Streams into GPU memory, with fake_cuda.py in CUDA's place.

The same on a real GPU is in tests/gpu.
"""

import asyncio
import gc
import random
import threading
from pathlib import Path

import pytest
from fake_cuda import Array, CUresult, FakeDriver

import gdsdirect
from gdsdirect import CudaError, DataPath, File, WayClosedError, gpu, stream_files
from gdsdirect.gpu_chunks import GpuChunk, GpuChunkStream

pytestmark = pytest.mark.usefixtures("driver")

DATA = random.Random(13).randbytes((9 << 20) + 777)
SIZE = 64 << 10


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chunks") / "file"
    made.write_bytes(DATA)
    return made


@pytest.fixture
def file(path: Path) -> "gdsdirect.File":
    return gdsdirect.open(path)


def bytes_of(array: Array, chunk: GpuChunk) -> bytes:
    interface = chunk.__cuda_array_interface__
    assert interface["typestr"] == "|u1"
    start = interface["data"][0] - array.address
    assert start % 512 == 0
    return array.contents()[start : start + interface["shape"][0]]


@pytest.mark.parametrize("offset", [0, 4096, 777])
@pytest.mark.parametrize("size", [SIZE, 1000, 3 << 20])
def test_all_of_a_file(offset: int, size: int, file: File, driver: FakeDriver) -> None:
    array = Array(driver, 4 * size + 100)
    came, ends = b"", []
    with file.stream(array, chunk_size=size, offset=offset, size=40 * size) as stream:
        for chunk in stream:
            assert (chunk.file, chunk.offset) == (file.path, offset + len(came))
            assert chunk.bounce_bytes == chunk.nbytes
            assert chunk.path in (DataPath.FILE_FIXED, DataPath.FILE_DIRECT, DataPath.BUFFERED)
            assert chunk.why is not None
            assert chunk.why.startswith("streams into GPU memory go through page-locked slots")
            came += bytes_of(array, chunk)
            ends.append(chunk.nbytes)
            chunk.release()
        wanted = DATA[offset : offset + 40 * size]
        assert came == wanted
        assert set(ends[:-1]) <= {size}
        progress = stream.progress
        assert (progress.nbytes, progress.total) == (len(wanted), len(wanted))
        assert sum(progress.ways.values()) == len(wanted)
        assert (progress.held, progress.in_flight) == (0, 0)
    assert len(gpu._pools.of(gpu.device(0))._free) == 1


def test_nothing(tmp_path: Path, driver: FakeDriver) -> None:
    (tmp_path / "empty").touch()
    with gdsdirect.open(tmp_path / "empty") as file, file.stream(Array(driver, 4096)) as stream:
        assert list(stream) == []
        assert list(stream) == []


def test_a_slot_is_the_consumers_until_it_is_released(file: File, driver: FakeDriver) -> None:
    array = Array(driver, 4 * SIZE)
    with file.stream(array, chunk_size=SIZE) as stream:
        held = [next(stream) for _ in range(4)]
        with pytest.raises(BufferError, match="all 4 slots of the GPU memory are held"):
            next(stream)
        assert stream.progress.held == 4
        for number, chunk in enumerate(held):
            assert bytes_of(array, chunk) == DATA[number * SIZE : (number + 1) * SIZE]
        held[2].release()
        held[2].release()
        with pytest.raises(AttributeError, match="the chunk is released"):
            _ = held[2].__cuda_array_interface__
        with next(stream) as fifth:
            assert bytes_of(array, fifth) == DATA[4 * SIZE : 5 * SIZE]
            assert bytes_of(array, held[0]) == DATA[:SIZE]
        del held[0], fifth  # dropped is released too
        assert next(stream).offset == 5 * SIZE


def test_all_that_there_is_may_be_held(tmp_path: Path, driver: FakeDriver) -> None:
    (tmp_path / "file").write_bytes(DATA[: 3 * SIZE])
    with (
        gdsdirect.open(tmp_path / "file") as file,
        file.stream(Array(driver, 3 * SIZE), chunk_size=SIZE) as stream,
    ):
        assert [chunk.offset for chunk in list(stream)] == [0, SIZE, 2 * SIZE]


def test_what_uses_a_slot_comes_before_the_next_copy(file: File, driver: FakeDriver) -> None:
    device = gpu.device(0)
    with device.current():
        theirs = int(device.call("cuStreamCreate", 1))
    with file.stream(Array(driver, 2 * SIZE), chunk_size=SIZE) as stream:
        next(stream).release(theirs)
        assert driver.waits[-1][1] == theirs
        next(stream).release()
        assert driver.waits[-1][1] == 1  # the default one
    with device.current():
        device.call("cuStreamDestroy", theirs)


def test_copies_go_on_beside_the_consumer(file: File, driver: FakeDriver) -> None:
    """While the first chunks are held, the next ones are read and copied."""
    with file.stream(Array(driver, 32 * SIZE), chunk_size=SIZE) as stream:
        chunks = [next(stream) for _ in range(4)]
        assert driver.copies > len(chunks)


@pytest.mark.parametrize("direct", [True, False])
def test_many_files(direct: bool, tmp_path: Path, driver: FakeDriver) -> None:
    sizes = [0, 1, 4096, 70_000, 200_000, 5] * 20
    paths = []
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"{number:03}")
        paths[-1].write_bytes(DATA[number : number + size])
    array = Array(driver, 16 * SIZE)
    came: dict[str, bytes] = {str(path): b"" for path in paths}
    with stream_files(paths, array, chunk_size=SIZE, direct=direct) as stream:
        for chunk in stream:
            came[chunk.file] += bytes_of(array, chunk)
            chunk.release()
    assert came == {str(path): path.read_bytes() for path in paths}


def test_an_error_of_a_file_comes_at_its_turn(tmp_path: Path, driver: FakeDriver) -> None:
    paths = [tmp_path / str(number) for number in range(3)]
    paths[0].write_bytes(DATA[:100])
    paths[2].write_bytes(DATA[:200])
    with stream_files(paths, Array(driver, 4 * SIZE), chunk_size=SIZE) as stream:
        assert next(stream).nbytes == 100
        with pytest.raises(FileNotFoundError):
            next(stream)
        assert next(stream).nbytes == 200
        with pytest.raises(StopIteration):
            next(stream)


def test_asyncio(file: File, driver: FakeDriver) -> None:
    """Where all slots are held, `async for` waits for one, whoever releases it."""
    array = Array(driver, 2 * SIZE)

    async def read() -> bytes:
        came = b""
        held: list[GpuChunk] = []
        async with file.stream(array, chunk_size=SIZE, size=20 * SIZE) as stream:
            async for chunk in stream:
                came += bytes_of(array, chunk)
                held.append(chunk)
                if len(held) == 2:
                    threading.Timer(0.01, held.pop(0).release).start()
        return came

    assert asyncio.run(read()) == DATA[: 20 * SIZE]


def test_closing_wakes_who_waits_for_a_slot(file: File, driver: FakeDriver) -> None:
    async def read() -> None:
        stream = file.stream(Array(driver, 2 * SIZE), chunk_size=SIZE)
        held = [await anext(stream), await anext(stream)]
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await stream.aclose()
        with pytest.raises(ValueError, match="the stream is closed"):
            await asyncio.wait_for(waiting, 10)
        assert len(held) == 2

    asyncio.run(read())


def read_all(stream: GpuChunkStream) -> None:
    for chunk in stream:
        chunk.release()


@pytest.mark.parametrize("name", ["cuMemcpyHtoDAsync", "cuEventRecord", "cuEventSynchronize"])
@pytest.mark.parametrize("after", [0, 7])
def test_cuda_fails(name: str, after: int, file: File, driver: FakeDriver) -> None:
    """The error is raised, once nothing is under way, and slots are as good as before."""
    with file.stream(Array(driver, 4 * SIZE), chunk_size=SIZE) as stream:
        driver.fail_after(name, after, CUresult.CUDA_ERROR_LAUNCH_FAILED)
        with pytest.raises(CudaError, match="launch failed"):
            read_all(stream)
        driver.fail.clear()
    array = Array(driver, 4 * SIZE)
    assert file.read_into(array, size=SIZE).nbytes == SIZE
    assert array.contents()[:SIZE] == DATA[:SIZE]


def test_a_stream_that_is_left(file: File, driver: FakeDriver) -> None:
    array = Array(driver, 8 * SIZE)
    stream = file.stream(array, chunk_size=SIZE)
    chunk = next(stream)
    stream.close()
    stream.close()
    assert bytes_of(array, chunk) == DATA[:SIZE]
    chunk.release()
    with pytest.raises(ValueError, match="the stream is closed"):
        next(stream)
    dropped = file.stream(array, chunk_size=SIZE)
    next(dropped)
    del dropped
    gc.collect()
    assert len(gpu._pools.of(gpu.device(0))._free) == 1


def test_what_is_asked_for_is_checked(file: File, driver: FakeDriver) -> None:
    array = Array(driver, 8192)
    with pytest.raises(ValueError, match="no room for a chunk of 8193"):
        file.stream(array, chunk_size=8193)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        file.stream(array, chunk_size=0)
    with pytest.raises(ValueError, match="no room for a chunk"):  # of a slot's memory
        file.stream(Array(driver, 64 << 20), chunk_size=32 << 20)
    with pytest.raises(WayClosedError, match="page-locked slots"):
        file.stream(array, require=DataPath.CUFILE)
    with file.stream(array, require={DataPath.CUFILE, DataPath.BUFFERED}) as stream:
        assert next(stream).path is DataPath.BUFFERED
    assert len(gpu._pools.of(gpu.device(0))._free) == 1
