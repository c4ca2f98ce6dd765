"""What must not be read, can't be read, or isn't an NVMe namespace."""

import re
import struct
from collections.abc import Callable
from pathlib import Path

import guest
import pytest
from guest import DRIVES

from gdsdirect import AsyncUringStream, Geometry, GpuMappedBuffer, Namespace, NvmeStatusError
from gdsdirect import encode_nvme_read_sqe as encode

Open = Callable[[str], Namespace]
Spoil = Callable[[Namespace, int], bytes]

# ---- Commands


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda it, at: encode(it.nsid + 1, 0, 1, at), "namespace_id is 13"),
        (lambda it, at: encode(it.nsid, it.capacity, 1, at), "starting_lba 16384 .*capacity"),
        (lambda it, at: encode(it.nsid, it.capacity - 1, 2, at), "starting_lba 16383 .*capacity"),
        (lambda it, at: encode(it.nsid, 2**64 - 1, 2, at), "starting_lba .*capacity"),
        (lambda it, at: encode(it.nsid, 0, 1025, at), "blocks is 1025"),
        (lambda it, at: encode(it.nsid, 0, 1, at - 512), "dest_bar1_ptr .*outside"),
        (lambda it, at: encode(it.nsid, 0, 2, at + (1 << 20) - 512), "dest_bar1_ptr .*outside"),
        (lambda it, at: b"\x01" + encode(it.nsid, 0, 1, at)[1:], "opcode"),
        (lambda it, at: encode(it.nsid, 0, 1, at)[:63] + b"\x01", ""),
        (lambda it, at: encode(it.nsid, 0, 1, at)[:-13] + bytes([0x40]) + bytes(12), ""),
    ],
)
def test_one_bad_command_and_nothing_of_the_batch_is_submitted(
    spoil: Spoil, message: str, data: Namespace, buffer: GpuMappedBuffer
) -> None:
    pattern = guest.fill(buffer, 0xC3)
    good = guest.packed(data, guest.pieces(0, 30, 1), buffer.address)
    bad = good[: 64 * 20] + spoil(data, buffer.address) + good[64 * 20 :]
    with AsyncUringStream(buffer) as stream:
        with pytest.raises(ValueError, match=f"^command 20: .*{message}"):
            stream.submit_nvme_passthrough(data, bad)
        assert (stream.stats.submitted, stream.inflight) == (0, 0)
        assert stream.wait() == []
        guest.check(buffer, pattern)


def test_a_drive_refuses_blocks_that_it_has_not(buffer: GpuMappedBuffer) -> None:
    """Believed to be larger than it is, the package sends the command, and tells the answer."""
    drive = DRIVES["data"]
    larger = Geometry(drive.nsid, 512, drive.blocks + 1000, 512 << 10)
    pattern = guest.fill(buffer, 0x3C)
    with (
        Namespace(drive.generic, geometry=larger) as namespace,
        AsyncUringStream(buffer) as stream,
    ):
        beyond = [(drive.blocks, 8), (drive.blocks - 1, 2), (drive.blocks + 999, 1)]
        commands = guest.packed(namespace, beyond, buffer.address)
        tokens = stream.submit_nvme_passthrough(namespace, commands)
        done = sorted(stream.wait(3), key=lambda completion: completion.user_data)
        for completion, extent in zip(done, beyond, strict=True):
            assert (completion.ok, completion.nbytes) == (False, 0)
            with pytest.raises(NvmeStatusError, match="do not retry") as caught:
                completion.result()
            error = caught.value
            assert (error.sct, error.sc, error.name) == (0, 0x80, "LBA Out of Range")
            assert error.do_not_retry
            assert (error.starting_lba, error.blocks) == extent
            assert (error.namespace, error.namespace_id) == (str(drive.generic), drive.nsid)
        assert stream.stats.failed == len(tokens)
        guest.check(buffer, pattern)


def test_blocks_that_cannot_be_read(open_namespace: Open) -> None:
    """Just the commands with such a block fail, and say which; all others deliver."""
    namespace, drive = open_namespace("broken"), DRIVES["broken"]
    extents = guest.pieces(0, drive.blocks, 8)
    bad = {lba // 8 for lba in drive.read_errors}
    with (
        GpuMappedBuffer.from_host_visible(len(drive.image)) as buffer,
        AsyncUringStream(buffer, depth=32) as stream,
    ):
        tokens = guest.submit(stream, namespace, extents, 0)
        failed = {c.user_data - tokens[0]: c for c in stream.wait(len(tokens)) if not c.ok}
        assert set(failed) == bad
        for index, completion in failed.items():
            lba = 8 * index
            with pytest.raises(NvmeStatusError, match=rf"LBA {lba}\.\.{lba + 7} of") as caught:
                completion.result()
            error = caught.value
            assert (error.sct, error.sc, error.name) == (2, 0x81, "Unrecovered Read Error")
            assert (error.starting_lba, error.blocks) == (lba, 8)
            assert error.filename == str(drive.generic)
        assert (stream.stats.failed, stream.stats.completed) == (len(bad), len(tokens) - len(bad))
        for index, extent in enumerate(extents):
            if index not in bad:
                guest.check(buffer, drive.contents([extent]), offset=4096 * index)


def test_the_result_of_a_bad_block_as_a_record(
    open_namespace: Open, buffer: GpuMappedBuffer
) -> None:
    """`wait_into` gives the kernel's number as it is."""
    namespace, drive = open_namespace("broken"), DRIVES["broken"]
    with AsyncUringStream(buffer) as stream:
        guest.submit(stream, namespace, [(drive.read_errors[0], 1)])
        out = bytearray(16)
        assert stream.wait_into(out) == 1
    assert struct.unpack("QiI", out) == (0, 0x281, 0)


@pytest.mark.parametrize("serial", ["separate", "extended"])
def test_metadata(serial: str, open_namespace: Open, buffer: GpuMappedBuffer) -> None:
    """It is told of, and not read."""
    namespace, drive = open_namespace(serial), DRIVES[serial]
    assert (namespace.lba_size, namespace.metadata_size) == (drive.block_size, 8)
    assert (namespace.capacity, namespace.nsid) == (drive.blocks, drive.nsid)
    assert namespace.extended is drive.extended_metadata is (serial == "extended")
    assert 128 << 10 <= namespace.max_transfer <= 4096 << drive.mdts
    with AsyncUringStream(buffer) as stream:
        command = guest.packed(namespace, [(0, 1)], buffer.address)
        with pytest.raises(ValueError, match=f"^{drive.generic} .* 8 bytes of metadata"):
            stream.submit_nvme_passthrough(namespace, command)
        assert stream.stats.submitted == 0


# ---- Devices


@pytest.mark.parametrize("serial", list(DRIVES))
def test_what_a_namespace_tells(serial: str, open_namespace: Open) -> None:
    """The id is the drive's, not the number in the device's name."""
    namespace, drive = open_namespace(serial), DRIVES[serial]
    assert namespace.path == str(drive.generic)
    assert namespace.nsid == drive.nsid != int(drive.generic.name.rpartition("n")[2])
    assert (namespace.lba_size, namespace.capacity) == (drive.block_size, drive.blocks)
    assert (namespace.serial, namespace.model) == (serial, "QEMU NVMe Ctrl")
    assert namespace.pci_address == drive.pci_address


def test_other_names_of_a_namespace(tmp_path: Path, buffer: GpuMappedBuffer) -> None:
    """The block device and links lead to the generic device, which is read."""
    drive = DRIVES["data"]
    (tmp_path / "generic").symlink_to(drive.generic)
    (tmp_path / "disk").symlink_to(drive.disk)
    for at, path in enumerate((drive.disk, tmp_path / "generic", tmp_path / "disk")):
        with Namespace(path) as namespace, AsyncUringStream(buffer) as stream:
            assert (namespace.path, namespace.nsid) == (str(drive.generic), drive.nsid)
            guest.read(stream, namespace, [(70 + at, 1)])
            guest.check(buffer, drive.contents([(70 + at, 1)]))


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/dev/null", "the character device null, not an NVMe namespace"),
        ("/dev", "a directory"),
        (__file__, "a regular file"),
        ("{controller}", "the NVMe controller {controller.name}: give .* such as {generic}"),
        ("{disk}p1", "a partition of {disk.name}: give {generic}, or read the partition as a file"),
    ],
)
def test_what_is_no_namespace_is_called_what_it_is(path: str, what: str) -> None:
    drive = DRIVES["far"]
    names = {
        "controller": Path("/dev", drive.controller.name),
        "disk": drive.disk,
        "generic": drive.generic,
    }
    path = path.format(**names)
    with pytest.raises(ValueError, match=f"^{re.escape(path)} is {what.format(**names)}"):
        Namespace(path)


def test_peer_memory_or_the_reason_why_there_is_none() -> None:
    source = f"/sys/bus/pci/devices/{DRIVES['peer'].pci_address}/p2pmem/allocate"
    if guest.EXPECTED.peer_memory:
        GpuMappedBuffer.from_bar1_peer(source, 4096).close()
        return
    with pytest.raises(FileNotFoundError, match=r"kernel was built without P2PDMA.*CONFIG") as it:
        GpuMappedBuffer.from_bar1_peer(source, 4096)
    assert it.value.filename == source
