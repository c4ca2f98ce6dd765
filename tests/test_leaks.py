"""Nothing leaks: every public function, method and property, called many times, with its errors.

In processes of their own each call is repeated, and afterwards there are as many objects, bytes of
C memory, mapped pages, descriptors and references to what it was given as before. A public name
without such a test is an error too.
"""

import asyncio
import ctypes
import gc
import inspect
import itertools
import os
import pickle
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import GetSetDescriptorType

import numpy
import pytest
from support import run_python

import gdsdirect
from gdsdirect import (
    AsyncUringStream,
    Available,
    Completion,
    CudaError,
    CudaUnavailableError,
    DataPath,
    FeatureDisabled,
    File,
    Geometry,
    GpuDirectCapability,
    GpuMappedBuffer,
    MemoryKind,
    Namespace,
    NvmeStatusError,
    ReadResult,
    RingUnavailableError,
    ShortReadError,
    StreamStats,
    Unavailable,
    UnavailableReason,
    WayClosedError,
    WayStats,
    _uring_cmd,
    decode_nvme_read_sqe,
    encode_nvme_read_sqe,
    encode_nvme_read_sqes,
    parse_nvidia_fs_stats,
    probe,
    stream_files,
    survey,
)

HERE = Path(__file__).resolve().parent
SAMPLE = (HERE / "samples/nvidia-fs-stats-2.25.7.txt").read_text()
TIMES = 150
ROUNDS = 5
GEOMETRY = Geometry(nsid=3, lba_size=512, capacity=1000, max_transfer=64 << 10)


def public_callables() -> set[str]:
    """Each public function and class, and each method and property of a class, where defined."""
    found = set()
    public = {name: getattr(gdsdirect, name) for name in gdsdirect.__all__}
    classes = {value for value in public.values() if isinstance(value, type)}
    for name, value in public.items():
        if not callable(value):
            continue
        found.add(name)
        if not isinstance(value, type):
            continue
        for base in value.__mro__:
            inherited = base is not value and base in classes
            if inherited or not base.__module__.startswith("gdsdirect"):
                continue
            found |= {
                f"{name}.{attribute}"
                for attribute, member in vars(base).items()
                if not attribute.startswith("_")
                and (
                    inspect.isroutine(member)
                    or isinstance(
                        member, (property, classmethod, staticmethod, GetSetDescriptorType)
                    )
                )
            }
    return found


# ---- What is called


class World:
    """What the calls work on, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stats = folder / "stats"
        self.stats.write_text("GDS Version: 1.0\n")
        self.file = (folder / "file").open("w+b")
        self.file.write(bytes(range(200)))
        self.file.flush()
        self.namespace = Namespace("/dev/null", geometry=GEOMETRY)
        self.closed_namespace = Namespace("/dev/null", geometry=GEOMETRY)
        self.closed_namespace.close()
        self.buffer = GpuMappedBuffer.from_host_visible(16 << 10)
        self.closed_buffer = GpuMappedBuffer.from_host_visible(16 << 10)
        self.closed_buffer.close()
        self.stream = AsyncUringStream(self.buffer, depth=8)
        self.closed_stream = AsyncUringStream(self.buffer, depth=8)
        self.closed_stream.close()
        self.good = encode_nvme_read_sqe(3, 0, 1, self.buffer.address)
        self.bad = encode_nvme_read_sqe(3, 0, 1, 0)
        self.loop = asyncio.new_event_loop()
        self.records = bytearray(16 * 64)

    def witnesses(self) -> Iterator[object]:
        """Objects whose references are counted."""
        yield from vars(self).values()
        yield from (getattr(gdsdirect, name) for name in gdsdirect.__all__)
        yield from (GEOMETRY, None, True, False)

    def ten_in_flight(self) -> None:
        self.stream.submit_nvme_passthrough(self.namespace, self.good * 10)

    def close(self) -> None:
        self.stream.close()
        self.buffer.close()
        self.namespace.close()
        self.file.close()
        self.loop.close()


Call = Callable[[World], object]
CALLS: dict[str, Call] = {}


def calls(*names: str) -> Callable[[Call], Call]:
    """The function calls what `names` stand for, once each."""

    def register(function: Call) -> Call:
        for name in names:
            assert name not in CALLS
            CALLS[name] = function
        return function

    return register


def fails(
    kind: type[BaseException], call: Callable[..., object], *args: object, **kw: object
) -> None:
    """The call must raise: its error path is what is wanted."""
    try:
        call(*args, **kw)
    except kind as error:
        str(error)
    else:
        raise AssertionError(f"{call} did not fail")


def attributes(cls: type, names: str, *objects: str) -> None:
    """Reads the properties `names` of the world's `objects`; a closed one may raise ValueError."""

    def read(name: str) -> Call:
        def function(world: World) -> None:
            for key in objects:
                try:
                    getattr(getattr(world, key), name)
                except ValueError:
                    assert key.startswith("closed")

        return function

    for name in names.split():
        calls(f"{cls.__name__}.{name}")(read(name))


@calls("survey", "Survey", "Survey.exit_code", "Survey.to_dict")
@calls("Check", "Evidence", "Evidence.number", "PathReport", "Status", "Target", "Trial")
@calls("Verdict", "Verdict.direct")
def _survey(world: World) -> None:
    found = survey(world.folder / "stats", world.folder / "none", "/dev/null")
    assert found.exit_code == 2
    assert found.to_dict()["exit_code"] == 2
    assert not any(verdict.direct and verdict.verified for verdict in found.verdicts)
    assert found.checks[0].evidence[0].number is None


@calls("parse_nvidia_fs_stats", "NvidiaFsStats", "NvidiaFsStats.errors", "NvidiaFsGpu")
def _parse_nvidia_fs_stats(world: World) -> None:
    stats = parse_nvidia_fs_stats(SAMPLE)
    assert stats.errors == {}
    assert len(stats.gpus) == 1
    assert parse_nvidia_fs_stats("Reads : err=3").errors == {"Reads.err": 3}


@calls("probe", "GpuDirectCapability.probe")
def _probe(world: World) -> None:
    assert probe(stats_path=world.stats).is_available()
    assert not probe(stats_path=world.folder / "none").is_available()
    assert not probe(stats_path=world.folder).is_available()
    assert not probe(stats_path=3.5).is_available()  # type: ignore[arg-type]


@calls("GpuDirectCapability", "GpuDirectCapability.is_available")
def _capability(world: World) -> None:
    assert not GpuDirectCapability().is_available()
    fails(TypeError, GpuDirectCapability, 1)
    fails(TypeError, GpuDirectCapability().is_available, 1)


@calls("Available", "Unavailable", "FeatureDisabled")
def _answers(world: World) -> None:
    for answer in (Available("x"), Unavailable(UnavailableReason.EMPTY, 2), FeatureDisabled()):
        repr(answer)
    fails(TypeError, Available)


@calls("UnavailableReason", "MemoryKind", "DataPath")
def _enumerations(world: World) -> None:
    for kind in (UnavailableReason, MemoryKind, DataPath):
        for member in kind:
            assert kind(member.value) is member
            str(member)
        fails(ValueError, kind, "no such")


@calls("encode_nvme_read_sqe")
def _encode(world: World) -> None:
    encode_nvme_read_sqe(1, 2**63, 65536, dest_bar1_ptr=2**63)
    fails(OverflowError, encode_nvme_read_sqe, 1, 2**64, 1, 0)
    fails(OverflowError, encode_nvme_read_sqe, 1, -1, 1, 0)
    fails(ValueError, encode_nvme_read_sqe, 1, 0, 2**70, 0)
    fails(TypeError, encode_nvme_read_sqe, 1, "0", 1, 0)
    fails(TypeError, encode_nvme_read_sqe, 1, 0, 1, wrong=1)
    fails(TypeError, encode_nvme_read_sqe)


@calls("encode_nvme_read_sqes")
def _encode_many(world: World) -> None:
    numbers, counts = array("Q", range(100)), array("I", [1] * 100)
    signed = array("q", [-1] * 100)
    encode = encode_nvme_read_sqes
    encode(1, numbers, counts, numbers)
    encode(1, numbers, 8, numbers, out=bytearray(6400))
    fails(ValueError, encode, 1, numbers, 8, numbers, bytearray(10))
    fails(BufferError, encode, 1, numbers, 8, numbers, bytes(6400))
    fails(ValueError, encode, 1, numbers, array("I", [0] * 100), numbers)
    fails(ValueError, encode, 1, numbers, counts[:5], numbers)
    fails(OverflowError, encode, 1, signed, 8, numbers)
    fails(OverflowError, encode, 1, numbers, 8, signed)
    fails(TypeError, encode, 1, numbers, 8, counts)
    fails(TypeError, encode, 1, numbers, numbers, numbers)
    fails(TypeError, encode, 1, [1, 2], 8, numbers)
    fails(OverflowError, encode, 2**32, numbers, 8, numbers)
    fails(ValueError, encode, 1, numbers, 0, numbers)
    fails(TypeError, encode, 1, numbers)


@calls("decode_nvme_read_sqe")
def _decode(world: World) -> None:
    decode_nvme_read_sqe(world.good)
    fails(ValueError, decode_nvme_read_sqe, bytes(64))
    fails(ValueError, decode_nvme_read_sqe, bytes(63))
    fails(TypeError, decode_nvme_read_sqe, "text")


@calls("NvmeStatusError", "ShortReadError", "RingUnavailableError")
def _errors(world: World) -> None:
    status = NvmeStatusError(0x4281, "/dev/ng0n1", namespace_id=1, starting_lba=8, blocks=8)
    for error in (status, ShortReadError("file", 1, 3, 2), RingUnavailableError("cause")):
        str(pickle.loads(pickle.dumps(error)))
    fails(ValueError, NvmeStatusError, 0, "x", namespace_id=1, starting_lba=8, blocks=8)
    fails(TypeError, ShortReadError, "file")
    fails(TypeError, RingUnavailableError)


@calls("CudaError", "CudaUnavailableError")
def _cuda(world: World) -> None:
    error = CudaError("cuInit", 100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected")
    str(pickle.loads(pickle.dumps(error)))
    fails(TypeError, CudaError, "cuInit")
    str(CudaUnavailableError("libcuda is missing"))
    _uring_cmd.take_dlpack(numpy.zeros(5).__dlpack__())
    taken = world.buffer.tensor("int8").__dlpack__(max_version=(1, 0))
    _uring_cmd.take_dlpack(taken)
    fails(TypeError, _uring_cmd.take_dlpack, taken)
    with File(world.folder / "file") as file:
        fails(ValueError, file.read_into, world.buffer, size=1, stream=1)
        fails(BufferError, file.read_into, OtherMakers(), size=1)


class OtherMakers:
    def __dlpack_device__(self) -> tuple[int, int]:
        return (10, 0)


@calls("Geometry")
def _geometry(world: World) -> None:
    repr(Geometry(1, 512, 2**63, 65536))
    fails(ValueError, Geometry, 1, 511, 1, 65536)
    fails(ValueError, Geometry, 0, 512, 1, 65536)


@calls("WayStats", "StreamStats")
def _statistics(world: World) -> None:
    repr(StreamStats(ways={DataPath.CUFILE: WayStats(1, 2, 3, 4, 5)}))
    fails(TypeError, WayStats, wrong=1)
    fails(TypeError, StreamStats, wrong=1)


@calls("Namespace", "Namespace.close")
def _namespace(world: World) -> None:
    for path in ("/dev/null", b"/dev/null", Path("/dev/null")):
        with Namespace(path, geometry=GEOMETRY) as namespace:
            repr(namespace)
        namespace.close()
    fails(ValueError, Namespace, "/dev/null")
    fails(ValueError, Namespace, world.folder)
    fails(FileNotFoundError, Namespace, world.folder / "none")
    fails(FileNotFoundError, Namespace, world.folder / "none", geometry=GEOMETRY)
    fails(ValueError, world.closed_namespace.__enter__)
    fails(TypeError, Namespace, 1.5, geometry=GEOMETRY)


@calls("Namespace.fileno")
def _namespace_fileno(world: World) -> None:
    world.namespace.fileno()
    fails(ValueError, world.closed_namespace.fileno)


attributes(
    Namespace,
    "path geometry nsid lba_size capacity metadata_size max_transfer safe_transfer extended "
    "pci_address model serial closed",
    "namespace",
    "closed_namespace",
)


@calls("GpuMappedBuffer")
def _buffer(world: World) -> None:
    fails(TypeError, GpuMappedBuffer)
    fails(TypeError, GpuMappedBuffer, 3)
    fails(BufferError, GpuMappedBuffer, b"read-only")
    fails(ValueError, GpuMappedBuffer, bytearray())
    fails(TypeError, pickle.dumps, world.buffer)


@calls("GpuMappedBuffer.from_host_visible", "GpuMappedBuffer.close")
def _host_visible(world: World) -> None:
    for nbytes in (1, 16 << 10, 1 << 20):
        with GpuMappedBuffer.from_host_visible(nbytes) as buffer:
            repr(buffer)
        buffer.close()
    GpuMappedBuffer.from_host_visible(5000)  # not closed
    fails(ValueError, GpuMappedBuffer.from_host_visible, 0)
    fails(OverflowError, GpuMappedBuffer.from_host_visible, 2**64)
    fails(OSError, GpuMappedBuffer.from_host_visible, 1 << 60, hugepages=True)
    fails(BufferError, world.buffer.close)


@calls("GpuMappedBuffer.from_object")
def _from_object(world: World) -> None:
    GpuMappedBuffer.from_object(bytearray(100)).close()
    GpuMappedBuffer.from_object(memoryview(bytearray(100))[10:])
    cycle = Cyclic(100)
    cycle.buffer = GpuMappedBuffer.from_object(cycle)
    fails(ValueError, GpuMappedBuffer.from_object, b"read-only")
    fails(ValueError, GpuMappedBuffer.from_object, bytearray())
    fails(TypeError, GpuMappedBuffer.from_object, 3)


class Cyclic(bytearray):
    buffer: GpuMappedBuffer


@calls("GpuMappedBuffer.from_bar1_peer")
def _peer(world: World) -> None:
    peer = GpuMappedBuffer.from_bar1_peer
    with open("/dev/zero", "r+b", buffering=0) as zero:
        peer(zero, 4096).close()
    peer("/dev/zero", 4096)
    fails(ValueError, peer, world.stats, 100)
    fails(ValueError, peer, world.file, 100)
    fails(ValueError, peer, "/dev/zero", 0)
    fails(OSError, peer, "/dev/null", 4096)
    fails(OSError, peer, world.folder, 4096)
    fails(FileNotFoundError, peer, world.folder / "none", 4096)


@calls("GpuMappedBuffer.from_bar1_peer_address")
def _peer_address(world: World) -> None:
    GpuMappedBuffer.from_bar1_peer_address(4096, 10, [1]).close()
    GpuMappedBuffer.from_bar1_peer_address(4096, 10, world.stream)
    fails(ValueError, GpuMappedBuffer.from_bar1_peer_address, 0, 10, None)
    fails(ValueError, GpuMappedBuffer.from_bar1_peer_address, 2**64 - 5, 10, None)


@calls("GpuMappedBuffer.tensor", "Tensor", "Tensor.nbytes")
def _tensor(world: World) -> None:
    with GpuMappedBuffer.from_host_visible(4096) as buffer:
        tensor = buffer.tensor("float32", (8, 8), offset=64)
        assert tensor.nbytes == 256
        assert tensor.__array_interface__["shape"] == (8, 8)
        for version in (None, (1, 0)):
            tensor.__dlpack__(max_version=version)  # nobody takes it
            numpy.from_dlpack(tensor)
        numpy.asarray(tensor)
        fails(BufferError, tensor.__dlpack__, copy=True)
        fails(ValueError, buffer.tensor, "no such")
        fails(ValueError, buffer.tensor, "int8", 5000)
        fails(TypeError, getattr, buffer.tensor("bfloat16"), "__array_interface__")
        del tensor
    fails(ValueError, world.closed_buffer.tensor, "int8")


@calls("GpuMappedBuffer.view")
def _view(world: World) -> None:
    with world.buffer.view() as view:
        bytes(view[:10])
    fails(ValueError, world.closed_buffer.view)


attributes(GpuMappedBuffer, "address nbytes closed kind device_address", "buffer", "closed_buffer")


@calls("AsyncUringStream", "AsyncUringStream.close")
def _stream(world: World) -> None:
    for depth, register in ((1, None), (64, False)):
        with AsyncUringStream(world.buffer, depth, register=register) as stream:
            stream.fileno()
            stream.submit_nvme_passthrough(world.namespace, world.good * 40)
            stream.submit_read(world.file, 0, 10, 0)
            repr(stream)
        stream.close()
        fails(ValueError, stream.close, timeout=-1)
    ends = os.pipe()
    stream = AsyncUringStream(world.buffer)
    stream.submit_read(ends[0], 0, 1, 0)
    stream.close(timeout=0)
    os.close(ends[0])
    os.close(ends[1])
    fails(TypeError, AsyncUringStream, bytearray(10))
    fails(ValueError, AsyncUringStream, world.buffer, 0)
    fails(ValueError, AsyncUringStream, world.closed_buffer)
    fails(OSError, AsyncUringStream, world.buffer, single_thread=True, sqpoll=True)
    fails(TypeError, pickle.dumps, world.stream)


@calls("AsyncUringStream.submit_nvme_passthrough")
def _submit(world: World) -> None:
    submit = world.stream.submit_nvme_passthrough
    submit(world.namespace, world.good)
    submit(world.namespace, world.good * 50, user_data=2**63)
    with Namespace("/dev/null", geometry=GEOMETRY) as other:
        submit(other, world.good * 3)
    assert len(world.stream.wait(54)) == 54
    fails(ValueError, submit, world.namespace, world.good * 50 + world.bad)
    fails(ValueError, submit, world.namespace, b"odd")
    fails(ValueError, submit, world.closed_namespace, world.good * 50)
    fails(OverflowError, submit, world.namespace, world.good * 50, user_data=2**64 - 3)
    fails(OverflowError, submit, world.namespace, world.good * 50, user_data=-1)
    fails(TypeError, submit, world.namespace, world.good * 50, user_data="x")
    fails(TypeError, submit, world.namespace, "text")
    fails(TypeError, submit, world.file, world.good)
    fails(TypeError, submit)
    fails(ValueError, world.closed_stream.submit_nvme_passthrough, world.namespace, world.good)


@calls("AsyncUringStream.submit_nvme_passthroughs")
def _submit_several(world: World) -> None:
    submit = world.stream.submit_nvme_passthroughs
    good = (world.namespace, world.good * 50)
    with Namespace("/dev/null", geometry=GEOMETRY) as other:
        submit([good, (other, world.good * 3)], user_data=5)
    submit(iter([good]))
    submit([])
    assert len(world.stream.wait(103)) == 103
    fails(ValueError, submit, [good, (world.namespace, world.good * 50 + world.bad)])
    fails(ValueError, submit, [good, (world.closed_namespace, world.good)])
    fails(OverflowError, submit, [good, good], user_data=2**64 - 60)
    fails(TypeError, submit, [good, (world.file, world.good)])
    fails(TypeError, submit, [good, [world.namespace, world.good]])
    fails(TypeError, submit, [good, 3])
    fails(TypeError, submit, 3)
    fails(TypeError, submit)
    fails(ValueError, world.closed_stream.submit_nvme_passthroughs, [good])


@calls("AsyncUringStream.submit_reads")
def _submit_reads(world: World) -> None:
    _batches_of_reads(world, world.stream.submit_reads, world.closed_stream.submit_reads)


@calls("AsyncUringStream.submit_reads_fixed")
def _submit_reads_fixed(world: World) -> None:
    submit = world.stream.submit_reads_fixed
    _batches_of_reads(world, submit, world.closed_stream.submit_reads_fixed)
    with AsyncUringStream(world.buffer, 1, register=False) as stream:
        offsets = array("Q", range(5))
        fails(OSError, stream.submit_reads_fixed, world.file, offsets, 1, offsets)


def _batches_of_reads(
    world: World, submit: Callable[..., object], closed: Callable[..., object]
) -> None:
    offsets, sizes = array("Q", range(100)), array("I", [1] * 100)
    submit(world.file, offsets, 10, offsets)
    submit(world.file, offsets, sizes, offsets, user_data=7)
    submit(world.file, array("Q"), 1, array("Q"))
    assert len(world.stream.wait(200)) == 200
    fails(ValueError, submit, world.file, offsets, 2**60, offsets)
    fails(ValueError, submit, world.file, offsets, sizes[1:], offsets)
    fails(ValueError, submit, world.file, array("Q", [2**63] * 100), 1, offsets)
    fails(TypeError, submit, world.file, offsets, offsets, offsets)
    fails(TypeError, submit, world.file, [1], 1, offsets)
    fails(TypeError, submit, "file", offsets, 1, offsets)
    fails(OverflowError, submit, world.file, array("q", [-1] * 100), 1, offsets)
    fails(ValueError, closed, world.file, offsets, 1, offsets)


@calls("AsyncUringStream.submit_read")
def _submit_read(world: World) -> None:
    _reads(world, world.stream.submit_read, world.closed_stream.submit_read)


@calls("AsyncUringStream.submit_read_fixed")
def _submit_read_fixed(world: World) -> None:
    _reads(world, world.stream.submit_read_fixed, world.closed_stream.submit_read_fixed)
    with AsyncUringStream(world.buffer, 1, register=False) as stream:
        fails(OSError, stream.submit_read_fixed, world.file, 0, 1, 0)


def _reads(world: World, submit: Callable[..., int], closed: Callable[..., int]) -> None:
    for number in range(20):
        submit(world.file, 0, 10 + number, 0, user_data=number)
    submit(world.file.fileno(), 195, 10, 0)
    done = world.stream.wait(21)
    assert [completion.ok for completion in done].count(False) == 1
    fails(ValueError, submit, world.file, -1, 1, 0)
    fails(ValueError, submit, world.file, 0, 2**70, 0)
    fails(ValueError, submit, world.file, 0, 1, 2**70)
    fails(TypeError, submit, world.file, 0, "1", 0)
    fails(TypeError, submit, "file", 0, 1, 0)
    fails(TypeError, submit, world.namespace, 0, 1, 0)
    fails(OSError, submit, 10**6, 0, 1, 0)
    fails(OverflowError, submit, world.file, 0, 1, 0, user_data=-1)
    fails(TypeError, submit, world.file, 0, 1, 0, user_data="x")
    fails(TypeError, submit)
    fails(ValueError, closed, world.file, 0, 1, 0)


@calls("AsyncUringStream.wait")
def _wait(world: World) -> None:
    world.ten_in_flight()
    taken = world.stream.wait(4)
    taken += world.stream.wait(10 - len(taken))
    assert len(taken) == 10
    fails(ValueError, world.stream.wait, -1)
    fails(ValueError, world.stream.wait, 1, -1)
    fails(TypeError, world.stream.wait, 1, "x")
    fails(TypeError, world.stream.wait, "x")
    fails(ValueError, world.closed_stream.wait)


@calls("AsyncUringStream.poll")
def _poll(world: World) -> None:
    world.ten_in_flight()
    assert len(world.stream.poll()) == 10
    assert world.stream.poll() == []
    fails(ValueError, world.closed_stream.poll)


@calls("AsyncUringStream.wait_into")
def _wait_into(world: World) -> None:
    world.ten_in_flight()
    assert world.stream.wait_into(world.records, 10, timeout=1) == 10
    wait_into = world.stream.wait_into
    fails(ValueError, wait_into, bytearray(3))
    fails(ValueError, wait_into, world.records, 100)
    fails(ValueError, wait_into, world.records, 1, -1.5)
    fails(TypeError, wait_into, world.records, "x")
    fails(TypeError, wait_into, world.records, wrong=1)
    fails(BufferError, wait_into, bytes(16))
    fails(TypeError, wait_into)
    fails(ValueError, world.closed_stream.wait_into, world.records)


@calls("AsyncUringStream.wait_async")
def _wait_async(world: World) -> None:
    async def main() -> None:
        world.ten_in_flight()
        assert len(await world.stream.wait_async(10)) == 10
        ends = os.pipe()
        world.stream.submit_read(ends[0], 0, 1, 0)
        for task in [asyncio.create_task(world.stream.wait_async()) for _ in range(2)]:
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        world.loop.call_soon(os.write, ends[1], b"x")
        assert len(await world.stream.wait_async()) == 1
        world.ten_in_flight()
        assert len([completion async for completion in world.stream]) == 10
        os.close(ends[0])
        os.close(ends[1])
        try:
            await world.closed_stream.wait_async()
        except ValueError:
            return
        raise AssertionError

    world.loop.run_until_complete(main())


@calls("AsyncUringStream.fileno")
def _fileno(world: World) -> None:
    world.stream.fileno()
    with AsyncUringStream(world.buffer, 1) as stream:
        stream.fileno()
    fails(ValueError, world.closed_stream.fileno)


attributes(AsyncUringStream, "closed depth inflight registered stats", "stream", "closed_stream")


@calls("Completion", "Completion.ok", "Completion.path", "Completion.result")
def _completion(world: World) -> None:
    world.ten_in_flight()
    world.stream.submit_read(world.file, 195, 10, 0)
    with open(world.folder / "file", "ab") as write_only:
        world.stream.submit_read(write_only, 0, 10, 0)
    errors = 0
    for completion in world.stream.wait(12):
        repr((completion, completion.path, completion.nbytes))
        if completion.ok:
            completion.result()
        else:
            fails(OSError, completion.result)
            errors += 1
    assert errors == 2
    fails(TypeError, Completion)
    fails(ValueError, Completion, world.stream, ())


# ---- Files


@calls("File", "File.close", "File.closed", "File.fileno", "File.size")
def _open(world: World) -> None:
    path = world.folder / "file"
    for direct in (True, False):
        file = gdsdirect.open(path, direct=direct)
        with file:
            repr((file, file.size, file.closed))
            file.fileno()
        file.close()
        fails(ValueError, file.fileno)
        fails(ValueError, lambda file=file: file.size)
    File(os.fsencode(path))
    fails(FileNotFoundError, File, world.folder / "missing")
    fails(ValueError, File, world.folder)
    fails(OSError, File, "/proc/version")
    fails(TypeError, File, 3)


@calls("File.read_into", "ReadResult", "WayClosedError")
def _read_into(world: World) -> None:
    target = bytearray(100)
    with File(world.folder / "file") as file:
        for way in (None, DataPath.FILE_DIRECT, DataPath.BUFFERED):
            repr(file.read_into(world.buffer, offset=1, size=100, require=way))
        file.read_into(target, size=100)
        with pytest.raises(WayClosedError) as caught:
            file.read_into(target, size=1, require=DataPath.CUFILE)
        pickle.loads(pickle.dumps(caught.value))
        fails(ValueError, file.read_into, target)
        fails(ValueError, file.read_into, world.closed_buffer)
        fails(ValueError, file.read_into, bytes(10))
    ReadResult(1, DataPath.BUFFERED)


@calls("File.read_many_into")
def _read_many_into(world: World) -> None:
    with File(world.folder / "file") as file:
        read, buffer = file.read_many_into, world.buffer
        read(buffer, [0, 100], [10, 20], [0, 1000])
        read(buffer, array("Q", [0]), array("I", [50]), numpy.array([512]))
        fails(ShortReadError, read, buffer, [150], [100], [0])
        fails(ValueError, read, buffer, [0], [10], [0, 1])
        fails(ValueError, read, buffer, [-1], [10], [0])
        fails(ValueError, read, buffer, [0], [10], [16 << 10])


@calls("File.read_many_into_async")
def _read_many_into_async(world: World) -> None:
    async def main() -> None:
        with File(world.folder / "file") as file:
            await file.read_many_into_async(world.buffer, [0, 100], [10, 20], [0, 1000])

    world.loop.run_until_complete(main())


@calls("File.read_into_async")
def _read_into_async(world: World) -> None:
    async def main() -> None:
        with File(world.folder / "file") as file:
            await file.read_into_async(world.buffer, offset=1, size=100)
            await file.read_into_async(bytearray(100), size=100)
            task = asyncio.create_task(file.read_into_async(world.buffer, size=200))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await file.read_into_async(world.buffer, size=10)

    world.loop.run_until_complete(main())


@calls(
    *("File.stream", "Chunk", "Chunk.release", "ChunkStream", "ChunkStream.close"),
    *("ChunkStream.progress", "StreamProgress", "StreamProgress.rate"),
)
def _stream_chunks(world: World) -> None:
    with File(world.folder / "file") as file:
        with file.stream(world.buffer, chunk_size=50) as stream:
            for chunk in stream:
                repr((chunk, stream.progress, stream.progress.rate))
                numpy.frombuffer(chunk.view, numpy.uint8)
            chunk.release()
        left = file.stream(world.buffer, chunk_size=50)
        next(left)
        del left
        fails(ValueError, file.stream, world.buffer, chunk_size=0)
        fails(ValueError, file.stream, bytearray(10))


@calls("stream_files")
def _stream_files(world: World) -> None:
    paths = [world.folder / name for name in ("file", "missing", "stats")]
    with stream_files(paths, world.buffer, chunk_size=1000) as stream:
        next(stream)
        fails(FileNotFoundError, next, stream)
        next(stream)
        fails(StopIteration, next, stream)


@calls("ChunkStream.aclose")
def _stream_async(world: World) -> None:
    async def main() -> None:
        with File(world.folder / "file") as file:
            async with file.stream(world.buffer, chunk_size=50) as stream:
                async for chunk in stream:
                    chunk.release()
            left = file.stream(world.buffer, chunk_size=50)
            await anext(left)
            await left.aclose()

    world.loop.run_until_complete(main())


# ---- What is measured


class _Mallinfo2(ctypes.Structure):
    """struct mallinfo2: ten sizes; 4 is what was mapped, 7 the rest that is in use."""

    _fields_ = [("sizes", ctypes.c_size_t * 10)]


def _c_memory() -> int:
    """Bytes that malloc has given out, where the C library tells."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # not glibc 2.33 or later
        return 0
    mallinfo2.restype = _Mallinfo2
    sizes = mallinfo2().sizes
    return int(sizes[4] + sizes[7])


def _measure(witnesses: list[object]) -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    references = sum(sys.getrefcount(witness) for witness in witnesses)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mapped pages": pages,
        "references": references,
        "C memory, in words": _c_memory() // 8,
        "blocks": sys.getallocatedblocks(),
    }


def growth(call: Callable[[], object], witnesses: list[object]) -> dict[str, int]:
    """What grew with the calls, in the best of several rounds: caches fill up, leaks go on."""
    for _ in range(10):
        call()
    least: dict[str, int] = {}
    for _ in range(ROUNDS):
        before = _measure(witnesses)
        for _ in itertools.repeat(None, TIMES):
            call()
        after = _measure(witnesses)
        for name, value in after.items():
            grown = value - before[name]
            least[name] = min(grown, least.get(name, grown))
        if not any(grown > TIMES // 2 for grown in least.values()):
            break
    return {name: grown for name, grown in least.items() if grown > TIMES // 2}


def run(names: list[str]) -> None:
    """In a process of its own: one line for each call that leaks."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        witnesses = list(world.witnesses())
        for function in dict.fromkeys(CALLS[name] for name in names):
            grown = growth(lambda function=function: function(world), witnesses)
            if grown:
                print([name for name in names if CALLS[name] is function], grown)
        world.close()


def run_leaky() -> None:
    """The same with calls that leak, each in its own way."""
    kept: list[object] = []
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    witness = object()
    ways: dict[str, Callable[[], object]] = {
        "descriptors": lambda: os.open("/dev/null", os.O_RDONLY),
        "blocks": lambda: kept.append(object()),
        "references": lambda: ctypes.pythonapi.Py_IncRef(ctypes.py_object(witness)),
        "C memory, in words": lambda: libc.malloc(24),
        "mapped pages": lambda: kept.append(GpuMappedBuffer.from_host_visible(8192)),
        "": lambda: None,
    }
    for way, leak in ways.items():
        grown = growth(leak, [witness])
        assert way in grown or not (way or grown), (way, grown)


def run_in_child(expression: str) -> str:
    script = f"import sys; sys.path.insert(0, sys.argv[1]); import test_leaks; {expression}"
    return run_python(script, str(HERE), timeout=120)


# ---- The tests


def test_every_public_name_has_one() -> None:
    assert set(CALLS) == public_callables()


def test_a_new_name_would_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gdsdirect, "__all__", [*gdsdirect.__all__, "new"])
    monkeypatch.setattr(gdsdirect, "new", lambda: None, raising=False)
    monkeypatch.setattr(AsyncUringStream, "new", lambda self: None, raising=False)
    monkeypatch.setattr(Completion, "also", property(lambda self: None), raising=False)
    missed = {"new", "AsyncUringStream.new", "Completion.also"}
    assert public_callables() - set(CALLS) == missed


GROUPS = [
    [name for name in CALLS if (name.partition(".")[0] == "AsyncUringStream") is streams]
    for streams in (False, True)
]


@pytest.mark.parametrize("group", [0, 1])
def test_nothing_leaks(group: int) -> None:
    assert run_in_child(f"test_leaks.run(test_leaks.GROUPS[{group}])") == ""


def test_leaks_are_seen() -> None:
    assert run_in_child("test_leaks.run_leaky()") == ""
