"""AsyncUringStream on /dev/null, files and pipes: a real kernel, and commands truly in flight.

/dev/null takes every passthrough command and completes it with 0, so all of the ring's own work is
tested here; what a drive does with the commands is tested in tests/lab.
"""

import asyncio
import fcntl
import gc
import os
import pickle
import resource
import select
import signal
import struct
import sys
import tempfile
import threading
import time
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import file_system, run_python

from gdsdirect import (
    COMPLETION_FORMAT,
    AsyncUringStream,
    DataPath,
    File,
    Geometry,
    GpuMappedBuffer,
    Namespace,
    ShortReadError,
    encode_nvme_read_sqe,
)

MIB = 1 << 20
GEOMETRY = Geometry(nsid=3, lba_size=512, capacity=1000, max_transfer=64 << 10)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("/dev/null", geometry=GEOMETRY) as opened:
        yield opened


@pytest.fixture
def buffer() -> Iterator[GpuMappedBuffer]:
    with GpuMappedBuffer.from_host_visible(MIB) as opened:
        yield opened


@pytest.fixture
def stream(buffer: GpuMappedBuffer) -> Iterator[AsyncUringStream]:
    with AsyncUringStream(buffer, depth=4) as opened:
        yield opened


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A read from it stays in flight until something is written."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def command(buffer: GpuMappedBuffer, lba: int = 0, blocks: int = 8, offset: int = 0) -> bytes:
    return encode_nvme_read_sqe(GEOMETRY.nsid, lba, blocks, buffer.address + offset)


def commands(buffer: GpuMappedBuffer, count: int) -> bytes:
    return b"".join(command(buffer, lba=i % 900, blocks=1 + i % 8) for i in range(count))


# ---- Submitting and reaping


def test_one_command(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    assert stream.submit_nvme_passthrough(namespace, command(buffer)) == range(1)
    assert stream.inflight == 1
    (completion,) = stream.wait()
    assert (completion.user_data, completion.nbytes, completion.ok) == (0, 4096, True)
    assert completion.result() == 4096
    assert completion.path is DataPath.NVME_PASSTHROUGH
    assert stream.inflight == 0


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 32, 33, 1000])
def test_batches_smaller_and_larger_than_the_ring(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace, count: int
) -> None:
    tokens = stream.submit_nvme_passthrough(namespace, commands(buffer, count))
    assert tokens == range(count)
    assert stream.inflight == count
    done = stream.wait(count)
    assert [completion.user_data for completion in done] == list(range(count))
    assert [completion.result() for completion in done] == [512 * (1 + i % 8) for i in range(count)]
    assert stream.stats.submitted == stream.stats.completed == count
    assert stream.stats.nbytes == sum(512 * (1 + i % 8) for i in range(count))


def test_a_full_queue_of_pipes_lets_nothing_be_lost(
    stream: AsyncUringStream,
    buffer: GpuMappedBuffer,
    namespace: Namespace,
    pipe: tuple[int, int],
) -> None:
    """Three slots of four are taken for good; a batch of 100 goes through the last."""
    blocked = [stream.submit_read(pipe[0], 0, 1, i) for i in range(3)]
    tokens = stream.submit_nvme_passthrough(namespace, commands(buffer, 100))
    assert [c.user_data for c in stream.wait(100)] == list(tokens)
    assert stream.inflight == 3
    os.write(pipe[1], b"abc")
    assert sorted(c.user_data for c in stream.wait(3)) == blocked
    with buffer.view() as view:
        assert sorted(view[:3]) == list(b"abc")


def test_a_submission_waits_for_room(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, pipe: tuple[int, int]
) -> None:
    for i in range(4):
        stream.submit_read(pipe[0], 0, 1, i)
    threading.Timer(0.1, os.write, (pipe[1], b"abcde")).start()
    assert stream.submit_read(pipe[0], 0, 1, 4) == 4
    assert sorted(c.user_data for c in stream.wait(5)) == [0, 1, 2, 3, 4]


def test_user_data(stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace) -> None:
    three = commands(buffer, 3)
    assert stream.submit_nvme_passthrough(namespace, three, user_data=70) == range(70, 73)
    assert stream.submit_nvme_passthrough(namespace, three) == range(3)
    top = 2**64 - 3
    assert stream.submit_nvme_passthrough(namespace, three, user_data=top) == range(top, 2**64)
    assert [c.user_data for c in stream.wait(9)] == [
        *range(70, 73),
        *range(3),
        *range(top, 2**64),
    ]
    for wrong in (-1, 2**64, 2**64 - 2):
        with pytest.raises(OverflowError):
            stream.submit_nvme_passthrough(namespace, three, user_data=wrong)
    with pytest.raises(TypeError):
        stream.submit_nvme_passthrough(namespace, three, user_data="x")  # type: ignore[arg-type]


def test_wait_into(stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace) -> None:
    stream.submit_nvme_passthrough(namespace, commands(buffer, 10), user_data=5)
    out = bytearray(16 * 6 + 3)
    assert [stream.wait_into(out, 2), stream.inflight] == [6, 4]
    records = [*struct.iter_unpack(COMPLETION_FORMAT, out[: 16 * 6])]
    assert records == [(5 + i, 0, 512 * (1 + i)) for i in range(6)]
    assert out[96:] == bytes(3)
    assert stream.wait_into(memoryview(out), timeout=1, count=4) == 4
    for arguments in ((bytearray(15),), (bytearray(32), 3), (bytearray(32), -1)):
        with pytest.raises(ValueError, match="count is"):
            stream.wait_into(*arguments)
    with pytest.raises(BufferError):
        stream.wait_into(bytes(16))
    for keywords in ({"size": 1}, {"out": out}, {"timeout": 1, "count": 1, "x": 1}):
        with pytest.raises(TypeError):
            stream.wait_into(out, **keywords)


def test_wait_into_takes_what_fits_and_keeps_the_rest(
    buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    with AsyncUringStream(buffer, depth=16) as stream:
        stream.submit_nvme_passthrough(namespace, commands(buffer, 10))
        out = bytearray(16 * 4)
        taken: list[int] = []
        while stream.inflight:
            n = stream.wait_into(out)
            taken += [record[0] for record in struct.iter_unpack(COMPLETION_FORMAT, out[: 16 * n])]
        assert taken == list(range(10))


def test_poll_and_timeouts(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, pipe: tuple[int, int]
) -> None:
    assert stream.poll() == []
    assert stream.wait(5) == [], "nothing in flight: nothing to wait for"
    token = stream.submit_read(pipe[0], 0, 2, 0)
    assert stream.poll() == []
    start = time.monotonic()
    assert stream.wait(timeout=0.05) == []
    assert 0.05 <= time.monotonic() - start < 1
    assert stream.wait_into(bytearray(16), timeout=0) == 0
    os.write(pipe[1], b"ab")
    assert [c.user_data for c in stream.wait()] == [token]
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout is"):
            stream.wait(timeout=wrong)
    with pytest.raises(ValueError, match="count is -1"):
        stream.wait(-1)


def test_fileno_is_readable_while_completions_wait(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    def readable() -> bool:
        return bool(select.select([stream], [], [], 0)[0])

    assert not readable()
    stream.submit_nvme_passthrough(namespace, commands(buffer, 9))  # some were reaped for room
    out = bytearray(16)
    for _ in range(9):
        assert readable()
        assert stream.wait_into(out) == 1
    assert not readable()


@pytest.mark.parametrize("single_thread", [False, True])
def test_fileno_becomes_readable_when_a_read_in_flight_completes(
    buffer: GpuMappedBuffer, namespace: Namespace, pipe: tuple[int, int], single_thread: bool
) -> None:
    """Also for one that was watched before, and with completions that the kernel defers."""
    with AsyncUringStream(buffer, depth=4, single_thread=single_thread) as stream:

        def readable(timeout: float = 0) -> bool:
            return bool(select.select([stream], [], [], timeout)[0])

        assert not readable()
        for _ in range(20):
            stream.submit_read(pipe[0], 0, 1, 0)
            stream.submit_read(pipe[0], 0, 1, 1)
            assert not readable()
            os.write(pipe[1], b"x")
            assert readable(10)
            assert len(stream.poll()) == 1
            assert not readable()
            os.write(pipe[1], b"x")
            assert len(stream.wait()) == 1
            assert not readable()
        stream.submit_nvme_passthrough(namespace, commands(buffer, 9))
        assert readable()


# ---- Files


def test_reads_of_a_file(stream: AsyncUringStream, buffer: GpuMappedBuffer, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file:
        stream.submit_read_fixed(file, 1000, 50_000, 10)
        stream.submit_read(file.fileno(), 90_000, 10_000, 60_000)
        assert [c.result() for c in stream.wait(2)] == [50_000, 10_000]
    with buffer.view() as view:
        assert view[10:50_010] == data[1000:51_000]
        assert view[60_000:70_000] == data[90_000:]
    ways = stream.stats.ways
    assert ways[DataPath.BUFFERED].submitted == 2, "no O_DIRECT: both through the page cache"
    assert ways[DataPath.BUFFERED].registered == 1


def test_the_way_of_a_direct_file_is_told_apart(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8192))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("the temporary folder's file system takes no O_DIRECT")
    if file_system(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("the temporary folder is in memory")
    stream.submit_read_fixed(fd, 0, 4096, 0)
    stream.submit_read(fd, 4096, 4096, 4096)
    os.close(fd)
    done = {c.user_data: c for c in stream.wait(2)}
    assert [done[0].path, done[1].path] == [DataPath.FILE_FIXED, DataPath.FILE_DIRECT]
    with buffer.view() as view:
        assert view[:8192] == path.read_bytes()


def test_a_file_in_memory_is_copied_whatever_it_was_opened_with(
    stream: AsyncUringStream, buffer: GpuMappedBuffer
) -> None:
    """tmpfs takes O_DIRECT from Linux 6.6 on. A device node there is another matter."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as named:
        if file_system(Path(named.name)) != "tmpfs":
            pytest.skip("/dev/shm is no tmpfs")
        named.write(data := os.urandom(8192))
        named.flush()
        with File(named.name) as file:
            stream.submit_read(file, 1, 8191, 0)
            (completion,) = stream.wait()
            assert (completion.result(), completion.path) == (8191, DataPath.BUFFERED)
        with buffer.view() as view:
            assert view[:8191] == data[1:]
        try:
            fd = os.open(named.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return  # an older kernel
        stream.submit_read_fixed(fd, 0, 4096, 0)
        os.close(fd)
        (completion,) = stream.wait()
        assert (completion.result(), completion.path) == (4096, DataPath.BUFFERED)


def test_a_short_read_is_not_success(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, tmp_path: Path
) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * 100)
    with path.open("rb") as file:
        stream.submit_read(file, 60, 50, 0)
        (completion,) = stream.wait()
    assert (completion.nbytes, completion.ok) == (40, False)
    with pytest.raises(ShortReadError, match="read 40 of 50 bytes at offset 60") as raised:
        completion.result()
    assert raised.value.filename == str(path)
    assert stream.stats.failed == 1


def test_the_kernels_error_carries_the_path(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, tmp_path: Path
) -> None:
    with (tmp_path / "w").open("wb") as file:
        stream.submit_read(file, 0, 10, 0)
        (completion,) = stream.wait()
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        completion.result()
    assert raised.value.filename == str(tmp_path / "w")


@pytest.mark.parametrize(
    ("offset", "nbytes", "target", "name"),
    [
        (-1, 1, 0, "file_offset"),
        (2**63, 1, 0, "file_offset"),
        (0, 0, 0, "nbytes"),
        (0, MIB + 1, 0, "nbytes"),
        (0, 2**65, 0, "nbytes"),
        (0, 1, -1, "target_offset"),
        (0, 1, MIB, "target_offset"),
        (0, 2, MIB - 1, "target_offset"),
    ],
)
def test_reads_outside_the_buffer(
    stream: AsyncUringStream, offset: int, nbytes: int, target: int, name: str
) -> None:
    for submit in (stream.submit_read, stream.submit_read_fixed):
        with open("/dev/zero", "rb") as file, pytest.raises(ValueError, match=f"^{name} is "):
            submit(file, offset, nbytes, target)
    assert stream.stats.submitted == 0


def test_what_is_no_file(stream: AsyncUringStream, namespace: Namespace) -> None:
    with pytest.raises(TypeError):
        stream.submit_read("file", 0, 1, 0)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Bad file descriptor"):
        stream.submit_read(10**6, 0, 1, 0)
    with pytest.raises(TypeError, match="read it with submit_nvme_passthrough"):
        stream.submit_read(namespace, 0, 1, 0)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("count", [0, 1, 4, 100])
def test_batches_of_reads(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, tmp_path: Path, fixed: bool, count: int
) -> None:
    """More than the ring has room for, of one size and of many, by a file and by its descriptor."""
    data = os.urandom(100_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    submit = stream.submit_reads_fixed if fixed else stream.submit_reads
    offsets = array("Q", [i * 997 for i in range(count)])
    targets = array("Q", [i * 1000 for i in range(count)])
    sizes = array("I", [1 + i * 9 for i in range(count)])
    with path.open("rb") as file:
        assert submit(file, offsets, 900, targets) == range(count)
        assert {c.result() for c in stream.wait(count)} <= {900}
        with buffer.view() as view:
            for offset, target in zip(offsets, targets, strict=True):
                assert view[target : target + 900] == data[offset : offset + 900]
            view[:] = bytes(MIB)
        tokens = submit(file.fileno(), offsets, sizes, targets, user_data=500)
        assert tokens == range(500, 500 + count)
    done = sorted(stream.wait(count), key=lambda completion: completion.user_data)
    assert [c.result() for c in done] == list(sizes)
    with buffer.view() as view:
        for offset, size, target in zip(offsets, sizes, targets, strict=True):
            assert view[target : target + size] == data[offset : offset + size]
    assert stream.stats.ways[DataPath.BUFFERED].registered == 2 * count * fixed


@pytest.mark.parametrize(
    ("offset", "nbytes", "target"),
    [
        (2**63 - 1, 1, 0),
        (0, 0, 0),
        (0, MIB + 1, 0),
        (0, 1, MIB),
        (0, 2, MIB - 1),
        (0, 1, 2**64 - 1),
    ],
)
def test_a_bad_read_in_a_batch_and_none_is_submitted(
    stream: AsyncUringStream, offset: int, nbytes: int, target: int
) -> None:
    offsets, targets = array("Q", [0] * 100), array("Q", [0] * 100)
    sizes = array("I", [1] * 100)
    offsets[70], sizes[70], targets[70] = offset, nbytes, target
    for submit in (stream.submit_reads, stream.submit_reads_fixed):
        with open("/dev/zero", "rb") as file, pytest.raises(ValueError, match=r"^read 70: "):
            submit(file, offsets, sizes, targets)
    assert stream.stats.submitted == 0


def test_batches_of_reads_of_different_lengths(stream: AsyncUringStream) -> None:
    two, three = array("Q", [0] * 2), array("Q", [0] * 3)
    sizes = array("I", [1] * 3)
    with open("/dev/zero", "rb") as file:
        for arguments in ((two, 1, three), (three, 1, two), (two, sizes, two)):
            with pytest.raises(ValueError, match="arrays of different lengths"):
                stream.submit_reads(file, *arguments)
        with pytest.raises(ValueError, match="nbytes is 0"):
            stream.submit_reads(file, two, 0, two)
        with pytest.raises(TypeError, match="nbytes has elements of format 'Q'"):
            stream.submit_reads(file, two, two, two)


def test_an_unregistered_buffer_says_why(buffer: GpuMappedBuffer) -> None:
    with AsyncUringStream(buffer, register=False) as stream, open("/dev/zero", "rb") as file:
        assert not stream.registered
        with pytest.raises(OSError, match="register=False"):
            stream.submit_read_fixed(file, 0, 1, 0)


# ---- Refusing


def wrong(buffer: GpuMappedBuffer, what: str) -> bytes:
    nsid, lba, blocks, address = 3, 0, 8, buffer.address
    end = buffer.address + buffer.nbytes
    changes: dict[str, bytes] = {
        "nsid": encode_nvme_read_sqe(4, lba, blocks, address),
        "lba": encode_nvme_read_sqe(nsid, 1000, 1, address),
        "last": encode_nvme_read_sqe(nsid, 993, 8, address),
        "wrap": encode_nvme_read_sqe(nsid, 2**64 - 1, 8, address),
        "long": encode_nvme_read_sqe(nsid, lba, 129, address),
        "below": encode_nvme_read_sqe(nsid, lba, 1, address - 4),
        "above": encode_nvme_read_sqe(nsid, lba, 1, end),
        "over": encode_nvme_read_sqe(nsid, lba, 8, end - 4092),
        "top": encode_nvme_read_sqe(nsid, lba, 8, 2**64 - 4),
        "odd": encode_nvme_read_sqe(nsid, lba, 8, address + 2),
    }
    if what in changes:
        return changes[what]
    good = bytearray(encode_nvme_read_sqe(nsid, lba, blocks, address))
    good[int(what)] ^= 1
    return bytes(good)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("nsid", "namespace_id is 4, and /dev/null has 3"),
        ("lba", "starting_lba 1000 and 1 blocks end beyond the capacity of /dev/null, 1000"),
        ("last", "starting_lba 993 and 8 blocks"),
        ("wrap", "starting_lba 18446744073709551615"),
        ("long", "blocks is 129, 66048 bytes, and /dev/null transfers at most 65536"),
        ("below", "lie outside the stream's buffer"),
        ("above", "lie outside"),
        ("over", "lie outside"),
        ("top", "lie outside"),
        ("odd", "not a multiple of 4"),
        ("0", "opcode"),
        *[(str(byte), "reserved") for byte in (1, 2, 3, 8, 15, 16, 24, 31, 52, 55, 56, 63)],
        ("51", "blocks - 1"),
    ],
)
def test_one_bad_command_and_none_is_submitted(
    stream: AsyncUringStream,
    buffer: GpuMappedBuffer,
    namespace: Namespace,
    what: str,
    text: str,
) -> None:
    batch = commands(buffer, 2) + wrong(buffer, what) + commands(buffer, 40)
    with pytest.raises(ValueError, match=rf"^command 2: .*{text}"):
        stream.submit_nvme_passthrough(namespace, batch)
    assert stream.inflight == 0
    assert stream.stats.submitted == 0
    assert stream.poll() == []


def test_the_last_block_and_the_last_byte(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    stream.submit_nvme_passthrough(namespace, command(buffer, lba=999, blocks=1, offset=MIB - 512))
    stream.submit_nvme_passthrough(namespace, command(buffer, lba=872, blocks=128))
    assert [c.result() for c in stream.wait(2)] == [512, 65536]


@pytest.mark.parametrize("size", [1, 63, 65, 127])
def test_broken_batches(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace, size: int
) -> None:
    with pytest.raises(ValueError, match=f"commands has {size} bytes, not a multiple of 64"):
        stream.submit_nvme_passthrough(namespace, commands(buffer, 2)[:size])


def test_metadata_is_refused(stream: AsyncUringStream, buffer: GpuMappedBuffer) -> None:
    geometry = Geometry(3, 512, 1000, 65536, metadata_size=8)
    with (
        Namespace("/dev/null", geometry=geometry) as namespace,
        pytest.raises(ValueError, match="8 bytes of metadata"),
    ):
        stream.submit_nvme_passthrough(namespace, command(buffer))


def test_what_is_no_namespace(stream: AsyncUringStream, buffer: GpuMappedBuffer) -> None:
    with open("/dev/null", "rb") as file:
        for other in (file, 3, None, "/dev/null"):
            with pytest.raises(TypeError, match=r"must be a gdsdirect\.Namespace, not"):
                stream.submit_nvme_passthrough(other, command(buffer))  # type: ignore[arg-type]


def test_wrong_call(stream: AsyncUringStream, namespace: Namespace) -> None:
    for arguments, keywords in (((), {}), ((namespace,), {}), ((namespace, b""), {"x": 1})):
        with pytest.raises(TypeError, match="submit_nvme_passthrough"):
            stream.submit_nvme_passthrough(*arguments, **keywords)
    with pytest.raises(TypeError):
        stream.submit_nvme_passthrough(namespace, "text")  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=64, max_size=64), st.booleans())
def test_nothing_that_breaks_a_rule_is_sent(noise: bytes, near: bool) -> None:
    """Random bytes, and a good command with some of its bytes changed."""
    with (
        Namespace("/dev/null", geometry=GEOMETRY) as namespace,
        GpuMappedBuffer.from_host_visible(8192) as buffer,
        AsyncUringStream(buffer, depth=1) as stream,
    ):
        wire = noise
        if near:
            good = command(buffer)
            mask = [byte % 16 == 0 for byte in noise]
            wire = bytes(g ^ n if m else g for g, n, m in zip(good, noise, mask, strict=True))
        opcode, nsid, address, lba, last = struct.unpack("<B3xI24xQQI12x", wire)
        zeros = wire[1:4] + wire[8:32] + wire[52:]
        legal = (
            opcode == 2
            and not any(zeros)
            and nsid == 3
            and last < 128
            and lba + last < 1000
            and buffer.address <= address
            and address + (last + 1) * 512 <= buffer.address + 8192
            and address % 4 == 0
        )
        if legal:
            stream.submit_nvme_passthrough(namespace, wire)
            assert stream.wait()[0].result() == (last + 1) * 512
        else:
            with pytest.raises(ValueError, match=r"^command 0: "):
                stream.submit_nvme_passthrough(namespace, wire)


@pytest.mark.parametrize("depth", [0, -1, 32769])
def test_wrong_depth(buffer: GpuMappedBuffer, depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth is {depth}, outside 1..32768"):
        AsyncUringStream(buffer, depth)


def test_what_is_no_buffer() -> None:
    with pytest.raises(TypeError, match="must be a GpuMappedBuffer, not 'bytearray'"):
        AsyncUringStream(bytearray(10))  # type: ignore[arg-type]


# ---- Several namespaces


def test_several_namespaces(stream: AsyncUringStream, buffer: GpuMappedBuffer) -> None:
    """More than the ring has room for, from three namespaces and one of them twice."""
    with (
        Namespace("/dev/null", geometry=GEOMETRY) as one,
        Namespace("/dev/null", geometry=GEOMETRY) as two,
        Namespace("/dev/null", geometry=GEOMETRY) as three,
    ):
        counts = (100, 1, 0, 30)
        batches = [
            (drive, commands(buffer, count))
            for drive, count in zip((one, two, three, one), counts, strict=True)
        ]
        tokens = stream.submit_nvme_passthroughs(batches)
        assert tokens == [range(100), range(100, 101), range(101, 101), range(101, 131)]
        assert sorted(c.user_data for c in stream.wait(131)) == list(range(131))
        tokens = stream.submit_nvme_passthroughs(iter(batches), user_data=1000)
        assert tokens[3] == range(1101, 1131)
        assert {c.result() > 0 for c in stream.wait(131)} == {True}
        assert stream.submit_nvme_passthroughs([]) == []


def test_a_bad_command_for_one_of_several_and_none_is_submitted(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    good = (namespace, commands(buffer, 3))
    bad = (namespace, commands(buffer, 2) + wrong(buffer, "lba"))
    with pytest.raises(ValueError, match=r"^command 2: starting_lba 1000") as raised:
        stream.submit_nvme_passthroughs([good, good, bad])
    assert raised.value.__notes__ == ["in batches[2]; none was submitted"]
    closed = Namespace("/dev/null", geometry=GEOMETRY)
    closed.close()
    with pytest.raises(ValueError, match="/dev/null is closed"):
        stream.submit_nvme_passthroughs([good, (closed, commands(buffer, 2))])
    for other in ((namespace,), [namespace, b""], b"12"):
        with pytest.raises(TypeError, match=r"batches\[1\] must be a tuple"):
            stream.submit_nvme_passthroughs([good, other])  # type: ignore[list-item]
    with pytest.raises(OverflowError, match="6 commands"):
        stream.submit_nvme_passthroughs([good, good], user_data=2**64 - 5)
    assert stream.inflight == stream.stats.submitted == 0


# ---- Registered files


def open_files(path: str) -> int:
    """How many open files, of the whole system, hold a lock on `path`: /proc/locks tells."""
    inode = os.stat(path).st_ino
    locks = Path("/proc/locks").read_text().splitlines()
    return sum(f":{inode} " in line for line in locks)


def locked(path: Path) -> File:
    """A File whose lock stays as long as anyone, the kernel included, holds its open file."""
    path.write_bytes(os.urandom(8192))
    file = File(path)
    fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    return file


def read_registered(stream: AsyncUringStream, file: File, nbytes: int) -> int:
    stream.submit_read_fixed(file, 0, 4096, 0)
    return min(nbytes, stream.wait()[0].nbytes)


@pytest.mark.parametrize("single_thread", [False, True])
def test_a_registered_file_is_let_go_once_it_is_closed(
    buffer: GpuMappedBuffer, tmp_path: Path, single_thread: bool
) -> None:
    """By the next call, even if its last command was in flight when it was closed."""
    path = tmp_path / "file"
    file = locked(path)
    with AsyncUringStream(buffer, single_thread=single_thread) as stream:
        for _ in range(3):
            assert read_registered(stream, file, 4096) == 4096
        stream.submit_read(file, 0, 4096, 0)
        file.close()
        with pytest.raises(ValueError, match=f"{path} is closed"):
            stream.submit_read(file, 0, 4096, 0)
        assert stream.wait()[0].result() == 4096
        stream.poll()
        assert gone(path)
    file = locked(path)
    with AsyncUringStream(buffer, single_thread=single_thread) as stream:
        read_registered(stream, file, 4096)
    file.close()
    assert gone(path), "and by the stream's end"


def gone(path: Path) -> bool:
    """Linux 6.1 lets go of a file up to a second later."""
    deadline = time.monotonic() + 5
    while open_files(str(path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not open_files(str(path))


def test_more_sources_than_the_ring_registers(buffer: GpuMappedBuffer, tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(200)]
    for path in paths:
        path.write_text(f"{path.name:>4}")
    files = [File(path) for path in paths]
    with AsyncUringStream(buffer) as stream:

        def read(some: list[File]) -> None:
            for file in some:
                assert read_registered(stream, file, 4) == 4
                with buffer.view() as view:
                    assert int(bytes(view[:4])) == int(Path(file.path).name)

        read(files)
        read(files)
        for file in files[:100]:
            file.close()
        read(files[100:])
    for file in files[100:]:
        file.close()


def test_a_stream_that_its_thread_left_unclosed(buffer: GpuMappedBuffer) -> None:
    """Collected by another thread, whose own streams it leaves in peace."""
    with AsyncUringStream(buffer, single_thread=True) as mine:
        left = []
        worker = threading.Thread(
            target=lambda: left.append(AsyncUringStream(buffer, single_thread=True))
        )
        worker.start()
        worker.join()
        with pytest.warns(ResourceWarning, match="unclosed stream"):
            left.clear()
        with Namespace("/dev/null", geometry=GEOMETRY) as namespace:
            for _ in range(10):
                mine.submit_nvme_passthrough(namespace, commands(buffer, 300))
                assert len(mine.wait(300)) == 300


# ---- Lifetimes


def test_a_buffer_dropped_in_flight_stays(pipe: tuple[int, int]) -> None:
    class Owner(bytearray):
        pass

    owner = Owner(4096)
    alive = weakref.ref(owner)
    stream = AsyncUringStream(GpuMappedBuffer.from_object(owner))
    del owner
    stream.submit_read(pipe[0], 0, 4, 0)
    gc.collect()
    os.write(pipe[1], b"late")
    stream.wait()
    kept = alive()
    assert kept is not None
    assert kept[:4] == b"late"
    del kept
    stream.close()
    del stream
    gc.collect()
    assert alive() is None


def test_a_buffer_in_flight_is_neither_closed_nor_resized(pipe: tuple[int, int]) -> None:
    data = bytearray(4096)
    buffer = GpuMappedBuffer.from_object(data)
    with AsyncUringStream(buffer) as stream:
        stream.submit_read(pipe[0], 0, 4, 0)
        with pytest.raises(BufferError):
            buffer.close()
        with pytest.raises(BufferError):
            data.extend(b"more")
        os.write(pipe[1], b"data")
    buffer.close()
    data.extend(b"more")
    assert data[:4] == b"data"


def test_close_waits_for_what_is_in_flight(buffer: GpuMappedBuffer, pipe: tuple[int, int]) -> None:
    stream = AsyncUringStream(buffer)
    stream.submit_read(pipe[0], 0, 5, 0)
    threading.Timer(0.1, os.write, (pipe[1], b"there")).start()
    stream.close()
    with buffer.view() as view:
        assert view[:5] == b"there"


def test_close_cancels_when_time_is_up(buffer: GpuMappedBuffer, pipe: tuple[int, int]) -> None:
    stream = AsyncUringStream(buffer)
    for i in range(10):
        stream.submit_read(pipe[0], 0, 1, i)
    stream.close(timeout=0.05)
    assert stream.closed
    os.write(pipe[1], b"unread")
    with buffer.view() as view:
        assert view[:10] == bytes(10)


def test_use_after_close(buffer: GpuMappedBuffer, namespace: Namespace) -> None:
    stream = AsyncUringStream(buffer)
    stream.submit_nvme_passthrough(namespace, command(buffer))
    stream.close()
    stream.close()
    assert stream.closed
    assert stream.stats.submitted == 1
    with open("/dev/zero", "rb") as file:
        for use in (
            lambda: stream.submit_nvme_passthrough(namespace, command(buffer)),
            lambda: stream.submit_read(file, 0, 1, 0),
            lambda: stream.submit_read_fixed(file, 0, 1, 0),
            stream.wait,
            stream.poll,
            lambda: stream.wait_into(bytearray(16)),
            stream.fileno,
        ):
            with pytest.raises(ValueError, match="the stream is closed"):
                use()


def test_a_closed_namespace(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, pipe: tuple[int, int]
) -> None:
    namespace = Namespace("/dev/null", geometry=GEOMETRY)
    stream.submit_nvme_passthrough(namespace, command(buffer))
    namespace.close()
    with pytest.raises(ValueError, match="/dev/null is closed"):
        stream.submit_nvme_passthrough(namespace, command(buffer))
    assert [c.ok for c in stream.wait()] == [True]


def test_a_descriptor_lives_as_long_as_its_commands(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, tmp_path: Path
) -> None:
    ends = os.pipe()
    stream.submit_read(ends[0], 0, 4, 0)
    os.close(ends[0])
    (tmp_path / "other").write_bytes(b"evil")
    reused = os.open(tmp_path / "other", os.O_RDONLY)
    assert reused == ends[0]
    os.write(ends[1], b"good")
    assert stream.wait()[0].result() == 4
    os.close(reused)
    os.close(ends[1])
    with buffer.view() as view:
        assert view[:4] == b"good"


def test_a_batch_that_waits_for_room_has_a_descriptor_of_its_own(
    buffer: GpuMappedBuffer, tmp_path: Path
) -> None:
    ends = os.pipe()
    (tmp_path / "other").write_bytes(b"evil" * 2)
    zeros, targets = array("Q", [0] * 8), array("Q", range(8))

    def meddle() -> None:
        time.sleep(0.05)
        os.close(ends[0])
        assert os.open(tmp_path / "other", os.O_RDONLY) == ends[0]
        os.write(ends[1], b"goodgood")

    with AsyncUringStream(buffer, depth=2) as stream:
        meddler = threading.Thread(target=meddle)
        meddler.start()
        stream.submit_reads(ends[0], zeros, 1, targets)
        assert [c.result() for c in stream.wait(8)] == [1] * 8
        meddler.join()
    for end in ends:
        os.close(end)
    with buffer.view() as view:
        assert sorted(view[:8]) == sorted(b"goodgood")


def test_descriptors_are_given_back(buffer: GpuMappedBuffer, namespace: Namespace) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with AsyncUringStream(buffer) as stream, open("/dev/zero", "rb") as file:
            stream.fileno()
            for _ in range(20):
                stream.submit_read(file, 0, 1, 0)
                stream.submit_nvme_passthrough(namespace, command(buffer))
            stream.wait(40)
            assert len(os.listdir("/proc/self/fd")) <= before + 4, "ring, epoll, eventfd, file"
    assert len(os.listdir("/proc/self/fd")) == before


def test_collected_with_work_in_flight_warns_and_leaks(
    buffer: GpuMappedBuffer, pipe: tuple[int, int]
) -> None:
    leaked = GpuMappedBuffer.from_host_visible(4096)
    address = leaked.address
    stream = AsyncUringStream(leaked)
    stream.submit_read(pipe[0], 0, 4, 0)
    with pytest.warns(ResourceWarning, match="1 commands in flight: its memory is not freed"):
        del stream
    with pytest.raises(BufferError):
        leaked.close()
    os.write(pipe[1], b"late")
    deadline = time.monotonic() + 5
    with leaked.view() as view:
        while view[:4] != b"late" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert view[:4] == b"late", "the kernel wrote into memory that is still there"
    assert leaked.address == address


def test_collected_unclosed_warns(buffer: GpuMappedBuffer) -> None:
    stream = AsyncUringStream(buffer)
    with pytest.warns(ResourceWarning, match="unclosed stream <AsyncUringStream depth 128"):
        del stream


def test_a_cycle_with_work_in_flight_frees_nothing() -> None:
    out = run_python("""
import gc, os, warnings, weakref
from gdsdirect import AsyncUringStream, GpuMappedBuffer
warnings.simplefilter("ignore")
class Owner(bytearray):
    pass
r, w = os.pipe()
owner = Owner(4096)
alive = weakref.ref(owner)
owner.stream = AsyncUringStream(GpuMappedBuffer.from_object(owner))
owner.stream.submit_read(r, 0, 4, 0)
del owner
for _ in range(3):
    gc.collect()
os.write(w, b"late")
print(alive() is not None)
""")
    assert out == "True\n"


def test_interpreter_exit_with_work_in_flight() -> None:
    """Memory of a bytearray, which the interpreter would free at its end."""
    out = run_python("""
import os, warnings
from gdsdirect import AsyncUringStream, GpuMappedBuffer
warnings.simplefilter("ignore")
r, w = os.pipe()
stream = AsyncUringStream(GpuMappedBuffer.from_object(bytearray(1 << 20)))
for i in range(100):
    stream.submit_read(r, 0, 1, i)
print("end")
""")
    assert out == "end\n"


def test_exec_with_work_in_flight() -> None:
    """The new program has neither the ring nor its other descriptors."""
    out = run_python("""
import os, sys
from gdsdirect import AsyncUringStream, GpuMappedBuffer
r, w = os.pipe()
stream = AsyncUringStream(GpuMappedBuffer.from_host_visible(1 << 20))
stream.fileno()
for i in range(100):
    stream.submit_read(r, 0, 1, i)
os.execv("/bin/ls", ["ls", "-l", "/proc/self/fd"])
""")
    assert "/proc/" in out
    assert "io_uring" not in out
    assert "event" not in out


def test_two_streams_on_one_buffer(
    buffer: GpuMappedBuffer, namespace: Namespace, pipe: tuple[int, int]
) -> None:
    one, two = AsyncUringStream(buffer), AsyncUringStream(buffer, depth=2)
    one.submit_read(pipe[0], 0, 4, 0)
    two.submit_nvme_passthrough(namespace, commands(buffer, 20))
    assert len(two.wait(20)) == 20
    two.close()
    with pytest.raises(BufferError, match="in use by 1 "):
        buffer.close()
    os.write(pipe[1], b"data")
    assert one.wait()[0].result() == 4
    one.close()
    with buffer.view() as view:
        assert view[:4] == b"data"


IN_AN_INTERPRETER = """
from gdsdirect import *
geometry = Geometry(nsid=3, lba_size=512, capacity=1000, max_transfer=65536)
with (
    Namespace('/dev/null', geometry=geometry) as namespace,
    GpuMappedBuffer.from_host_visible(1 << 20) as buffer,
    AsyncUringStream(buffer, depth=8) as stream,
):
    batch = encode_nvme_read_sqe(3, 0, 8, buffer.address) * 50
    for _ in range(20):
        tokens = stream.submit_nvme_passthrough(namespace, batch)
        assert [c.user_data for c in stream.wait(50)] == list(tokens)
    try:
        stream.submit_nvme_passthrough(namespace, bytes(64))
    except ValueError:
        pass
    else:
        raise SystemExit('not refused')
"""

IN_FOUR_INTERPRETERS = """
import sys, threading
def work(done):
    if sys.version_info >= (3, 13):
        import _interpreters as interpreters
        number = interpreters.create('isolated')
        error = interpreters.exec(number, sys.argv[1])
        assert error is None, error
    else:
        import _xxsubinterpreters as interpreters
        number = interpreters.create()
        interpreters.run_string(number, sys.argv[1])
    interpreters.destroy(number)
    done.append(1)
done = []
threads = [threading.Thread(target=work, args=(done,)) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(done))
"""


def test_subinterpreters() -> None:
    """Each in a thread of its own, and from 3.13 on with a GIL of its own."""
    assert run_python(IN_FOUR_INTERPRETERS, IN_AN_INTERPRETER) == "4\n"


def test_fork_is_refused_and_the_parent_unharmed(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace, pipe: tuple[int, int]
) -> None:
    stream.submit_read(pipe[0], 0, 4, 0)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            uses = (stream.poll, stream.close, lambda: stream.stats, lambda: stream.inflight)
            for use in uses:
                try:
                    use()
                except RuntimeError as error:
                    status = 0 if "fork" in str(error) else 2
                else:
                    status = 3
                if status:
                    break
            del stream
            gc.collect()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.write(pipe[1], b"mine")
    assert stream.wait()[0].result() == 4
    stream.submit_nvme_passthrough(namespace, commands(buffer, 50))
    assert len(stream.wait(50)) == 50


def test_not_pickled(stream: AsyncUringStream) -> None:
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(stream)


# ---- Signals and threads


def test_a_signal_ends_the_wait_and_loses_nothing(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, pipe: tuple[int, int]
) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    token = stream.submit_read(pipe[0], 0, 4, 0)
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        start = time.monotonic()
        with pytest.raises(Stop):
            stream.wait()
        assert time.monotonic() - start < 1
    finally:
        signal.signal(signal.SIGALRM, previous)
    os.write(pipe[1], b"data")
    assert [c.user_data for c in stream.wait()] == [token]


def test_a_signal_in_the_middle_of_a_batch_says_how_far_it_came(
    stream: AsyncUringStream,
    buffer: GpuMappedBuffer,
    namespace: Namespace,
    pipe: tuple[int, int],
) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    for i in range(4):
        stream.submit_read(pipe[0], 0, 1, i)
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Stop) as raised:
            stream.submit_nvme_passthrough(namespace, commands(buffer, 9))
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not hasattr(raised.value, "__notes__"), "none was submitted"
    os.write(pipe[1], b"abcd")
    assert len(stream.wait(4)) == 4
    assert stream.inflight == 0


def test_many_threads_on_one_stream(buffer: GpuMappedBuffer, namespace: Namespace) -> None:
    """Each thread submits and reaps; every token comes back once, whoever takes it."""
    rounds, batch, threads = 60, 17, 6
    taken: list[int] = []
    errors: list[BaseException] = []
    lock = threading.Lock()
    with AsyncUringStream(buffer, depth=8) as stream:

        def work(number: int) -> None:
            try:
                for i in range(rounds):
                    first = (number * rounds + i) * batch
                    stream.submit_nvme_passthrough(
                        namespace, commands(buffer, batch), user_data=first
                    )
                    done = stream.wait(batch if i % 2 else 1)
                    with lock:
                        taken.extend(c.user_data for c in done)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert not errors
        assert not any(worker.is_alive() for worker in workers)
        taken.extend(c.user_data for c in stream.wait(rounds * batch * threads))
        assert sorted(taken) == list(range(rounds * batch * threads))


def test_a_waiting_thread_stops_nobody(
    stream: AsyncUringStream,
    buffer: GpuMappedBuffer,
    namespace: Namespace,
    pipe: tuple[int, int],
) -> None:
    """One waits for three pipes; meanwhile others submit through the last slot, and wait."""
    for i in range(3):
        stream.submit_read(pipe[0], 0, 1, i, user_data=1000 + i)
    seen: list[int] = []
    waiter = threading.Thread(target=lambda: seen.extend(c.user_data for c in stream.wait(103)))
    waiter.start()
    time.sleep(0.05)
    stream.submit_nvme_passthrough(namespace, commands(buffer, 100), user_data=0)
    assert stream.stats.completed >= 97, "the batch went through one slot"
    os.write(pipe[1], b"abc")
    waiter.join(10)
    assert not waiter.is_alive()
    seen += [c.user_data for c in stream.poll()]
    assert sorted(seen) == [*range(100), 1000, 1001, 1002]


def test_each_of_several_waiting_threads_is_woken(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, pipe: tuple[int, int]
) -> None:
    """One of them waits in the kernel; when it has its completion, another takes its place."""
    tokens = [stream.submit_read(pipe[0], 0, 1, i) for i in range(4)]
    taken: list[int] = []
    waiters = [
        threading.Thread(target=lambda: taken.extend(c.user_data for c in stream.wait()))
        for _ in range(4)
    ]
    for waiter in waiters:
        waiter.start()
    for count in range(1, 5):
        os.write(pipe[1], b"x")
        deadline = time.monotonic() + 10
        while len(taken) < count:
            assert time.monotonic() < deadline, f"{count} completions, {len(taken)} handed out"
            time.sleep(0.001)
    for waiter in waiters:
        waiter.join(10)
    assert sorted(taken) == tokens


def test_close_wakes_those_who_wait(buffer: GpuMappedBuffer, pipe: tuple[int, int]) -> None:
    stream = AsyncUringStream(buffer)
    for i in range(3):
        stream.submit_read(pipe[0], 0, 1, i)
    errors: list[Exception] = []

    def work() -> None:
        try:
            stream.wait(3)
        except ValueError as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    time.sleep(0.05)
    stream.close(timeout=0.05)
    for worker in workers:
        worker.join(10)
    assert [str(error) for error in errors] == ["the stream is closed"] * 4


def test_single_thread_refuses_others(buffer: GpuMappedBuffer, namespace: Namespace) -> None:
    with AsyncUringStream(buffer, single_thread=True) as stream:
        stream.submit_nvme_passthrough(namespace, commands(buffer, 300))
        errors: list[Exception] = []

        def work() -> None:
            try:
                stream.poll()
            except RuntimeError as error:
                errors.append(error)

        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        assert "single_thread=True by another thread" in str(errors[0])
        assert len(stream.wait(300)) == 300


def test_a_polling_kernel_thread(buffer: GpuMappedBuffer, namespace: Namespace) -> None:
    with AsyncUringStream(buffer, depth=8, sqpoll=True) as stream:
        stream.submit_nvme_passthrough(namespace, commands(buffer, 300))
        assert [c.result() > 0 for c in stream.wait(300)] == [True] * 300


def test_a_polling_kernel_thread_that_is_late_to_say_what_it_consumed(
    buffer: GpuMappedBuffer, namespace: Namespace
) -> None:
    """It posts CQEs before it gives the SQEs back: the ring waits for these."""
    with AsyncUringStream(buffer, depth=3, sqpoll=True) as stream:
        records = bytearray(16 * 3)
        for _ in range(50_000):
            stream.submit_nvme_passthrough(namespace, commands(buffer, 3))
            while stream.inflight:
                stream.wait_into(records, 1, 0)
        assert stream.stats.completed == 150_000


def test_options_that_do_not_go_together(buffer: GpuMappedBuffer) -> None:
    with pytest.raises(OSError, match="doesn't take single_thread with sqpoll"):
        AsyncUringStream(buffer, single_thread=True, sqpoll=True)


# ---- asyncio


@pytest.mark.parametrize("single_thread", [False, True])
def test_wait_async(buffer: GpuMappedBuffer, pipe: tuple[int, int], single_thread: bool) -> None:
    async def main() -> list[int]:
        with AsyncUringStream(buffer, single_thread=single_thread) as stream:
            for i in range(4):
                stream.submit_read(pipe[0], 0, 1, i)
            loop = asyncio.get_running_loop()
            for i in range(4):
                loop.call_later(0.02 * (i + 1), os.write, pipe[1], b"x")
            done = await asyncio.wait_for(stream.wait_async(4), 10)
            return sorted(c.user_data for c in done)

    assert asyncio.run(main()) == [0, 1, 2, 3]


def test_a_polled_stream_wakes_nobody(buffer: GpuMappedBuffer) -> None:
    with (
        AsyncUringStream(buffer, iopoll=True) as stream,
        pytest.raises(ValueError, match="iopoll=True has no descriptor"),
    ):
        stream.fileno()


def test_async_iteration(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, namespace: Namespace, pipe: tuple[int, int]
) -> None:
    """To the end of what is in flight; what a loop that is left early hasn't seen is not lost."""

    async def main() -> None:
        tokens = [*stream.submit_nvme_passthrough(namespace, commands(buffer, 20))]
        blocked = stream.submit_read(pipe[0], 0, 1, 0)
        seen = []
        async for completion in stream:
            seen.append(completion.user_data)
            if len(seen) == 7:
                break
        assert stream.inflight == 14
        asyncio.get_running_loop().call_later(0.02, os.write, pipe[1], b"x")
        async for completion in stream:
            seen.append(completion.user_data)
        assert seen == [*tokens, blocked]

    asyncio.run(main())


def test_uvloop(buffer: GpuMappedBuffer, namespace: Namespace, pipe: tuple[int, int]) -> None:
    uvloop = pytest.importorskip("uvloop", reason="uvloop has no wheel for this interpreter")

    async def main() -> None:
        with AsyncUringStream(buffer) as stream:
            tokens = {stream.submit_read(pipe[0], 0, 1, i) for i in range(3)}
            loop = asyncio.get_running_loop()
            assert type(loop).__module__.startswith("uvloop")
            for i in range(3):
                loop.call_later(0.01 * (i + 1), os.write, pipe[1], b"x")
            assert {c.user_data for c in await asyncio.wait_for(stream.wait_async(3), 10)} == tokens
            tokens = {*stream.submit_nvme_passthrough(namespace, commands(buffer, 9))}
            assert {c.user_data async for c in stream} == tokens
            token = stream.submit_read(pipe[0], 0, 1, 0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stream.wait_async(), 0.02)
            os.write(pipe[1], b"x")
            assert [c.user_data for c in await stream.wait_async()] == [token]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_a_cancelled_wait_loses_nothing(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, pipe: tuple[int, int]
) -> None:
    async def main() -> None:
        token = stream.submit_read(pipe[0], 0, 1, 0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.wait_async(), 0.05)
        os.write(pipe[1], b"x")
        assert [c.user_data for c in await stream.wait_async()] == [token]

    asyncio.run(main())


def test_closing_wakes_async_waiters(buffer: GpuMappedBuffer, pipe: tuple[int, int]) -> None:
    async def main() -> None:
        stream = AsyncUringStream(buffer)
        stream.submit_read(pipe[0], 0, 1, 0)
        waiting = asyncio.create_task(stream.wait_async())
        await asyncio.sleep(0.02)
        stream.close(timeout=0)
        with pytest.raises(ValueError, match="closed"):
            await waiting

    asyncio.run(main())


def test_async_waiters_hear_that_others_took_the_last(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, pipe: tuple[int, int]
) -> None:
    """By every call that takes completions, from the same thread and from another."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        out = bytearray(160)
        takers = (
            lambda: len(stream.poll()),
            lambda: len(stream.wait()),
            lambda: stream.wait_into(out),
        )
        for take in takers:
            for elsewhere in (False, True):
                stream.submit_read(pipe[0], 0, 1, 0)
                waiting = [asyncio.create_task(stream.wait_async(2)) for _ in range(3)]
                await asyncio.sleep(0.01)
                os.write(pipe[1], b"x")
                taken = await loop.run_in_executor(None, take) if elsewhere else take()
                left = await asyncio.wait_for(asyncio.gather(*waiting), 10)
                assert taken + sum(map(len, left)) == 1, "whoever was first"
                assert taken == 1 or elsewhere

    asyncio.run(main())


def test_async_waiters_hear_of_what_others_consumed(
    stream: AsyncUringStream, buffer: GpuMappedBuffer, pipe: tuple[int, int]
) -> None:
    """One that needs more takes the completion off the queue; the one that needs it gets it."""

    async def main() -> None:
        tokens = [stream.submit_read(pipe[0], 0, 1, i) for i in range(2)]
        waiting = asyncio.create_task(stream.wait_async(1))
        await asyncio.sleep(0.01)
        os.write(pipe[1], b"x")
        assert stream._look() == (1, 1)
        first = await asyncio.wait_for(waiting, 10)
        os.write(pipe[1], b"y")
        second = await asyncio.wait_for(stream.wait_async(1), 10)
        assert sorted(c.user_data for c in [*first, *second]) == tokens

    asyncio.run(main())


def test_async_waiters_of_several_loops(
    buffer: GpuMappedBuffer, namespace: Namespace, pipe: tuple[int, int]
) -> None:
    """Each loop in a thread of its own, all on one stream: every completion comes back once."""
    taken: list[int] = []
    with AsyncUringStream(buffer, depth=8) as stream:
        blocked = [stream.submit_read(pipe[0], 0, 1, i, user_data=10_000 + i) for i in range(3)]

        async def take() -> None:
            while done := await asyncio.wait_for(stream.wait_async(2), 20):
                taken.extend(completion.user_data for completion in done)

        workers = [threading.Thread(target=asyncio.run, args=(take(),)) for _ in range(4)]
        for worker in workers:
            worker.start()
        tokens: list[int] = []
        for _ in range(50):
            tokens += stream.submit_nvme_passthrough(namespace, commands(buffer, 20))
        os.write(pipe[1], b"abc")
        for worker in workers:
            worker.join(30)
        assert not any(worker.is_alive() for worker in workers)
        assert sorted(taken) == [*tokens, *blocked]


def test_closing_from_another_thread_wakes_async_waiters(
    buffer: GpuMappedBuffer, pipe: tuple[int, int]
) -> None:
    async def main() -> None:
        before = set(os.listdir("/proc/self/fd"))
        stream = AsyncUringStream(buffer)
        stream.submit_read(pipe[0], 0, 1, 0)
        waiting = asyncio.create_task(stream.wait_async())
        await asyncio.sleep(0.02)
        closer = threading.Thread(target=stream.close, args=(0.05,))
        closer.start()
        with pytest.raises(ValueError, match="closed"):
            await asyncio.wait_for(waiting, 10)
        closer.join()
        assert set(os.listdir("/proc/self/fd")) <= before

    asyncio.run(main())


# ---- Memory


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="AddressSanitizer keeps what was freed, to find who uses it",
)
def test_a_long_run_needs_no_more_memory(buffer: GpuMappedBuffer, namespace: Namespace) -> None:
    with AsyncUringStream(buffer, depth=64) as stream:
        batch = commands(buffer, 256)
        out = bytearray(16 * 256)

        def turn(times: int) -> int:
            for _ in range(times):
                stream.submit_nvme_passthrough(namespace, batch)
                assert stream.wait_into(out, 256) == 256
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        before = turn(50)
        assert turn(2000) - before < 2048, "KiB"
        assert sys.getrefcount(namespace) < 10
