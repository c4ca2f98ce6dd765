"""Reads into the memory of a real GPU: what tests/test_cuda.py shows with a stand-in.

`make test-gpu` runs them. Each has its bytes compared after they were copied back.
"""

import asyncio
import gc
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import needed, needs_gpu

import gdsdirect
from gdsdirect import DataPath, File, GpuMappedBuffer, ReadResult, WayClosedError, cuda
from gdsdirect.cuda import DeviceMemory

pytestmark = [pytest.mark.gpu, needs_gpu]

DATA = random.Random(11).randbytes((70 << 20) + 777)  # more than all slots
FILLING = 0xA5
ROOT = Path(__file__).resolve().parents[2]


class Allocation:
    """Memory of the driver's, by the CUDA array interface: torch and CuPy are not needed for it."""

    def __init__(self, nbytes: int) -> None:
        self._device = cuda.device(0)
        self._address = 0
        with self._device.current():
            self._address = int(self._device.call("cuMemAlloc", nbytes))
            self._device.call("cuMemsetD8", self._address, FILLING, nbytes)
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self._address, False),
            "strides": None,
        }
        self._nbytes = nbytes

    def contents(self) -> bytes:
        found = bytearray(self._nbytes)
        with self._device.current():
            self._device.call("cuMemcpyDtoH", found, self._address, self._nbytes)
        return bytes(found)

    def __del__(self) -> None:
        if getattr(self, "_address", 0) and not sys.is_finalizing():
            with self._device.current():
                self._device.call("cuMemFree", self._address)


def of_torch(nbytes: int) -> tuple[Any, Callable[[], bytes]]:
    torch = needed("torch")
    tensor = torch.full((nbytes,), FILLING, dtype=torch.uint8, device="cuda:0")
    return tensor, lambda: tensor.cpu().numpy().tobytes()


def of_cupy(nbytes: int) -> tuple[Any, Callable[[], bytes]]:
    cupy = needed("cupy")
    array = cupy.full(nbytes, FILLING, dtype=cupy.uint8)
    return array, lambda: cupy.asnumpy(array).tobytes()


def of_the_driver(nbytes: int) -> tuple[Any, Callable[[], bytes]]:
    array = Allocation(nbytes)
    return array, array.contents


MAKERS = {"the driver": of_the_driver, "torch": of_torch, "CuPy": of_cupy}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
Make = Callable[[int], tuple[Any, Callable[[], bytes]]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpu") / "file"
    made.write_bytes(DATA)
    return made


@pytest.fixture
def file(path: Path) -> Iterator[File]:
    with gdsdirect.open(path) as opened:
        yield opened


def check(found: bytes, result: ReadResult, offset: int, size: int, place: int = 0) -> None:
    expected = DATA[offset : offset + size]
    assert result.nbytes == len(expected)
    assert found[place : place + len(expected)] == expected
    assert not (found[:place] + found[place + len(expected) :]).strip(bytes([FILLING]))
    assert sum(result.ways.values()) == result.nbytes


# ---- Into GPU memory


@every_maker
@pytest.mark.parametrize("direct", [True, False])
def test_ranges(make: Make, direct: bool, path: Path) -> None:
    chance = random.Random(5)
    edges = (0, 1, 511, 512, 4095, 4096, 1 << 20, 64 << 20, len(DATA))
    with gdsdirect.open(path, direct=direct) as file:
        for _ in range(60):
            offset = max(0, min(chance.choice(edges) + chance.randint(-2, 2), len(DATA)))
            size = min(chance.choice(edges) + chance.randint(0, 2), 40 << 20)
            place = chance.choice((0, 1, 4096, 5000))
            target, contents = make(place + size + 100)
            result = file.read_into(target, offset=offset, size=size, target_offset=place)
            check(contents(), result, offset, size, place)


@every_maker
def test_all_of_a_file(make: Make, file: File) -> None:
    target, contents = make(len(DATA))
    result = file.read_into(target)
    check(contents(), result, 0, len(DATA))
    print(result.path.name, result.why)


@pytest.mark.parametrize("way", list(DataPath))
def test_each_way(way: DataPath, file: File) -> None:
    """What is read is right; a closed one is told, by name."""
    target, contents = of_the_driver(5 << 20)
    try:
        result = file.read_into(target, offset=100, size=5 << 20, require=way)
    except WayClosedError as closed:
        assert way is not DataPath.BUFFERED, closed  # noqa: PT017
        pytest.skip(str(closed))  # the host or its file system decides
    assert result.path is way
    check(contents(), result, 100, 5 << 20)
    assert result.bounce_bytes == (0 if way is DataPath.CUFILE else 5 << 20)


@pytest.mark.parametrize(
    "dtype", ["uint8", "float16", "bfloat16", "float32", "int64", "complex64", "float8_e5m2"]
)
def test_types_of_torch_s(dtype: str, file: File) -> None:
    torch = needed("torch")
    tensor = torch.zeros(1 << 16, dtype=getattr(torch, dtype), device="cuda:0")
    nbytes = tensor.numel() * tensor.element_size()
    memory = DeviceMemory.of(tensor)
    assert (memory.address, memory.nbytes) == (tensor.data_ptr(), nbytes)
    assert file.read_into(tensor, size=nbytes).nbytes == nbytes
    assert tensor.view(torch.uint8).cpu().numpy().tobytes() == DATA[:nbytes]


def test_tensors_that_can_not_be_read_into(file: File) -> None:
    torch = needed("torch")
    whole = torch.zeros((64, 64), device="cuda:0")
    for part in (whole.T, whole[:, :3]):
        with pytest.raises(BufferError, match="not contiguous"):
            file.read_into(part, size=1)
    with pytest.raises(BufferError, match=r"grad"):
        file.read_into(torch.zeros(4, device="cuda:0", requires_grad=True), size=1)
    with pytest.raises(ValueError, match="empty"):
        file.read_into(torch.zeros(0, device="cuda:0"), size=1)


def test_a_part_of_a_tensor(file: File) -> None:
    torch = needed("torch")
    whole = torch.full((4, 1 << 20), FILLING, dtype=torch.uint8, device="cuda:0")
    file.read_into(whole[2], offset=333, size=1 << 20)
    assert whole[2].cpu().numpy().tobytes() == DATA[333:][: 1 << 20]
    assert bool((whole[[0, 1, 3]] == FILLING).all())


def test_the_device_that_is_not_torch_s_current_one(file: File) -> None:
    torch = needed("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    tensor = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda:1")
    file.read_into(tensor, size=1 << 20)
    assert DeviceMemory.of(tensor).device == 1
    assert tensor.cpu().numpy().tobytes() == DATA[: 1 << 20]
    assert torch.cuda.current_device() == 0


def test_the_current_context_stays(file: File) -> None:
    device = cuda.device(0)
    before = int(device.call("cuCtxGetCurrent"))
    target, _ = of_the_driver(5000)
    file.read_into(target, size=5000)
    assert int(device.call("cuCtxGetCurrent")) == before


def test_threads_and_tasks(file: File) -> None:
    made = [of_the_driver(3 << 20) for _ in range(8)]
    threads = [
        threading.Thread(
            target=file.read_into, args=(target,), kwargs={"offset": index * 777, "size": 3 << 20}
        )
        for index, (target, _) in enumerate(made[:4])
    ]
    for thread in threads:
        thread.start()

    async def main() -> None:
        reads = (
            file.read_into_async(target, offset=index * 777, size=3 << 20)
            for index, (target, _) in enumerate(made[4:], 4)
        )
        await asyncio.gather(*reads)

    asyncio.run(main())
    for thread in threads:
        thread.join()
    for index, (_, contents) in enumerate(made):
        assert contents() == DATA[index * 777 :][: 3 << 20]


# ---- On a stream


def test_a_stream_of_torch_s(file: File) -> None:
    """What is put into the stream before and after comes before and after, without waiting."""
    torch = needed("torch")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor = torch.full((50 << 20,), FILLING, dtype=torch.uint8, device="cuda:0")
        result = file.read_into(tensor, size=50 << 20, stream=stream)
        total = tensor.to(torch.int64).sum()
    assert result.event is not None
    result.event.synchronize()
    assert result.event.query()
    stream.synchronize()
    assert int(total) == int(np.frombuffer(DATA[: 50 << 20], np.uint8).sum(dtype=np.int64))


def test_a_stream_of_cupy_s(file: File) -> None:
    cupy = needed("cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        array = cupy.zeros(1 << 20, dtype=cupy.uint8)
        result = file.read_into(array, size=1 << 20, stream=stream)
        same = array + 0
    stream.synchronize()
    assert result.event is not None
    assert result.event.query()
    assert cupy.asnumpy(same).tobytes() == DATA[: 1 << 20]


@pytest.mark.parametrize("kind", ["default", "side"])
def test_work_on_the_tensor_comes_first(kind: str, file: File) -> None:
    """Without `stream=`: what torch does to the tensor before is not done to what was read."""
    torch = needed("torch")
    stream = torch.cuda.default_stream() if kind == "default" else torch.cuda.Stream()
    tensor = torch.empty(1 << 20, dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles
        tensor.fill_(FILLING)
        file.read_into(tensor, size=1 << 20)
    torch.cuda.synchronize()
    assert tensor.cpu().numpy().tobytes() == DATA[: 1 << 20]


def test_a_target_that_is_dropped_before_it_is_there(file: File) -> None:
    """Its memory isn't given to others meanwhile; and this returns before the copies are done."""
    torch = needed("torch")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        tensor = torch.empty(20 << 20, dtype=torch.uint8, device="cuda:0")
        address = tensor.data_ptr()
        event = file.read_into(tensor, size=20 << 20, stream=stream).event
        del tensor
        gc.collect()
        assert event is not None
        assert not event.query()
        assert torch.empty(20 << 20, dtype=torch.uint8, device="cuda:0").data_ptr() != address
    event.synchronize()


# ---- Host memory that the GPU sees


@pytest.mark.parametrize("nbytes", [1, 5000, 32 << 20])
def test_host_memory_that_torch_and_cupy_see(nbytes: int, file: File) -> None:
    torch, cupy = needed("torch"), needed("cupy")
    with GpuMappedBuffer.from_host_visible(nbytes, device=0) as buffer:
        file.read_into(buffer, size=nbytes)
        tensor = buffer.tensor("uint8")
        seen = torch.as_tensor(tensor, device="cuda")
        assert seen.device.type == "cuda"
        assert seen.data_ptr() == buffer.device_address
        assert seen.clone().cpu().numpy().tobytes() == DATA[:nbytes]
        assert cupy.asnumpy(cupy.asarray(tensor) + 0).tobytes() == DATA[:nbytes]
        assert torch.from_dlpack(tensor).device.type == "cpu"
        del seen, tensor
        gc.collect()
        torch.cuda.synchronize()


def test_pages_are_on_the_gpu_s_node() -> None:
    node = cuda.device(0).numa_node
    if node is None or not Path("/proc/self/numa_maps").exists():
        pytest.skip("the kernel knows no NUMA node of the GPU's")
    with GpuMappedBuffer.from_host_visible(16 << 20, device=0) as buffer:
        maps = Path("/proc/self/numa_maps").read_text().splitlines()
        mine = [
            line for line in maps if f"prefer:{node}" in line or f"prefer=relative:{node}" in line
        ]
        assert buffer.nbytes
        assert mine


@pytest.mark.parametrize("how", ["closed", "dropped", "kept", "a copy under way"])
def test_the_end_of_an_interpreter(how: str, path: Path) -> None:
    ends = {
        "closed": "buffer.close()",
        "dropped": "del buffer",
        "kept": "import builtins; builtins.kept = buffer",
        "a copy under way": "file.read_into(target, size=1 << 20, stream=0)",
    }
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import gdsdirect, test_on_a_gpu\n"
        "buffer = gdsdirect.GpuMappedBuffer.from_host_visible(1 << 20, device=0)\n"
        "target = test_on_a_gpu.Allocation(1 << 20)\n"
        "file = gdsdirect.open(sys.argv[1])\n"
        f"{ends[how]}\n"
    )
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", script, str(path), folder],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_examples_of_the_manual(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as they stand in docs/gpu.md."""
    needed("torch")
    needed("cupy")
    page = (ROOT / "docs" / "gpu.md").read_text().replace("/data/model", str(path))
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python gpu\n(.*?)```", page, re.S)
    assert len(blocks) > 3
    for code in blocks:
        exec(code, names)


@every_maker
@pytest.mark.parametrize("direct", [True, False])
def test_a_stream_of_chunks(make: Make, direct: bool, path: Path) -> None:
    """Through a quarter of the file's size, each slot used several times."""
    size = 1 << 20
    array, contents = make(16 * size)
    came = b""
    with gdsdirect.open(path, direct=direct) as file, file.stream(array, chunk_size=size) as stream:
        for chunk in stream:
            place = chunk.__cuda_array_interface__["data"][0] - DeviceMemory.of(array).address
            came += contents()[place : place + chunk.nbytes]
            assert chunk.bounce_bytes == chunk.nbytes
            chunk.release()
    assert came == DATA


def test_chunks_as_tensors(path: Path) -> None:
    torch = needed("torch")
    ring = torch.empty(8 << 20, dtype=torch.uint8, device="cuda")
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    with gdsdirect.open(path) as file, file.stream(ring, chunk_size=1 << 20) as stream:
        for chunk in stream:
            total += torch.as_tensor(chunk, device="cuda").sum()
            chunk.release()
    assert int(total) == sum(DATA)
