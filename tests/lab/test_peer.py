"""Reads into another drive's memory, as GPU memory would be. Every test needs peer memory.

That the bytes went there and nowhere else is judged outside, by what the drives were told.
"""

import errno
import fcntl
import hashlib
import mmap
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import guest
import pytest
from guest import DRIVES, KIB, MIB
from reading import random_range, read_and_compare
from test_command_line import gdsdirect

from gdsdirect import (
    AsyncUringStream,
    DataPath,
    File,
    GpuMappedBuffer,
    MemoryKind,
    Namespace,
    WayClosedError,
)

Open = Callable[[str], Namespace]

_FIBMAP = 1  # linux/fs.h: the block of the device that holds a block of the file

# ---- Passthrough


def test_passthrough(data: Namespace, peer: GpuMappedBuffer) -> None:
    """One block and the most that a command may, at any place; nothing beside it."""
    assert peer.kind is MemoryKind.BAR1_PEER
    most = data.max_transfer // 512
    extents = [(8001, 1), (8100, most), (8050, 7)]
    before = guest.fill(peer, 0x77)
    with AsyncUringStream(peer) as stream:
        assert not stream.registered
        done = guest.read(stream, data, extents, offset=1024)
        assert {completion.path for completion in done} == {DataPath.NVME_PASSTHROUGH}
        assert (stream.stats.registered, stream.stats.bounce_bytes) == (0, 0)
    expected = DRIVES["data"].contents(extents)
    guest.check(peer, before[:1024] + expected + before[: MIB - 1024 - len(expected)])


def test_two_drives_into_one_peer(data: Namespace, small: Namespace, peer: GpuMappedBuffer) -> None:
    """In turns, more commands than the ring has places."""
    expected = b""
    with AsyncUringStream(peer, depth=4) as stream:
        for i in range(10):
            namespace, serial = ((data, "data"), (small, "small"))[i % 2]
            extents = guest.pieces(300 + 13 * i, 9, 2)
            guest.submit(stream, namespace, extents, offset=len(expected))
            expected += DRIVES[serial].contents(extents)
        assert sum(completion.result() for completion in stream.wait(50)) == len(expected)
        guest.check(peer, expected)


def test_a_destination_is_a_multiple_of_4(data: Namespace, peer: GpuMappedBuffer) -> None:
    extents = [(8700, 3), (8800, 40)]
    with AsyncUringStream(peer) as stream:
        guest.read(stream, data, extents, offset=8188)
        guest.check(peer, DRIVES["data"].contents(extents), offset=8188)


def test_memory_that_somebody_else_mapped(peer_source: str, small: Namespace) -> None:
    fd = os.open(peer_source, os.O_RDWR)
    mapping = mmap.mmap(fd, 64 * KIB, flags=mmap.MAP_SHARED | guest.MAP_32BIT)
    os.close(fd)
    with memoryview(mapping) as view:
        address = GpuMappedBuffer.from_object(view).address
    with (
        GpuMappedBuffer.from_bar1_peer_address(address, 64 * KIB, mapping) as buffer,
        AsyncUringStream(buffer) as stream,
    ):
        guest.read(stream, small, [(700, 16)])
        guest.check(buffer, DRIVES["small"].contents([(700, 16)]))


def test_a_drive_that_shares_no_switch(
    open_namespace: Open, data: Namespace, peer: GpuMappedBuffer
) -> None:
    """It is refused with the reason, and the stream goes on."""
    far = open_namespace("far")
    before = guest.fill(peer, 0x11)
    with AsyncUringStream(peer) as stream:
        commands = guest.packed(far, [(100, 8)], peer.address)
        stream.submit_nvme_passthrough(far, commands)
        (completion,) = stream.wait()
        with pytest.raises(OSError, match="do not share a PCIe switch") as caught:
            completion.result()
        assert caught.value.errno in (errno.EINVAL, errno.EREMOTEIO)
        assert caught.value.filename == str(DRIVES["far"].generic)
        assert (stream.stats.failed, stream.stats.nbytes) == (1, 0)
        guest.check(peer, before[: 64 * KIB])
        guest.read(stream, data, [(8900, 8)])
        guest.check(peer, DRIVES["data"].contents([(8900, 8)]))


def test_arrays_of_peer_memory(data: Namespace, peer: GpuMappedBuffer) -> None:
    """NumPy sees what the drive wrote there, both ways, and no copy."""
    import numpy as np

    with AsyncUringStream(peer) as stream:
        guest.read(stream, data, [(8300, 8)], offset=4096)
    tensor = peer.tensor("uint32", (16, 64), offset=4096)
    expected = DRIVES["data"].contents([(8300, 8)])
    for array in (np.asarray(tensor), np.from_dlpack(tensor)):
        assert array.ctypes.data == peer.address + 4096
        assert array.tobytes() == expected


# ---- Files


def extents_of(file: Path, offset: int, nbytes: int) -> list[guest.Extent]:
    """Where bytes of a file are on its drive, which has blocks of 512 bytes."""
    extents: list[guest.Extent] = []
    with file.open("rb") as opened:
        size = os.fstatvfs(opened.fileno()).f_bsize
        for block in range(offset // size, (offset + nbytes) // size):
            (place,) = struct.unpack("i", fcntl.ioctl(opened, _FIBMAP, struct.pack("i", block)))
            lba, blocks = place * size // 512, size // 512
            if extents and sum(extents[-1]) == lba:
                lba, blocks = extents[-1][0], extents.pop()[1] + blocks
            extents.append((lba, blocks))
    return extents


def test_a_file(mounted: Path, peer: GpuMappedBuffer) -> None:
    """With O_DIRECT, straight from the drive that has it; each extent is a command."""
    drive, piece = DRIVES["files"], 256 * KIB
    starts = range(0, MIB, piece)
    with (
        AsyncUringStream(peer) as stream,
        open(os.open(mounted / "model", os.O_RDONLY | os.O_DIRECT), "rb", buffering=0) as file,
    ):
        for start in starts:
            guest.record(peer, drive.nsid, extents_of(mounted / "model", start, piece))
            stream.submit_read(file, start, piece, start)
        done = stream.wait(len(starts))
        assert sum(completion.result() for completion in done) == MIB
        assert {completion.path for completion in done} == {DataPath.FILE_DIRECT}
        guest.check(peer, (guest.FOLDER / "files/model").read_bytes()[:MIB])


def test_the_page_cache_copies_and_the_way_told_says_so(
    mounted: Path, peer: GpuMappedBuffer
) -> None:
    with AsyncUringStream(peer) as stream, (mounted / "model").open("rb") as file:
        stream.submit_read(file, MIB, 64 * KIB, 0)
        (completion,) = stream.wait()
        assert (completion.result(), completion.path) == (64 * KIB, DataPath.BUFFERED)
        model = (guest.FOLDER / "files/model").read_bytes()
        guest.check(peer, model[MIB : MIB + 64 * KIB])


def test_peer_memory_is_not_registered(mounted: Path, peer: GpuMappedBuffer) -> None:
    with pytest.raises(OSError, match=r"peer memory .*submit_read"):
        AsyncUringStream(peer, register=True)
    before = guest.fill(peer, 0x22)
    with (
        AsyncUringStream(peer) as stream,
        open(os.open(mounted / "model", os.O_RDONLY | os.O_DIRECT), "rb", buffering=0) as file,
    ):
        with pytest.raises(OSError, match="can't register peer memory: use submit_read"):
            stream.submit_read_fixed(file, 0, 4096, 0)
        assert stream.stats.submitted == 0
        guest.check(peer, before[:4096])


# ---- gdsdirect.open


@pytest.mark.parametrize("serial", ["data", "small"])
def test_random_reads_of_a_namespace(serial: str, peer: GpuMappedBuffer) -> None:
    """Whole blocks go straight into the peer's memory, and only the ends by way of the host's."""
    drive, chance = DRIVES[serial], random.Random(serial)
    size = drive.block_size
    with File(drive.generic) as file, Namespace(drive.generic) as namespace:
        most = namespace.safe_transfer // size
        for _ in range(60):
            offset, nbytes, target = random_range(chance, len(drive.image), peer.nbytes)
            target -= (target - offset) % 4 if target >= 4 else 0
            first, end = -(-offset // size), min(offset + nbytes, len(drive.image)) // size
            straight = (target - offset) % 4 == 0 and first < end
            if straight:
                guest.record(peer, drive.nsid, guest.pieces(first, end - first, most))
            result = read_and_compare(file, peer, drive.image, offset, nbytes, target)
            assert result.path is DataPath.NVME_PASSTHROUGH
            assert result.nbytes - result.bounce_bytes == (straight and (end - first) * size)


def test_random_reads_of_a_file(mounted: Path, peer: GpuMappedBuffer) -> None:
    path, chance = mounted / "model", random.Random("model")
    model = (guest.FOLDER / "files/model").read_bytes()
    with File(path) as file:
        for _ in range(20):
            offset = 4096 * chance.randrange(len(model) // 4096)
            pages = min(chance.randrange(1, 30), (len(model) - offset) // 4096)
            target = 4096 * chance.randrange(200)
            head, tail = chance.choice([0, 1, 511]), chance.choice([0, 1, 511])
            guest.record(peer, DRIVES["files"].nsid, extents_of(path, offset, 4096 * pages))
            first, last = max(0, offset - head), min(len(model), offset + 4096 * pages + tail)
            where = (first, last - first, max(0, target - (offset - first)))
            if where[2] != target - (offset - first):
                where = (offset, last - offset, target)
            result = read_and_compare(file, peer, model, *where)
            assert (result.path, result.why) == (DataPath.FILE_DIRECT, None)
            assert result.nbytes - result.bounce_bytes == 4096 * pages


def test_a_file_by_its_extents(mounted: Path, peer: GpuMappedBuffer) -> None:
    """From the drive into the peer's memory, past the file system, as the drives themselves say."""
    path, drive = mounted / "model", DRIVES["files"]
    model = (guest.FOLDER / "files/model").read_bytes()
    with File(path, extents=True) as file, Namespace(drive.generic) as namespace:
        most = namespace.safe_transfer // drive.block_size
        for offset, nbytes in ((0, 4096), (40960, 512 * KIB), (MIB, MIB)):
            for lba, blocks in extents_of(path, offset, nbytes):
                guest.record(peer, drive.nsid, guest.pieces(lba, blocks, most))
            result = read_and_compare(file, peer, model, offset, nbytes, 0)
            assert (result.path, result.why, result.bounce_bytes) == (
                DataPath.NVME_PASSTHROUGH,
                None,
                0,
            )


def test_the_best_way_into_peer_memory(mounted: Path, peer: GpuMappedBuffer) -> None:
    with File(mounted / "model") as file:
        with pytest.raises(WayClosedError, match="FILE_FIXED, the kernel can't register peer"):
            file.read_into(peer, size=4096, require=DataPath.FILE_FIXED)
        model = (guest.FOLDER / "files/model").read_bytes()
        result = read_and_compare(file, peer, model, 5, 70_000, 9, DataPath.BUFFERED)
        assert (result.path, result.why) == (DataPath.BUFFERED, "require= asks for it")


def test_a_drive_that_reaches_no_peer(peer: GpuMappedBuffer) -> None:
    """Its files are copied, and the result says why; by passthrough there is nothing to copy."""
    drive = DRIVES["far"]
    with File(drive.disk) as file:
        result = read_and_compare(file, peer, drive.image, 4096, 64 * KIB, 0)
        assert result.path is DataPath.BUFFERED
        assert "FILE_DIRECT was refused" in str(result.why)
        assert "do not share a PCIe switch" in str(result.why)
        with pytest.raises(OSError, match="do not share a PCIe switch"):
            file.read_into(peer, size=4096, require=DataPath.FILE_DIRECT)
    with File(drive.generic) as raw, pytest.raises(OSError, match="do not share a PCIe switch"):
        raw.read_into(peer, size=4096)


def test_a_file_in_chunks(mounted: Path, peer: GpuMappedBuffer) -> None:
    path = mounted / "model"
    model = (guest.FOLDER / "files/model").read_bytes()
    for start in range(0, len(model), 128 * KIB):
        size = min(128 * KIB, len(model) - start)
        guest.record(peer, DRIVES["files"].nsid, extents_of(path, start, size))
    with File(path) as file, file.stream(peer, chunk_size=128 * KIB) as stream:
        assert b"".join(bytes(chunk.view) for chunk in stream) == model
        assert set(stream.progress.ways) == {DataPath.FILE_DIRECT}


# ---- The memory


def test_more_than_there_is(peer_source: str) -> None:
    """All of it can be had once, and again when it was given back."""
    size = int(Path(peer_source).with_name("size").read_text())
    available = Path(peer_source).with_name("available")
    assert int(available.read_text()) == size
    with pytest.raises(OSError, match=f"fewer than {2 * size} bytes are free") as caught:
        GpuMappedBuffer.from_bar1_peer(peer_source, 2 * size)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOMEM, peer_source)
    for _ in range(2):
        with GpuMappedBuffer.from_bar1_peer(peer_source, size) as everything:
            assert everything.nbytes == size
            assert int(available.read_text()) == 0
            with pytest.raises(OSError, match="fewer than 4096 bytes are free"):
                GpuMappedBuffer.from_bar1_peer(peer_source, 4096)
    assert int(available.read_text()) == size


def test_memory_in_flight_is_kept(data: Namespace, peer_source: str) -> None:
    buffer = GpuMappedBuffer.from_bar1_peer(peer_source, 64 * KIB)
    stream = AsyncUringStream(buffer)
    guest.submit(stream, data, [(9000, 128)])
    with pytest.raises(BufferError):
        buffer.close()
    stream.close()
    guest.check(buffer, DRIVES["data"].contents([(9000, 128)]))
    buffer.close()


# ---- The command line


def test_gdsdirect_read(peer: GpuMappedBuffer, peer_source: str) -> None:
    """Besides memory that another process has: each mapping is its own."""
    drive = DRIVES["data"]
    lba, blocks = 9500, 1024
    # The buffer has room for this at once: one command of the largest size.
    guest.record(peer, drive.nsid, [(lba, blocks)])
    part = ("--offset", lba * 512, "--size", blocks * 512)
    out, err = gdsdirect("read", drive.generic, *part, "--to", f"peer:{peer_source}", "--sha256")
    assert out.strip() == hashlib.sha256(drive.contents([(lba, blocks)])).hexdigest()
    assert f"by NVME_PASSTHROUGH into peer memory of {peer_source}" in err
