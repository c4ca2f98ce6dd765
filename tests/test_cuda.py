"""GPU memory, with fake_cuda.py in CUDA's place: gdsdirect/cuda.py, gpu.py and cufile.py.

The same reads on a real GPU are in tests/gpu.
"""

import asyncio
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosts
import numpy as np
import pytest
from fake_cuda import Array, CUresult, FakeCuFile, FakeDriver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gdsdirect
from gdsdirect import (
    CudaError,
    DataPath,
    File,
    GpuMappedBuffer,
    ReadResult,
    WayClosedError,
    cuda,
    cufile,
    gpu,
)
from gdsdirect.cuda import DeviceMemory
from gdsdirect.host import Host
from gdsdirect.sysfs import Sysfs

DATA = random.Random(7).randbytes((9 << 20) + 777)
DRIVE = (DataPath.FILE_FIXED, DataPath.FILE_DIRECT, DataPath.BUFFERED)


pytestmark = pytest.mark.usefixtures("driver")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cuda") / "file"
    made.write_bytes(DATA)
    return made


@pytest.fixture
def file(path: Path) -> Iterator[File]:
    with gdsdirect.open(path) as opened:
        yield opened


def check(array: Array, result: ReadResult, offset: int, size: int, place: int = 0) -> None:
    """The bytes of the range are in their place, and nothing else was written."""
    expected = DATA[offset : offset + size]
    assert result.nbytes == len(expected)
    found = array.contents()
    assert found[place : place + len(expected)] == expected
    assert not (found[:place] + found[place + len(expected) :]).strip(b"\xa5")
    assert sum(result.ways.values()) == result.nbytes


# ---- Host memory that a GPU sees


@pytest.mark.parametrize("nbytes", [1, 5000, 3 << 20])
def test_host_memory_that_a_gpu_sees(nbytes: int, file: File, driver: FakeDriver) -> None:
    with GpuMappedBuffer.from_host_visible(nbytes, device=0) as buffer:
        assert driver.registered == {buffer.address: -(-nbytes // 4096) * 4096}
        assert buffer.device_address == buffer.address + (1 << 60)
        file.read_into(buffer, size=nbytes)
        assert bytes(buffer.view()) == DATA[:nbytes]
        gc.collect()
        ring = next(iter(buffer._rings.values()))
        assert ring.registered or ring.unregistered
    assert driver.registered == {}
    with pytest.raises(ValueError, match="closed"):
        _ = buffer.device_address


def test_memory_that_was_dropped_is_unregistered_once_nobody_sees_it(driver: FakeDriver) -> None:
    buffer = GpuMappedBuffer.from_host_visible(8192, device=1)
    array = np.asarray(buffer.tensor("uint8"))
    del buffer
    gc.collect()
    assert len(driver.registered) == 1
    array[:] = 3
    del array
    gc.collect()
    assert driver.registered == {}


def test_memory_that_is_in_use_stays_registered(driver: FakeDriver) -> None:
    buffer = GpuMappedBuffer.from_host_visible(8192, device=0)
    tensor = buffer.tensor("uint8")
    with pytest.raises(BufferError):
        buffer.close()
    assert len(driver.registered) == 1
    del tensor
    buffer.close()


def test_an_array_of_the_gpus(driver: FakeDriver) -> None:
    with GpuMappedBuffer.from_host_visible(8192, device=0) as buffer:
        tensor = buffer.tensor("float32", (4, 5), offset=64)
        address = buffer.device_address
        assert address is not None
        assert tensor.__cuda_array_interface__ == {
            "version": 3,
            "shape": (4, 5),
            "typestr": "<f4",
            "data": (address + 64, False),
            "strides": None,
            "stream": None,
        }
        assert tensor.__dlpack_device__() == (1, 0)
        assert not hasattr(buffer.tensor("bfloat16"), "__cuda_array_interface__")
        with pytest.raises(BufferError, match="read into its GpuMappedBuffer"):
            DeviceMemory.of(Array(driver, 8, data=(address, False)))
        del tensor


def test_other_buffers_are_no_arrays_of_the_gpus() -> None:
    with GpuMappedBuffer.from_host_visible(8192) as buffer:
        assert buffer.device_address is None
        assert not hasattr(buffer.tensor("uint8"), "__cuda_array_interface__")


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device is 2: CUDA shows 2"):
        GpuMappedBuffer.from_host_visible(4096, device=2)


@pytest.mark.parametrize("name", ["cuMemHostRegister", "cuMemHostGetDevicePointer"])
def test_memory_that_can_not_be_registered(name: str, driver: FakeDriver) -> None:
    driver.fail_after(name, 0, CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(CudaError, match=f"{name}: out of memory") as caught:
        GpuMappedBuffer.from_host_visible(4096, device=0)
    assert (caught.value.function, caught.value.code) == (name, 2)
    del caught
    gc.collect()
    assert driver.registered == {}


def test_the_numa_node_is_the_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 0 is there on every machine; a kernel without NUMA refuses, which is no error."""
    nodes: list[int] = []
    prefer = cuda._prefer_node

    def watched(node: int, address: int, nbytes: int) -> None:
        nodes.append(node)
        prefer(node, address, nbytes)

    monkeypatch.setattr(cuda, "_prefer_node", watched)
    monkeypatch.setattr(cuda.Device, "numa_node", 0)
    with GpuMappedBuffer.from_host_visible(1 << 20, device=0) as buffer, buffer.view() as view:
        view[:] = b"x" * (1 << 20)
    assert nodes == [0]


# ---- GPU memory that is given


def test_what_device_memory_tells(driver: FakeDriver) -> None:
    array = Array(driver, 1000, device=1)
    memory = DeviceMemory.of(array)
    assert (memory.address, memory.nbytes, memory.device) == (array.address, 1000, 1)
    del array
    gc.collect()
    assert driver.contents(memory.address)  # kept


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"data": (1 << 50, True)}, BufferError, "read-only"),
        ({"shape": (10, 10), "strides": (20, 1)}, BufferError, "not contiguous"),
        ({"shape": (10, 10), "strides": (1, 10)}, BufferError, "not contiguous"),
        ({"shape": (0, 10)}, ValueError, "empty"),
        ({"data": (1 << 50, False)}, BufferError, "no address of CUDA's"),
    ],
)
def test_memory_that_can_not_be_read_into(
    said: dict[str, Any], error: type[Exception], message: str, file: File, driver: FakeDriver
) -> None:
    with pytest.raises(error, match=message):
        file.read_into(Array(driver, 100, **said), size=1)


@pytest.mark.parametrize(
    ("shape", "strides", "nbytes"),
    [((), None, 4), ((3, 5), None, 60), ((1, 7), (4, 4), 28), ((2, 1, 3), (12, 999, 4), 24)],
)
def test_shapes(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, nbytes: int, driver: FakeDriver
) -> None:
    array = Array(driver, nbytes, shape=shape, strides=strides, typestr="<f4")
    assert DeviceMemory.of(array).nbytes == nbytes


class Tensor:
    """As a torch tensor on a GPU: by DLPack, in a capsule of NumPy's that tells its address."""

    def __init__(self, driver: FakeDriver, nbytes: int) -> None:
        self.array = Array(driver, nbytes)
        self.asked: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **asked: Any) -> object:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error
        return _capsule(self.array.address, self.array.contents().__len__())

    def contents(self) -> bytes:
        return self.array.contents()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.error is None:
            raise RuntimeError("asked for, although there was a capsule")
        return self.array.__cuda_array_interface__


def _capsule(address: int, nbytes: int) -> object:
    """A capsule of memory that is nowhere, and that nobody looks at."""
    interface = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, False)}
    return np.asarray(SimpleNamespace(__array_interface__=interface)).__dlpack__()


def test_a_tensor_by_dlpack(file: File, driver: FakeDriver) -> None:
    tensor = Tensor(driver, 5000)
    result = file.read_into(tensor, offset=10, size=4000, target_offset=100)  # type: ignore[arg-type]
    check(tensor.array, result, 10, 4000, 100)
    # On a stream that torch doesn't know, its work is waited for by way of the default stream.
    assert tensor.asked == [{"stream": 1, "max_version": (1, 1)}]
    assert [behind for _, behind in driver.waits] == [1]


def test_a_tensor_that_dlpack_can_not_give(file: File, driver: FakeDriver) -> None:
    """As torch's for a GPU that is not the current one."""
    tensor = Tensor(driver, 5000)
    tensor.error = BufferError("a different CUDA device index")
    check(tensor.array, file.read_into(tensor, size=5000), 0, 5000)


def test_memory_of_other_makers(file: File) -> None:
    class Rocm:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (10, 0)

    with pytest.raises(BufferError, match="DLPack's type 10"):
        file.read_into(Rocm(), size=1)  # type: ignore[arg-type]


# ---- Reads


@pytest.mark.parametrize("way", [None, *DRIVE])
def test_a_read_through_slots(way: DataPath | None, file: File, driver: FakeDriver) -> None:
    array = Array(driver, len(DATA))
    try:
        result = file.read_into(array, require=way)
    except WayClosedError as closed:
        pytest.skip(f"{closed}")
    check(array, result, 0, len(DATA))
    assert result.path in DRIVE if way is None else result.path is way
    assert result.bounce_bytes == len(DATA)
    assert result.event is None
    assert result.why is not None
    assert result.why.startswith("CUFILE is closed: ")
    assert driver.copies == 10


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_range(data: st.DataObject, path: Path, driver: FakeDriver) -> None:
    driver.delay = 0
    edges = st.sampled_from([0, 1, 511, 512, 4095, 4096, 1 << 20, len(DATA) - 1, len(DATA)])
    offset = data.draw(edges | st.integers(0, len(DATA) + 5000))
    size = data.draw(edges | st.integers(0, 3 << 20))
    place = data.draw(st.sampled_from([0, 1, 4096]) | st.integers(0, 9000))
    direct = data.draw(st.booleans())
    array = Array(driver, place + size + data.draw(st.integers(1, 5000)))
    with gdsdirect.open(path, direct=direct) as file:
        result = file.read_into(array, offset=offset, size=size, target_offset=place)
    check(array, result, offset, size, place)
    assert direct or result.ways.keys() <= {DataPath.BUFFERED}


def test_a_file_with_a_hole(tmp_path: Path, driver: FakeDriver) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as writer:
        writer.seek(3 << 20)
        writer.write(b"end")
    array = Array(driver, (3 << 20) + 3)
    with gdsdirect.open(path) as file:
        file.read_into(array)
    assert array.contents() == bytes(3 << 20) + b"end"


def test_numbers_are_checked_against_the_memory(file: File, driver: FakeDriver) -> None:
    array = Array(driver, 100)
    for wrong in ({"size": 101}, {"target_offset": 101}, {"offset": -1}, {}):
        with pytest.raises(ValueError, match=r"bytes|outside"):
            file.read_into(array, **wrong)  # type: ignore[arg-type]
    assert driver.copies == 0


def test_on_the_device_that_has_the_memory(file: File, driver: FakeDriver) -> None:
    arrays = [Array(driver, 3000, device=ordinal) for ordinal in (0, 1)]
    for array in arrays:
        check(array, file.read_into(array, size=3000), 0, 3000)
    assert {pool._gpu.ordinal for pool in gpu._pools._by_ordinal.values()} == {0, 1}


def test_what_is_not_for_gpu_memory(file: File, driver: FakeDriver) -> None:
    array = Array(driver, 100)
    with pytest.raises(ValueError, match=r"timeout is 1\.5"):
        file.read_into(array, size=1, timeout=1.5)
    with pytest.raises(TypeError, match="GPU memory, which read_into and streams take"):
        file.read_many_into(array, [0], [1], [0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stream= is for GPU memory"):
        file.read_into(bytearray(10), size=1, stream=1)


def test_reads_go_on_while_copies_are_under_way(file: File, driver: FakeDriver) -> None:
    """With no copy getting through, half of the slots are filled, and no more than that pend."""
    array = Array(driver, len(DATA))
    driver.close_gate()
    thread = threading.Thread(target=file.read_into, args=(array,))
    thread.start()
    _until(lambda: driver.pending == 5)  # of 8 slots: four, and the one that waits for the oldest
    time.sleep(0.1)
    assert driver.pending == driver.most_pending == 5
    assert thread.is_alive()
    driver.release()
    thread.join(60)
    assert array.contents() == DATA
    assert driver.most_pending == 5


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_slots_are_kept_for_the_next_read(file: File, driver: FakeDriver) -> None:
    for _ in range(3):
        file.read_into(Array(driver, 5 << 20), size=5 << 20)
    assert driver.calls["cuMemHostRegister"] == driver.calls["cuStreamCreate"] == 1


def test_threads(file: File, driver: FakeDriver) -> None:
    arrays = [Array(driver, 2 << 20) for _ in range(6)]
    errors: list[BaseException] = []

    def read(index: int) -> None:
        try:
            for _ in range(3):
                file.read_into(arrays[index], offset=index * 1000, size=2 << 20)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for index, array in enumerate(arrays):
        assert array.contents() == DATA[index * 1000 :][: 2 << 20]


def test_asyncio(file: File, driver: FakeDriver) -> None:
    arrays = [Array(driver, 2 << 20) for _ in range(4)]

    async def main() -> list[ReadResult]:
        reads = (
            file.read_into_async(array, offset=index * 512, size=2 << 20)
            for index, array in enumerate(arrays)
        )
        return await asyncio.gather(*reads)

    for index, result in enumerate(asyncio.run(main())):
        check(arrays[index], result, index * 512, 2 << 20)


# ---- Errors


@pytest.mark.parametrize(
    "name", ["cuMemcpyHtoDAsync", "cuEventCreate", "cuEventRecord", "cuEventSynchronize"]
)
@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_errors_in_the_middle(name: str, after: int, file: File, driver: FakeDriver) -> None:
    """Raised when nothing is under way: the target may be freed, and the slots used again."""
    file.read_into(Array(driver, 10), size=10)
    driver.delay = 0.005
    array = Array(driver, len(DATA))
    driver.fail_after(name, after, CUresult.CUDA_ERROR_LAUNCH_FAILED)
    with pytest.raises(CudaError, match="launch failed"):
        file.read_into(array)
    assert driver.pending == 0
    del array
    driver.fail.clear()
    again = Array(driver, len(DATA))
    check(again, file.read_into(again), 0, len(DATA))
    assert driver.calls["cuMemHostRegister"] == 1  # the same slots


def test_copies_that_nobody_can_wait_for(file: File, driver: FakeDriver) -> None:
    """Slots and target stay, since something may be under way still."""
    file.read_into(Array(driver, 10), size=10)
    array = Array(driver, len(DATA))
    address = array.address
    driver.close_gate()
    driver.fail_after("cuMemcpyHtoDAsync", 3, CUresult.CUDA_ERROR_LAUNCH_FAILED)
    driver.fail_after("cuStreamSynchronize", 0, CUresult.CUDA_ERROR_LAUNCH_FAILED)
    with pytest.raises(CudaError, match="cuMemcpyHtoDAsync: launch failed"):
        file.read_into(array)
    del array
    gc.collect()
    assert driver.pending == 3
    assert len(driver.contents(address)) == len(DATA)
    driver.fail.clear()
    other = Array(driver, 10)
    driver.release()
    check(other, file.read_into(other, size=10), 0, 10)
    assert driver.calls["cuMemHostRegister"] == 2


def test_a_file_that_ends_early(path: Path, driver: FakeDriver, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(DATA[: 4 << 20])
    array = Array(driver, 4 << 20)
    with gdsdirect.open(short) as file:
        os.truncate(short, (2 << 20) + 5)
        result = file.read_into(array, size=4 << 20)
    assert result.nbytes == (2 << 20) + 5


def test_a_context_that_somebody_has_stays_current(file: File, driver: FakeDriver) -> None:
    driver.module.cuInit(0)
    _, context = driver.module.cuDevicePrimaryCtxRetain(1)
    driver.module.cuCtxPushCurrent(context)
    try:
        file.read_into(Array(driver, 5000), size=5000)
        assert driver._stack() == [int(context)]
    finally:
        driver.module.cuCtxPopCurrent()


# ---- On a stream


class TorchStream:
    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


class CupyStream:
    def __init__(self, handle: int) -> None:
        self.ptr = handle


class AnyStream:
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)


STREAMS = {"a handle": int, "torch": TorchStream, "CuPy": CupyStream, "the protocol": AnyStream}


@pytest.fixture
def stream(driver: FakeDriver) -> Iterator[int]:
    """A stream of the user's."""
    with cuda.device(0).current():
        handle = int(driver.module.cuStreamCreate(1)[1])
    yield handle
    driver.release()
    gpu._pools.drain()
    with cuda.device(0).current():
        driver.module.cuStreamDestroy(handle)


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_a_read_on_a_stream(
    make: Callable[[int], object], stream: int, file: File, driver: FakeDriver
) -> None:
    array = Array(driver, 3 << 20)
    with driver.hold():
        result = file.read_into(array, size=3 << 20, stream=make(stream))
        event = result.event
        assert event is not None
        assert not event.query()
        assert not array.contents().strip(b"\xa5")
        assert event.handle in driver.events
    event.synchronize()
    assert event.query()
    check(array, result, 0, 3 << 20)
    assert driver.calls.get("cuStreamCreate") == 2  # the slots' own, which wasn't used


@pytest.mark.parametrize("handle", [0, 1])
def test_the_default_stream(handle: int, file: File, driver: FakeDriver) -> None:
    array = Array(driver, 100)
    event = file.read_into(array, size=100, stream=handle).event
    assert event is not None
    event.synchronize()
    assert array.contents() == DATA[:100]
    assert driver.waits == []


def test_slots_and_target_are_kept_until_the_event(
    stream: int, file: File, driver: FakeDriver
) -> None:
    with driver.hold():
        array = Array(driver, 3 << 20)
        address = array.address
        file.read_into(array, size=3 << 20, stream=stream)  # nobody has the event
        del array
        gc.collect()
        assert len(driver.contents(address)) == 3 << 20
        assert driver.pending == 3
        other = Array(driver, 3 << 20)
        file.read_into(other, size=3 << 20, stream=stream)
        assert driver.calls["cuMemHostRegister"] == 2  # those slots are in use
    gpu._pools.drain()
    last = Array(driver, 10)
    file.read_into(last, size=10)
    assert driver.calls["cuMemHostRegister"] == 2
    assert address not in driver.allocated  # let go
    assert other.contents() == DATA[: 3 << 20]


@pytest.mark.parametrize("see", ["query", "synchronize"])
def test_a_target_is_let_go_once_its_event_was_seen(
    see: str, stream: int, file: File, driver: FakeDriver
) -> None:
    array = Array(driver, 100)
    event = file.read_into(array, size=100, stream=stream).event
    address = array.address
    del array
    assert event is not None
    _until(lambda: driver.pending == 0)
    assert address in driver.allocated
    getattr(event, see)()
    assert address not in driver.allocated


def test_more_than_there_are_slots_on_a_stream(stream: int, file: File, driver: FakeDriver) -> None:
    array = Array(driver, len(DATA))
    event = file.read_into(array, stream=stream).event
    assert event is not None
    event.synchronize()
    assert array.contents() == DATA


def test_errors_on_a_stream(stream: int, file: File, driver: FakeDriver) -> None:
    array = Array(driver, 3 << 20)
    driver.fail_after("cuMemcpyHtoDAsync", 2, CUresult.CUDA_ERROR_LAUNCH_FAILED)
    with pytest.raises(CudaError, match="launch failed"):
        file.read_into(array, size=3 << 20, stream=stream)
    assert driver.pending == 0
    driver.fail.clear()
    with pytest.raises(CudaError, match="invalid handle"):
        file.read_into(array, size=10, stream=0xDEAD)
    elsewhere = Array(driver, 10, device=1)
    with pytest.raises(CudaError, match="invalid handle"):
        file.read_into(elsewhere, size=10, stream=stream)
    for wrong in ("x", True, object()):
        with pytest.raises(TypeError, match="give its handle"):
            file.read_into(array, size=10, stream=wrong)


def test_the_producer_s_stream_comes_first(stream: int, file: File, driver: FakeDriver) -> None:
    array = Array(driver, 100, stream=stream)
    file.read_into(array, size=100)
    assert [behind for _, behind in driver.waits] == [stream]
    file.read_into(array, size=100, stream=stream)
    assert len(driver.waits) == 1  # it is the same one


# ---- cuFile


@pytest.fixture
def library(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeCuFile:
    """cuFile, on a host whose facts allow it."""
    fake = FakeCuFile(driver)
    monkeypatch.setitem(sys.modules, "cuda.bindings.cufile", fake.module)
    monkeypatch.setattr(cufile.Nvidia, "closed_by", lambda self, mode: ())
    return fake


def test_a_read_by_cufile(path: Path, library: FakeCuFile, driver: FakeDriver) -> None:
    with gdsdirect.open(path) as file:
        if file._origin.undirected is not None:
            pytest.skip(file._origin.undirected)
        for piece in (None, 5000):
            library.piece = piece
            array = Array(driver, 20_000)
            result = file.read_into(array, offset=100, size=18_000, target_offset=7)
            check(array, result, 100, 18_000, 7)
            assert (result.path, result.why, result.bounce_bytes) == (DataPath.CUFILE, None, 0)
        last = file.read_into(array, offset=len(DATA) - 10, size=20_000)
        assert last.nbytes == 10
        assert library.registered == library.opened == 1
        assert len(library.files) == 1
    assert library.files == {}
    assert driver.copies == 0


def test_a_file_that_was_dropped_is_taken_from_cufile(
    path: Path, library: FakeCuFile, driver: FakeDriver
) -> None:
    file = gdsdirect.open(path)
    file.read_into(Array(driver, 10), size=10, require=DataPath.CUFILE)
    del file
    gc.collect()
    assert library.files == {}


def test_a_file_that_is_closed_while_cufile_reads_it(
    path: Path, library: FakeCuFile, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = library.module.read  # type: ignore[attr-defined]

    def closing(*arguments: int) -> object:
        file.close()
        with open("/dev/null"):  # which would get the number of the file's descriptor
            return read(*arguments)

    monkeypatch.setattr(library.module, "read", closing)
    before = len(os.listdir("/proc/self/fd"))
    file = gdsdirect.open(path)
    array = Array(driver, 5000)
    check(array, file.read_into(array, size=5000, require=DataPath.CUFILE), 0, 5000)
    assert library.files == {}
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        file.read_into(array, size=1)


def test_cufile_on_a_stream(
    path: Path, stream: int, library: FakeCuFile, driver: FakeDriver
) -> None:
    with gdsdirect.open(path) as file:
        event = file.read_into(Array(driver, 10), size=10, stream=stream).event
    assert event is not None
    assert event.query()
    assert driver.calls["cuStreamSynchronize"] == 1


REFUSALS: dict[str, Callable[[FakeCuFile], None]] = {
    "can't be opened without copies: DRIVER_NOT_INIT": lambda it: setattr(it, "refuse_open", 5001),
    "can't be switched off": lambda it: setattr(it, "stubborn", True),
    "without copies: DRIVER_ALREADY_OPEN": lambda it: setattr(it, "foreign", True),
    "without a copy: IO_NOT_SUPPORTED": lambda it: setattr(it, "refuse", 5008),
    "refused to read: .*INVALID_MAPPING_RANGE": lambda it: setattr(it, "result", -5017),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_cufile_refuses_goes_through_slots(
    why: str, path: Path, library: FakeCuFile, driver: FakeDriver
) -> None:
    REFUSALS[why](library)
    with gdsdirect.open(path) as file:
        for _ in range(2):
            array = Array(driver, 5000)
            result = file.read_into(array, size=5000)
            check(array, result, 0, 5000)
            assert result.path in DRIVE
            with pytest.raises(WayClosedError, match=why) as caught:
                file.read_into(array, size=1, require=DataPath.CUFILE)
            assert caught.value.obstacles.keys() == {"CUFILE"}
        ways = {DataPath.CUFILE, DataPath.NVME_PASSTHROUGH}
        with pytest.raises(WayClosedError, match=why) as caught:
            file.read_into(array, size=1, require=ways)
        assert caught.value.obstacles.keys() == {"CUFILE", "NVME_PASSTHROUGH"}


def test_what_require_leaves_out(path: Path, library: FakeCuFile, driver: FakeDriver) -> None:
    with gdsdirect.open(path) as file:
        result = file.read_into(Array(driver, 10), size=10, require=DRIVE)
    assert library.opened == 0
    assert result.why is not None
    assert "CUFILE is closed: require= leaves it out" in result.why


def test_an_error_of_the_drive_s_is_an_error(
    path: Path, library: FakeCuFile, driver: FakeDriver
) -> None:
    """The binding raises ValueError for an errno, since it takes that for a number of cuFile's."""
    library.result = ValueError("5 is not a valid OpError")
    with (
        gdsdirect.open(path) as file,
        pytest.raises(OSError, match="Input/output error, reading 10 bytes at offset 3") as caught,
    ):
        file.read_into(Array(driver, 100), offset=3, size=10)
    assert (caught.value.errno, caught.value.filename) == (5, str(path))


def test_cufile_is_not_opened_where_the_facts_forbid_it(
    path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As here, where there is no GPU."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.cufile", None)
    with gdsdirect.open(path) as file, pytest.raises(WayClosedError) as caught:
        file.read_into(Array(driver, 10), size=10, require=DataPath.CUFILE)
    assert "can't be loaded" not in caught.value.obstacles["CUFILE"]


@pytest.mark.parametrize(
    ("make", "opened", "why"),
    [
        (hosts.h100_in_p2pdma_mode, 1, None),
        (partial(hosts.h100_in_p2pdma_mode, container=True), 0, "/run/udev"),
        (hosts.nvidia_fs_without_nvme, 0, "the NVMe driver did not register with nvidia-fs"),
        (hosts.laptop, 0, "GPU"),
    ],
    ids=["H100", "H100 in a container", "nvidia-fs without NVMe", "laptop"],
)
def test_the_way_on_recorded_hosts(
    make: Callable[[Path], Path],
    opened: int,
    why: str | None,
    path: Path,
    tmp_path: Path,
    driver: FakeDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the facts of tests/hosts.py allow it, cuFile; else slots, and the fact is told."""
    fake = FakeCuFile(driver)
    recorded = Host(Sysfs(str(make(tmp_path))), {})
    monkeypatch.setitem(sys.modules, "cuda.bindings.cufile", fake.module)
    monkeypatch.setattr(cufile, "Host", lambda sysfs: recorded)
    array = Array(driver, 8192)
    with gdsdirect.open(path) as file:
        if file._origin.undirected is not None:
            pytest.skip(file._origin.undirected)
        result = file.read_into(array, size=8192)
    check(array, result, 0, 8192)
    assert fake.opened == opened
    if why is None:
        assert (result.path, result.why, result.bounce_bytes) == (DataPath.CUFILE, None, 0)
    else:
        assert result.path in DRIVE
        assert result.why is not None
        assert result.why.startswith("CUFILE is closed: ")
        assert why in result.why


def test_without_the_binding_of_cufile(
    path: Path, library: FakeCuFile, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.cufile", None)
    with gdsdirect.open(path) as file:
        result = file.read_into(Array(driver, 10), size=10)
    assert result.why is not None
    assert "cuda.bindings.cufile can't be loaded" in result.why


def test_through_the_page_cache_there_is_no_cufile(
    path: Path, library: FakeCuFile, driver: FakeDriver
) -> None:
    with gdsdirect.open(path, direct=False) as file:
        result = file.read_into(Array(driver, 10), size=10)
    assert result.path is DataPath.BUFFERED
    assert library.opened == 0
