"""Passthrough reads into host memory: every byte arrives, whichever way the stream is used."""

import asyncio
import mmap
import os
import random
import struct
import traceback
from array import array
from collections.abc import Callable, Iterator

import guest
import pytest
from guest import DRIVES, KIB, MIB

from gdsdirect import (
    COMPLETION_FORMAT,
    AsyncUringStream,
    DataPath,
    GpuMappedBuffer,
    Namespace,
    encode_nvme_read_sqes,
)

Open = Callable[[str], Namespace]


def whole(namespace: Namespace) -> list[guest.Extent]:
    """All blocks, in commands of the largest size."""
    return guest.pieces(0, namespace.capacity, namespace.max_transfer // namespace.lba_size)


# ---- What is read


@pytest.mark.parametrize("register", [None, False])
@pytest.mark.parametrize("serial", guest.READABLE)
def test_every_block_of_a_namespace(
    serial: str, register: bool | None, open_namespace: Open
) -> None:
    """In commands of max_transfer bytes, with the buffer registered and not."""
    namespace, drive = open_namespace(serial), DRIVES[serial]
    with (
        GpuMappedBuffer.from_host_visible(len(drive.image)) as buffer,
        AsyncUringStream(buffer, register=register) as stream,
    ):
        done = guest.read(stream, namespace, whole(namespace))
        guest.check(buffer, drive.image)
        assert {completion.path for completion in done} == {DataPath.NVME_PASSTHROUGH}
        assert stream.stats.ways[DataPath.NVME_PASSTHROUGH].completed == len(done)
        assert stream.stats.nbytes == len(drive.image)
        assert stream.stats.failed == stream.stats.bounce_bytes == 0
        assert stream.registered is (register is None)


@pytest.mark.parametrize("serial", ["data", "small"])
def test_single_blocks_anywhere(serial: str, open_namespace: Open) -> None:
    """The first and the last block, and others; each where it belongs in the buffer."""
    namespace, drive = open_namespace(serial), DRIVES[serial]
    last = namespace.capacity - 1
    lbas = [last, 0, *random.Random(5).sample(range(1, last), 60)]
    extents = [(lba, 1) for lba in lbas]
    with (
        GpuMappedBuffer.from_host_visible(len(lbas) * drive.block_size) as buffer,
        AsyncUringStream(buffer) as stream,
    ):
        guest.read(stream, namespace, extents)
        guest.check(buffer, drive.contents(extents))


@pytest.mark.parametrize("serial", ["data", "small"])
def test_commands_of_many_sizes_fill_what_they_should_and_no_more(
    serial: str, open_namespace: Open, buffer: GpuMappedBuffer
) -> None:
    namespace, drive = open_namespace(serial), DRIVES[serial]
    most = namespace.max_transfer // namespace.lba_size
    pattern = guest.fill(buffer, 0xA5)
    extents = [(31, 1), (7, 2), (100, 7), (200, 9), (300, most // 2 + 1)]
    with AsyncUringStream(buffer) as stream:
        guest.read(stream, namespace, extents, offset=drive.block_size)
    expected = drive.contents(extents)
    rest = len(pattern) - drive.block_size - len(expected)
    guest.check(buffer, pattern[: drive.block_size] + expected + pattern[:rest])


@pytest.mark.parametrize("register", [None, False])
def test_a_destination_is_a_multiple_of_4(
    register: bool | None, data: Namespace, buffer: GpuMappedBuffer
) -> None:
    """Across pages that the transfer neither starts nor ends with."""
    pattern = guest.fill(buffer, 0x5A)
    extents = [(40, 17), (90, 200), (4, 1)]
    with AsyncUringStream(buffer, register=register) as stream:
        guest.read(stream, data, extents, offset=4092)
    expected = DRIVES["data"].contents(extents)
    guest.check(buffer, pattern[:4092] + expected + pattern[: MIB - 4092 - len(expected)])


@pytest.mark.parametrize(("serial", "nbytes"), [("data", 512 * KIB), ("small", 128 * KIB)])
def test_max_transfer(serial: str, nbytes: int, open_namespace: Open) -> None:
    """It is what the drive and the kernel say; one block more doesn't come to the kernel."""
    namespace, drive = open_namespace(serial), DRIVES[serial]
    assert namespace.max_transfer == nbytes == 4096 << drive.mdts
    assert namespace.max_transfer == drive.queue("max_hw_sectors_kb") * KIB
    most = nbytes // drive.block_size
    with (
        GpuMappedBuffer.from_host_visible(3 * nbytes) as buffer,
        AsyncUringStream(buffer) as stream,
    ):
        guest.read(stream, namespace, [(5, most), (most, most)])
        guest.check(buffer, drive.contents([(5, most), (most, most)]))
        longer = guest.packed(namespace, [(5, most + 1)], buffer.address)
        with pytest.raises(ValueError, match=f"{most + 1}.*at most {nbytes} .*split"):
            stream.submit_nvme_passthrough(namespace, longer)
        assert stream.stats.submitted == 2


@pytest.fixture
def scattered() -> Iterator[GpuMappedBuffer]:
    """Pages that are neighbours by their addresses alone: they were given out in turns."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | guest.MAP_32BIT
    mapping = mmap.mmap(-1, 2 * MIB, flags=flags)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    for first in range(8):
        for page in range(first, 512, 8):
            mapping[page * 4096] = 1
    with GpuMappedBuffer.from_object(mapping) as made:
        yield made
    mapping.close()


@pytest.mark.parametrize("register", [None, False])
def test_safe_transfer(register: bool | None, data: Namespace, scattered: GpuMappedBuffer) -> None:
    """Commands of that size go into any memory; longer ones don't into scattered pages.

    They go into the buffer's own pages: the kernel copies nothing. Where the queue has segments
    enough for max_transfer, there are no longer ones.
    """
    segments = DRIVES["data"].queue("max_segments")
    assert data.safe_transfer == min(data.max_transfer, (segments - 1) * 4096)
    safe = guest.pieces(50 if register is None else 6050, 3000, data.safe_transfer // 512)
    with AsyncUringStream(scattered, register=register) as stream:
        guest.read(stream, data, safe, offset=512)
        guest.record_frames(scattered, data.nsid, safe, 512, offset=512)
        guest.check(scattered, DRIVES["data"].contents(safe), offset=512)
        longest = guest.packed(data, [(0, data.max_transfer // 512)], scattered.address + 512)
        stream.submit_nvme_passthrough(data, longest)
        (completion,) = stream.wait()
        if data.safe_transfer == data.max_transfer:
            assert completion.result() == data.max_transfer
            guest.check(scattered, DRIVES["data"].contents([(0, 1024)]), offset=512)
            return
        assert completion.nbytes == 0
        with pytest.raises(OSError, match=r"Invalid argument, reading LBA 0\.\.1023 .*segments"):
            completion.result()


# ---- How the stream is used


@pytest.mark.parametrize("serial", ["data", "small"])
@pytest.mark.parametrize("register", [True, None, False])
def test_registered_or_not(serial: str, register: bool | None, open_namespace: Open) -> None:
    """Both deliver, and `stats` tells which it was."""
    namespace, drive = open_namespace(serial), DRIVES[serial]
    with (
        GpuMappedBuffer.from_host_visible(64 * KIB) as buffer,
        AsyncUringStream(buffer, register=register) as stream,
    ):
        extents = guest.pieces(17, 64 * KIB // drive.block_size, 8192 // drive.block_size)
        guest.read(stream, namespace, extents)
        guest.check(buffer, drive.contents(extents))
        assert stream.stats.submitted == stream.stats.completed == len(extents) == 8
        assert stream.stats.registered == (0 if register is False else len(extents))


def test_what_the_kernel_refuses_in_a_registered_buffer_is_sent_again_without(
    data: Namespace,
) -> None:
    """Linux 6.1 wants segments for all the pages behind the target; 127 are there."""
    refused = guest.EXPECTED.maps_to_the_end
    registered = 0
    with (
        GpuMappedBuffer.from_host_visible(2 * MIB) as buffer,
        AsyncUringStream(buffer) as stream,
    ):
        for offset, blocks, taken in (
            (2 * MIB - 64 * KIB, 16, True),
            (0, 16, not refused),
            (2 * MIB - 64 * KIB, 8, True),  # shorter than what was refused
        ):
            extents = guest.pieces(11000 + blocks, 4 * blocks, blocks)
            guest.read(stream, data, extents, offset)
            guest.check(buffer, DRIVES["data"].contents(extents), offset)
            registered += 4 if taken else 0
            assert stream.stats.registered == registered
        assert stream.stats.submitted == stream.stats.completed == 12


def test_two_drives_on_one_stream(
    data: Namespace, small: Namespace, buffer: GpuMappedBuffer
) -> None:
    """Block sizes, ids and contents differ; commands in turns, in flight together."""
    expected = b""
    with AsyncUringStream(buffer, depth=16) as stream:
        tokens: list[int] = []
        for i in range(12):
            namespace, serial = ((data, "data"), (small, "small"))[i % 2]
            extents = guest.pieces(13 * i, 8, 3)
            tokens += guest.submit(stream, namespace, extents, offset=len(expected))
            expected += DRIVES[serial].contents(extents)
        done = stream.wait(len(tokens))
        assert sorted(completion.user_data for completion in done) == tokens
        assert sum(completion.result() for completion in done) == len(expected)
        guest.check(buffer, expected)


def test_a_range_striped_over_two_drives(
    data: Namespace, small: Namespace, buffer: GpuMappedBuffer
) -> None:
    """Units of 4 KiB, in turns; far more of them than the ring has room for."""
    unit, units, serials = 4096, 64, ("data", "small")
    batches, expected = [], [b""] * units
    for turn, (namespace, serial) in enumerate(zip((data, small), serials, strict=True)):
        blocks = unit // namespace.lba_size
        count = units // 2
        lbas = array("Q", range(100 * blocks, (100 + count) * blocks, blocks))
        start = buffer.address + turn * unit
        targets = array("Q", range(start, start + units * unit, 2 * unit))
        batches.append((namespace, encode_nvme_read_sqes(namespace.nsid, lbas, blocks, targets)))
        extents = [(lba, blocks) for lba in lbas]
        guest.record(buffer, namespace.nsid, extents)
        expected[turn::2] = [DRIVES[serial].contents([extent]) for extent in extents]
    with AsyncUringStream(buffer, depth=6) as stream:
        tokens = stream.submit_nvme_passthroughs(batches)
        done = stream.wait(units)
        assert sorted(c.user_data for c in done) == [token for some in tokens for token in some]
        assert {c.result() for c in done} == {unit}
    guest.check(buffer, b"".join(expected))


def test_a_batch_larger_than_the_ring(data: Namespace, buffer: GpuMappedBuffer) -> None:
    extents = [(lba, 3) for lba in random.Random(6).sample(range(10000), 600)]
    with AsyncUringStream(buffer, depth=4) as stream:
        guest.read(stream, data, extents)
        guest.check(buffer, DRIVES["data"].contents(extents))


def test_wait_into(data: Namespace, buffer: GpuMappedBuffer) -> None:
    """A record for each read, without an object."""
    extents = guest.pieces(1000, 100, 5)
    with AsyncUringStream(buffer) as stream:
        tokens = guest.submit(stream, data, extents)
        out = bytearray(16 * len(tokens))
        assert stream.wait_into(out, len(tokens)) == len(tokens)
        guest.check(buffer, DRIVES["data"].contents(extents))
    records = sorted(struct.iter_unpack(COMPLETION_FORMAT, out))
    assert records == [(token, 0, 5 * 512) for token in tokens]


@pytest.mark.parametrize("single_thread", [False, True])
def test_wait_async(data: Namespace, buffer: GpuMappedBuffer, single_thread: bool) -> None:
    """Tasks that wait on one stream get every completion once."""
    extents = guest.pieces(2000, 300, 10)

    async def take(stream: AsyncUringStream) -> list[int]:
        taken = []
        while done := await stream.wait_async():
            taken += [completion.user_data for completion in done if completion.result() == 5120]
        return taken

    async def take_all() -> list[int]:
        with AsyncUringStream(buffer, depth=8, single_thread=single_thread) as stream:
            tasks = [asyncio.create_task(take(stream)) for _ in range(3)]
            tokens = guest.submit(stream, data, extents)
            taken = await asyncio.wait_for(asyncio.gather(*tasks), 20)
            assert sorted(token for tokens in taken for token in tokens) == list(tokens)
        return list(tokens)

    assert len(asyncio.run(take_all())) == 30
    guest.check(buffer, DRIVES["data"].contents(extents))


@pytest.mark.parametrize("option", ["single_thread", "sqpoll"])
def test_options(option: str, data: Namespace, buffer: GpuMappedBuffer) -> None:
    extents = guest.pieces(3000, 200, 4)
    with AsyncUringStream(buffer, depth=16, **{option: True}) as stream:
        guest.read(stream, data, extents)
        guest.check(buffer, DRIVES["data"].contents(extents))


def test_iopoll(data: Namespace, buffer: GpuMappedBuffer) -> None:
    """The drive is polled: it raises no interrupt, as it does otherwise."""
    extents = guest.pieces(4000, 200, 4)
    for iopoll in (False, True):
        guest.fill(buffer, 0)
        before = guest.interrupts(DRIVES["data"])
        with AsyncUringStream(buffer, depth=16, iopoll=iopoll) as stream:
            guest.read(stream, data, extents)
        guest.check(buffer, DRIVES["data"].contents(extents))
        raised = guest.interrupts(DRIVES["data"]) - before
        assert (raised == 0) == iopoll


def test_closing_waits_for_the_drive(data: Namespace, buffer: GpuMappedBuffer) -> None:
    """Namespace and stream are closed with reads in flight; all bytes are there afterwards."""
    extents = guest.pieces(5000, 2048, 64)
    stream = AsyncUringStream(buffer)
    guest.submit(stream, data, extents)
    data.close()
    with pytest.raises(BufferError):
        buffer.close()
    stream.close()
    guest.check(buffer, DRIVES["data"].contents(extents))


# ---- Who reads

NOBODY = 65534


def in_a_child(work: Callable[[], None], user: int) -> str:
    """Run `work` in a forked process of `user`; returns the traceback of what it raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            work()
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def test_an_ordinary_user_who_may_open_the_node(open_namespace: Open) -> None:
    """Reads on kernels that let him, and is told where not.

    Where he may not ask the drive either, its geometry comes from /sys.
    """
    drive, allowed = DRIVES["small"], guest.EXPECTED.commands_for_everyone
    assert drive.image, "is read now, as the other user may not be allowed to"
    extents = guest.pieces(100, 40, 7)
    geometry = open_namespace("small").geometry

    def work() -> None:
        with (
            Namespace(drive.generic) as namespace,
            GpuMappedBuffer.from_host_visible(MIB) as buffer,
            AsyncUringStream(buffer) as stream,
        ):
            assert os.geteuid() == NOBODY
            assert namespace.geometry == geometry
            assert namespace.extended is (False if allowed else None)
            commands = guest.packed(namespace, extents, buffer.address)
            stream.submit_nvme_passthrough(namespace, commands)
            done = stream.wait(len(extents))
            if allowed:
                assert sum(completion.result() for completion in done) == 40 * 4096
                guest.check(buffer, drive.contents(extents))
                return
            assert stream.stats.failed == len(extents)
            with pytest.raises(PermissionError, match="not allowed"):
                done[0].result()

    before = drive.generic.stat().st_mode
    try:
        drive.generic.chmod(0o600)
        assert "PermissionError" in in_a_child(work, NOBODY)
        drive.generic.chmod(0o666)
        assert in_a_child(work, NOBODY) == ""
    finally:
        drive.generic.chmod(before)
    if allowed:
        guest.note(target="host", nsid=drive.nsid, extents=extents)
