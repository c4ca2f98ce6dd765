"""Namespaces: what a path stands for, a drive's own word about itself, and the open device.

No drive is needed. Identification runs over trees of files, because the devices cannot exist on
every machine; the parsers run over the bytes that drives send; an open namespace is `/dev/null`,
with a geometry or with a tree of files that says it is a drive. Real drives are met in tests/lab.
"""

from __future__ import annotations

import doctest
import errno
import fcntl
import gc
import os
import shutil
import socket
import stat
import struct
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from fake_sysfs import FakeSysfs
from support import run_python

from gdsdirect import namespace as namespace_module
from gdsdirect.errors import RingUnavailableError, ring_module
from gdsdirect.namespace import (
    BlockFormat,
    Geometry,
    Namespace,
    find_nodes,
    parse_identify_namespace,
    parse_max_transfer,
    read_block_format,
)

NOBODY = 65534
GEOMETRY = Geometry(nsid=3, lba_size=4096, capacity=1000, max_transfer=128 << 10, metadata_size=8)


@pytest.fixture
def fake(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path)


def test_examples() -> None:
    result = doctest.testmod(namespace_module)
    assert result.failed == 0
    assert result.attempted > 0


# Geometry


def test_geometry_takes_its_bounds() -> None:
    Geometry(1, 512, 1, 512)
    Geometry(0xFFFFFFFE, 1 << 16, (1 << 64) - 1, 0xFFFF0000, 0xFFFF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nsid": 0}, "nsid is 0: .*1..0xfffffffe"),
        ({"nsid": 0xFFFFFFFF}, "nsid is 4294967295"),
        ({"nsid": -1}, "nsid is -1"),
        ({"lba_size": 0}, "lba_size is 0: .*power of two"),
        ({"lba_size": 256}, "lba_size is 256"),
        ({"lba_size": 520}, "lba_size is 520"),
        ({"lba_size": -512}, "lba_size is -512"),
        ({"capacity": 0}, "capacity is 0: .*blocks"),
        ({"capacity": 1 << 64}, "capacity is 18446744073709551616"),
        ({"max_transfer": 0}, "max_transfer is 0"),
        ({"max_transfer": 2048}, r"max_transfer is 2048: .*one block \(4096\)"),
        ({"max_transfer": 1 << 32}, "max_transfer is 4294967296"),
        ({"max_transfer": 5000}, "max_transfer is 5000: .*multiple of lba_size, such as 4096"),
        ({"metadata_size": -1}, "metadata_size is -1"),
        ({"metadata_size": 1 << 16}, "metadata_size is 65536"),
    ],
)
def test_geometry_refuses(change: dict[str, int], message: str) -> None:
    values = {"nsid": 1, "lba_size": 4096, "capacity": 8, "max_transfer": 8192, **change}
    with pytest.raises(ValueError, match=message):
        Geometry(**values)


# The drive's word


def identify_data(
    *, capacity: int, flbas: int, formats: dict[int, tuple[int, int]], nlbaf: int
) -> bytes:
    """Identify Namespace with NSZE, NLBAF, FLBAS and LBA formats {index: (metadata, shift)}."""
    data = bytearray(4096)
    struct.pack_into("<QQQ", data, 0, capacity, capacity - 1, capacity - 2)  # NSZE, NCAP, NUSE
    data[25:27] = nlbaf, flbas
    for index, (metadata, shift) in formats.items():
        # The byte behind LBADS holds the relative performance, and must not be taken along.
        struct.pack_into("<HBB", data, 128 + 4 * index, metadata, shift, 3)
    return bytes(data)


@pytest.mark.parametrize(
    ("flbas", "nlbaf", "expected"),
    [
        (0x00, 1, BlockFormat(512, 2048, 0, False)),
        (0x01, 1, BlockFormat(4096, 2048, 8, False)),
        (0x11, 1, BlockFormat(4096, 2048, 8, True)),
        (0x0F, 15, BlockFormat(1 << 16, 2048, 0xFFFF, False)),
        # Bits 6:5 count only where there are more than 16 formats, and bit 7 never.
        (0x61, 15, BlockFormat(4096, 2048, 8, False)),
        (0x21, 16, BlockFormat(1024, 2048, 16, False)),
        (0x41, 40, BlockFormat(2048, 2048, 32, False)),
        (0x7F, 63, BlockFormat(8192, 2048, 64, True)),
        (0x80, 63, BlockFormat(512, 2048, 0, False)),
    ],
)
def test_parse_identify_namespace(flbas: int, nlbaf: int, expected: BlockFormat) -> None:
    formats = {
        0: (0, 9),
        1: (8, 12),
        15: (0xFFFF, 16),
        17: (16, 10),
        33: (32, 11),
        63: (64, 13),
    }
    data = identify_data(capacity=2048, flbas=flbas, formats=formats, nlbaf=nlbaf)
    assert parse_identify_namespace(data) == expected


def test_parse_identify_namespace_of_the_largest_capacity() -> None:
    data = identify_data(capacity=(1 << 64) - 1, flbas=0, formats={0: (0, 9)}, nlbaf=0)
    assert parse_identify_namespace(data).capacity == (1 << 64) - 1


@pytest.mark.parametrize(
    "data",
    [
        bytes(4096),
        bytes(identify_data(capacity=8, flbas=1, formats={0: (0, 9)}, nlbaf=1)),
        bytes(identify_data(capacity=8, flbas=0, formats={0: (0, 8)}, nlbaf=0)),
    ],
    ids=["inactive", "no such format", "256-byte blocks"],
)
def test_parse_identify_namespace_without_a_format(data: bytes) -> None:
    with pytest.raises(ValueError, match="not active or not formatted"):
        parse_identify_namespace(data)


@pytest.mark.parametrize(
    ("mdts", "expected"),
    [(0, 128 << 10), (1, 8192), (5, 128 << 10), (7, 128 << 10), (255, 128 << 10)],
)
def test_parse_max_transfer(mdts: int, expected: int) -> None:
    data = bytearray(4096)
    data[76:79] = 0xFF, mdts, 0xFF
    assert parse_max_transfer(bytes(data)) == expected


# The kernel's word


def test_read_block_format(fake: FakeSysfs) -> None:
    controller = fake.controller(0, "0000:03:00.0")
    disk = fake.namespace(
        controller, "nvme0n1", None, 0, size="131072", queue__logical_block_size="4096"
    )
    expected = BlockFormat(4096, 131072 * 512 // 4096, 0, None)
    assert read_block_format(fake.sysfs, f"/{disk}") == expected


def test_read_block_format_with_metadata(fake: FakeSysfs) -> None:
    controller = fake.controller(0, "0000:03:00.0")
    disk = fake.namespace(controller, "nvme0n1", None, 0, metadata_bytes="8")
    assert read_block_format(fake.sysfs, f"/{disk}").metadata_size == 8


def test_read_block_format_before_linux_6_8(fake: FakeSysfs) -> None:
    controller = fake.controller(0, "0000:03:00.0")
    plain = fake.namespace(controller, "nvme0n1", None, 0, integrity__format="none")
    (fake.root / plain / "metadata_bytes").unlink()
    assert read_block_format(fake.sysfs, f"/{plain}").metadata_size == 0


@pytest.mark.parametrize(
    "change",
    [
        {"size": "0"},
        {"queue__logical_block_size": "0"},
        {"metadata_bytes": "", "integrity__format": "T10-DIF-TYPE1-CRC"},
        {"metadata_bytes": "", "integrity__format": "nop"},
        {"metadata_bytes": ""},
    ],
    ids=repr,
)
def test_read_block_format_never_guesses(fake: FakeSysfs, change: dict[str, str]) -> None:
    controller = fake.controller(0, "0000:03:00.0")
    disk = fake.namespace(controller, "nvme0n1", None, 0, **change)
    with pytest.raises(ValueError, match=r"nvme0n1, and this user may not ask .* geometry="):
        read_block_format(fake.sysfs, f"/{disk}")


# What a path stands for


def stat_of(kind: int, number: str = "0:0") -> os.stat_result:
    """The stat of a node that this machine does not have."""
    major, minor = map(int, number.split(":"))
    standard = (kind | 0o600, 1, 1, 1, 0, 0, 0, 0, 0, 0)
    return os.stat_result(standard, {"st_rdev": os.makedev(major, minor)})


@pytest.fixture
def drive(fake: FakeSysfs) -> FakeSysfs:
    """A drive with one namespace and a partition on it, beside a loop device."""
    controller = fake.controller(0, "0000:03:00.0")
    disk = fake.namespace(controller, "nvme0n1", "ng0n1", 0)
    fake.device(f"{disk}/nvme0n1p1", "block", "259:5", partition="1")
    loop = fake.device("sys/devices/virtual/block/loop0", "block", "7:0")
    fake.device(f"{loop}/loop0p1", "block", "7:1", partition="1")
    fake.device("sys/devices/virtual/mem/null", "mem", "1:3")
    return fake


@pytest.mark.parametrize(("kind", "number"), [(stat.S_IFCHR, "241:0"), (stat.S_IFBLK, "259:0")])
def test_both_nodes_are_known_by_number_whatever_their_name(
    drive: FakeSysfs, kind: int, number: str
) -> None:
    nodes = find_nodes("/dev/misleading", stat_of(kind, number), drive.sysfs)
    assert nodes.generic == "ng0n1"
    assert nodes.generic_number == os.makedev(241, 0)


@pytest.mark.parametrize(
    ("kind", "number", "message"),
    [
        (
            stat.S_IFBLK,
            "259:5",
            "/dev/x is a partition of nvme0n1: give /dev/ng0n1, or read the partition as a file",
        ),
        (stat.S_IFBLK, "7:1", "/dev/x is a partition of loop0: read the partition as a file"),
        (
            stat.S_IFBLK,
            "7:0",
            "/dev/x is the block device loop0, not an NVMe namespace: read it as a file",
        ),
        (
            stat.S_IFCHR,
            "242:0",
            "/dev/x is the NVMe controller nvme0: give one of its namespaces, such as /dev/ng0n1",
        ),
        (
            stat.S_IFCHR,
            "1:3",
            "/dev/x is the character device null, not an NVMe namespace: give one, /dev/ngXnY",
        ),
        (
            stat.S_IFCHR,
            "5:77",
            "/dev/x is device 5:77, of which /sys knows nothing: mount /sys, or give a device that "
            "exists, or give geometry=",
        ),
    ],
)
def test_other_devices_are_named(drive: FakeSysfs, kind: int, number: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the whole message is compared)
        find_nodes("/dev/x", stat_of(kind, number), drive.sysfs)
    assert str(raised.value) == message


def test_block_and_character_numbers_are_not_mixed_up(drive: FakeSysfs) -> None:
    with pytest.raises(ValueError, match="of which /sys knows nothing"):
        find_nodes("/dev/x", stat_of(stat.S_IFBLK, "241:0"), drive.sysfs)


# Paths of this machine, without a geometry


def test_regular_file(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(ValueError, match=f"{file} is a regular file, not an NVMe namespace"):
        Namespace(file)


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} is a directory, not an NVMe namespace"):
        Namespace(os.fsencode(tmp_path))


def test_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo is a FIFO, not"):
        Namespace(tmp_path / "fifo")


def test_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(ValueError, match="socket is a socket, not"):
            Namespace(tmp_path / "socket")


def test_real_character_device_that_is_no_namespace(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    with pytest.raises(ValueError, match="link is the character device null"):
        Namespace(tmp_path / "link")


def test_missing_node() -> None:
    with pytest.raises(FileNotFoundError, match=r"nvme-generic.*container") as raised:
        Namespace("/dev/ng99n99")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, "/dev/ng99n99")


@pytest.mark.parametrize("path", [3, None, 1.5])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(TypeError):
        Namespace(path)


def test_refused_node_names_the_right_and_the_remedy() -> None:
    script = f"""
import os, sys
from gdsdirect.namespace import Geometry, Namespace
word = Geometry(1, 512, 8, 512)
Namespace("/dev/null", geometry=word).close()
if os.getuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
try:
    Namespace(sys.argv[1], geometry=word)
except PermissionError as error:
    assert error.filename == sys.argv[1]
    assert "read permission" in str(error) and "udev rule" in str(error), error
else:
    sys.exit("opened")
"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        node = Path(folder, "ng0n1")
        node.touch(mode=0)
        run_python(script, str(node))


def test_without_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdsdirect._uring_cmd", None)
    with pytest.raises(RingUnavailableError, match="liburing"):
        Namespace("/dev/null", geometry=GEOMETRY)


# A drive that answers: /dev/null, of which the tree of files says that it is ng0n1


class Drive:
    """What the drive and the kernel answer; a test changes it before it opens `path`."""

    path = "/dev/null"

    def __init__(self, fake: FakeSysfs) -> None:
        self.fake = fake
        self.controller = fake.controller(0, "0000:03:00.0")
        self.disk = fake.namespace(self.controller, "nvme0n1", "ng0n1", 0, generic_number="1:3")
        self.nsid = 3
        # Another format than the block device shows, so that each answer's origin is seen.
        self.namespace: bytes | OSError = identify_data(
            capacity=2048, flbas=0x10, formats={0: (8, 12)}, nlbaf=0
        )
        self.mdts = 1

    def ioctl(self, fd: int, request: int) -> int:
        assert os.fstat(fd).st_rdev == os.makedev(1, 3)
        assert request == 0x4E40
        return self.nsid

    def identify(self, fd: int, cns: int, nsid: int) -> bytes:
        assert os.fstat(fd).st_rdev == os.makedev(1, 3)
        if cns == 1:
            assert nsid == 0
            return bytes(77) + bytes([self.mdts]) + bytes(4018)
        assert (cns, nsid) == (0, self.nsid & 0xFFFFFFFF)
        if isinstance(self.namespace, OSError):
            raise self.namespace
        return self.namespace

    def attribute(self, name: str, text: str) -> None:
        self.fake.write(f"{self.disk}/{name}", text)


@pytest.fixture
def answering(fake: FakeSysfs, monkeypatch: pytest.MonkeyPatch) -> Drive:
    drive = Drive(fake)
    monkeypatch.setattr(fcntl, "ioctl", drive.ioctl)
    monkeypatch.setattr(ring_module(), "nvme_identify", drive.identify)
    monkeypatch.setattr(namespace_module, "Sysfs", lambda: fake.sysfs)
    return drive


def test_facts_are_the_drives_word(answering: Drive) -> None:
    with Namespace(answering.path) as namespace:
        assert namespace.geometry == Geometry(3, 4096, 2048, 512 << 10, 8)
        assert namespace.extended is True
        assert namespace.path == "/dev/null"
        assert namespace.pci_address == "0000:03:00.0"
        assert namespace.model == "QEMU NVMe Ctrl"
        assert namespace.serial == "data"


def test_a_namespace_id_above_2_to_the_31(answering: Drive) -> None:
    answering.nsid = 0xFFFFFFFE - (1 << 32)  # as ioctl() returns it: an int
    with Namespace(answering.path) as namespace:
        assert namespace.nsid == 0xFFFFFFFE


def test_the_kernels_word_for_who_may_not_ask(answering: Drive) -> None:
    answering.namespace = PermissionError(errno.EACCES, "Permission denied")
    with Namespace(answering.path) as namespace:
        assert namespace.geometry == Geometry(3, 512, 131072, 512 << 10, 0)
        assert namespace.extended is None


def test_nobodys_word(answering: Drive) -> None:
    answering.namespace = PermissionError(errno.EACCES, "Permission denied")
    answering.attribute("size", "0\n")
    with pytest.raises(ValueError, match=r"^/dev/null: .*nvme0n1.*CAP_SYS_ADMIN"):
        Namespace(answering.path)


def test_an_error_of_identify_names_the_path(answering: Drive) -> None:
    answering.namespace = OSError(errno.ENODEV, "No such device")
    with pytest.raises(OSError, match="No such device: '/dev/null'") as raised:
        Namespace(answering.path)
    assert raised.value.errno == errno.ENODEV


@pytest.mark.parametrize(
    ("kilobytes", "expected"),
    [
        ("128", 128 << 10),
        ("127", 124 << 10),  # whole blocks of 4096
        ("4194304", 65536 * 4096),  # what the 16 bits of NLB can say
        ("0", 8192),  # then the drive's MDTS: 2 pages
        ("", 8192),
    ],
)
def test_max_transfer(answering: Drive, kilobytes: str, expected: int) -> None:
    answering.attribute("queue/max_hw_sectors_kb", kilobytes)
    with Namespace(answering.path) as namespace:
        assert namespace.max_transfer == expected


def test_over_fabrics_there_is_no_pci_address(answering: Drive) -> None:
    answering.fake.write(f"{answering.controller}/transport", "tcp\n")
    answering.fake.write(f"{answering.controller}/address", "traddr=10.0.0.1,trsvcid=4420\n")
    with Namespace(answering.path) as namespace:
        assert namespace.pci_address is None
        assert namespace.serial == "data"


@pytest.fixture
def by_id(answering: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A link to the drive's block device, whose node stands in a folder with its generic one."""
    (tmp_path / "dev/by-id").mkdir(parents=True)
    (tmp_path / "dev/nvme0n1").touch()
    (tmp_path / "dev/ng0n1").symlink_to(answering.path)
    link = tmp_path / "dev/by-id/nvme-data"
    link.symlink_to("../nvme0n1")

    real_stat = os.stat

    def block_stat(path: Any, **options: Any) -> os.stat_result:
        return stat_of(stat.S_IFBLK, "259:0") if path == str(link) else real_stat(path, **options)

    monkeypatch.setattr(os, "stat", block_stat)
    return link


def test_block_device_is_resolved_to_the_node_beside_it(by_id: Path) -> None:
    with Namespace(by_id) as namespace:
        assert namespace.path == str(by_id.parent.parent / "ng0n1")
        assert namespace.capacity == 2048


def test_stale_generic_node(by_id: Path) -> None:
    generic = by_id.parent.parent / "ng0n1"
    generic.unlink()
    generic.symlink_to("/dev/zero")
    with pytest.raises(OSError, match="stale or was replaced") as raised:
        Namespace(by_id)
    assert (raised.value.errno, raised.value.filename) == (errno.ENODEV, str(generic))


def test_generic_node_that_was_not_passed_into_the_container(by_id: Path) -> None:
    generic = by_id.parent.parent / "ng0n1"
    generic.unlink()
    with pytest.raises(FileNotFoundError, match="container") as raised:
        Namespace(by_id)
    assert raised.value.filename == str(generic)


def test_kernel_without_generic_devices(answering: Drive, by_id: Path) -> None:
    shutil.rmtree(answering.fake.root / answering.controller / "ng0n1")
    with pytest.raises(OSError, match=r"Linux 5\.19") as raised:
        Namespace(by_id)
    assert (raised.value.errno, raised.value.filename) == (errno.EOPNOTSUPP, str(by_id))


def test_no_descriptor_is_left_by_a_drive_that_does_not_answer(answering: Drive) -> None:
    before = os.listdir("/proc/self/fd")
    answering.namespace = OSError(errno.ENODEV, "No such device")
    with pytest.raises(OSError, match="No such device"):
        Namespace(answering.path)
    assert os.listdir("/proc/self/fd") == before


# An open namespace: /dev/null and the caller's word


def test_facts_are_the_callers_word() -> None:
    with Namespace("/dev/null", geometry=GEOMETRY) as namespace:
        assert namespace.path == "/dev/null"
        assert namespace.geometry is GEOMETRY
        assert namespace.nsid == 3
        assert namespace.lba_size == 4096
        assert namespace.capacity == 1000
        assert namespace.max_transfer == 128 << 10
        assert namespace.metadata_size == 8
        assert namespace.extended is None
        assert (namespace.pci_address, namespace.model, namespace.serial) == (None, None, None)


def test_descriptor_is_open_for_reading_and_not_inherited() -> None:
    with Namespace(Path("/dev/null"), geometry=GEOMETRY) as namespace:
        fd = namespace.fileno()
        assert os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")


def test_close() -> None:
    namespace = Namespace("/dev/null", geometry=GEOMETRY)
    fd = namespace.fileno()
    assert not namespace.closed
    namespace.close()
    namespace.close()
    assert namespace.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(ValueError, match="/dev/null is closed"):
        namespace.fileno()
    with pytest.raises(ValueError, match="/dev/null is closed"):
        namespace.__enter__()
    assert (namespace.nsid, namespace.path) == (3, "/dev/null")


def test_with_closes_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), Namespace("/dev/null", geometry=GEOMETRY) as namespace:
        raise ZeroDivisionError
    assert namespace.closed


def test_repr() -> None:
    with Namespace("/dev/null", geometry=GEOMETRY) as namespace:
        assert repr(namespace) == "<Namespace '/dev/null', nsid 3, 1000 blocks of 4096 bytes>"
    assert repr(namespace).endswith(" bytes, closed>")


def test_collected_unclosed_warns_and_closes() -> None:
    namespace = Namespace("/dev/null", geometry=GEOMETRY)
    fd = namespace.fileno()
    with pytest.warns(ResourceWarning, match="unclosed <Namespace '/dev/null'"):  # noqa: PT031
        del namespace
        gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_collected_closed_or_never_opened_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Namespace("/dev/null", geometry=GEOMETRY).close()
        with pytest.raises(FileNotFoundError):
            Namespace("/dev/missing", geometry=GEOMETRY)
        gc.collect()


def test_no_descriptor_is_left_by_what_failed() -> None:
    before = os.listdir("/proc/self/fd")
    wrong: Any = 1.0
    with pytest.raises(TypeError):
        Namespace("/dev/null", geometry=Geometry(wrong, 512, 8, 512))
    assert os.listdir("/proc/self/fd") == before
