"""An NVMe namespace: which device it is, its geometry, and the bounds that reads must keep to."""

from __future__ import annotations

import errno
import os
import stat
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from gdsdirect.errors import call_error, ring_module
from gdsdirect.sysfs import Device, NvmeNamespaceNodes, Sysfs

if TYPE_CHECKING:
    from gdsdirect._uring_cmd import Source

_LARGEST_NSID = 0xFFFFFFFE  # FFFFFFFFh addresses all namespaces, Base Specification 2.0, 3.2.1
_LARGEST_METADATA = 0xFFFF  # LBA Format's MS field
_LARGEST_DATA_LEN = 0xFFFFFFFF  # data_len of struct nvme_uring_cmd
_LARGEST_BLOCKS = 1 << 16  # NLB in command dword 12 is 16 bits wide and zero-based
_SECTOR = 512  # the unit of a block device's `size` in sysfs, whatever its block size

_NVME_IOCTL_ID = 0x4E40  # _IO('N', 0x40), linux/nvme_ioctl.h: returns the namespace id

# Identify: Controller or Namespace Structure values (Base Specification 2.0, 5.17.1) and the field
# of Identify Controller that bounds a transfer (figure "Identify Controller Data Structure").
_CNS_NAMESPACE, _CNS_CONTROLLER = 0, 1
_MDTS_OFFSET = 77
_SMALLEST_PAGE = 4096  # MDTS counts in the controller's minimum page, at least this (CAP.MPSMIN)

_PAGE = 4096  # the smallest run that memory comes in

# Taken where the queue's own limit is not to be had: it fits every queue that Linux sets up,
# whatever pages the memory is in, because it needs only 33 of a queue's segments.
_SAFE_TRANSFER = 128 << 10

UDEV_RULE = 'SUBSYSTEM=="nvme-generic", GROUP="disk", MODE="0640"'


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a namespace.

    `nsid` is the namespace id, `lba_size` the bytes of one logical block, `capacity` the number of
    blocks, `max_transfer` the most bytes that one command may read (a multiple of `lba_size`) and
    `metadata_size` the bytes of metadata a block. ValueError for what no namespace can have.

    >>> Geometry(nsid=1, lba_size=512, capacity=1 << 21, max_transfer=128 << 10)
    Geometry(nsid=1, lba_size=512, capacity=2097152, max_transfer=131072, metadata_size=0)
    """

    nsid: int
    lba_size: int
    capacity: int
    max_transfer: int
    metadata_size: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.nsid <= _LARGEST_NSID:
            raise ValueError(
                f"nsid is {self.nsid}: give the namespace's own id, 1..{_LARGEST_NSID:#x}"
            )
        if self.lba_size < 512 or self.lba_size & (self.lba_size - 1):
            raise ValueError(
                f"lba_size is {self.lba_size}: give the bytes of one logical block, a power of two "
                "from 512 up"
            )
        if not 1 <= self.capacity < 1 << 64:
            raise ValueError(
                f"capacity is {self.capacity}: give the namespace's size in blocks, 1..2**64 - 1"
            )
        if not self.lba_size <= self.max_transfer <= _LARGEST_DATA_LEN:
            raise ValueError(
                f"max_transfer is {self.max_transfer}: give the most bytes a command may read, "
                f"from one block ({self.lba_size}) to {_LARGEST_DATA_LEN}"
            )
        if self.max_transfer % self.lba_size:
            raise ValueError(
                f"max_transfer is {self.max_transfer}: give a multiple of lba_size, such as "
                f"{self.max_transfer - self.max_transfer % self.lba_size}"
            )
        if not 0 <= self.metadata_size <= _LARGEST_METADATA:
            raise ValueError(
                f"metadata_size is {self.metadata_size}: give the bytes of metadata a block, "
                f"0..{_LARGEST_METADATA}"
            )


class BlockFormat(NamedTuple):
    """How a namespace is formatted.

    `lba_size` and `metadata_size` are bytes a block, `capacity` is the number of blocks.
    `extended` tells whether a block's metadata is transferred behind its data instead of apart from
    it; None where the drive could not be asked.
    """

    lba_size: int
    capacity: int
    metadata_size: int
    extended: bool | None


def parse_identify_namespace(data: bytes) -> BlockFormat:
    """The format in force, from an Identify Namespace data structure (4096 bytes).

    NVM Command Set Specification 1.0, figure "Identify Namespace Data Structure, NVM Command Set":
    NSZE u64 at 0, NLBAF u8 at 25, FLBAS u8 at 26, LBA Formats of 4 bytes each from 128 on (MS u16,
    LBADS u8: a power of two). ValueError for a namespace that is not active or not formatted, whose
    fields are 0.
    """
    (capacity,) = struct.unpack_from("<Q", data, 0)
    nlbaf, flbas = data[25], data[26]
    index = flbas & 0x0F
    if nlbaf > 15:  # only then do FLBAS bits 6:5 extend the index, to one of 64 formats
        index |= (flbas & 0x60) >> 1
    metadata_size, lba_shift = struct.unpack_from("<HB", data, 128 + 4 * index)
    if capacity == 0 or lba_shift < 9:
        raise ValueError(
            f"the drive reports {capacity} blocks of 2**{lba_shift} bytes: the namespace is not "
            "active or not formatted; attach or format it first"
        )
    return BlockFormat(1 << lba_shift, capacity, metadata_size, bool(flbas & 0x10))


def read_block_format(sysfs: Sysfs, disk: str) -> BlockFormat:
    """The format in force, as the kernel shows it in `disk`, the block device's sysfs directory.

    For users who may not ask the drive (kernels before 6.2 want CAP_SYS_ADMIN). ValueError where
    the kernel does not tell, as for most namespaces with metadata.
    """
    lba_size = sysfs.read_int(disk, "queue/logical_block_size")
    sectors = sysfs.read_int(disk, "size")
    metadata_size = sysfs.read_int(disk, "metadata_bytes")
    if metadata_size is None and sysfs.read(disk, "integrity/format") == "none":
        # Before Linux 6.8 there is no metadata_bytes. A block device that has blocks and no
        # integrity profile ("none", block/blk-integrity.c) has no metadata.
        metadata_size = 0
    if not lba_size or not sectors or metadata_size is None:
        raise ValueError(
            "the kernel does not show the block size, capacity and metadata size of "
            f"{os.path.basename(disk)}, and this user may not ask the drive: run with "
            "CAP_SYS_ADMIN or on Linux 6.8 or newer, or give geometry="
        )
    return BlockFormat(lba_size, sectors * _SECTOR // lba_size, metadata_size, None)


def parse_max_transfer(data: bytes) -> int:
    """The most bytes a command may transfer, from an Identify Controller data structure.

    MDTS is a power of two in units of the smallest page, 0 for no limit. The kernel's own limits
    are not known from here, so 128 KiB, which every queue takes, is never exceeded.
    """
    mdts = data[_MDTS_OFFSET]
    return min(_SMALLEST_PAGE << mdts, _SAFE_TRANSFER) if mdts else _SAFE_TRANSFER


def find_nodes(path: str, info: os.stat_result, sysfs: Sysfs) -> NvmeNamespaceNodes:
    """The namespace that the node `path`, whose stat is `info`, stands for.

    Known by its device number, never by its name. ValueError for everything that is not an NVMe
    namespace, with what it is and what to give instead.
    """
    if stat.S_ISCHR(info.st_mode):
        device = sysfs.device("char", info.st_rdev)
    elif stat.S_ISBLK(info.st_mode):
        device = sysfs.device("block", info.st_rdev)
    else:
        raise ValueError(
            f"{path} is a {_file_kind(info.st_mode)}, not an NVMe namespace: give a namespace's "
            "device, such as /dev/ng0n1"
        )
    if device is None:
        raise ValueError(
            f"{path} is device {os.major(info.st_rdev)}:{os.minor(info.st_rdev)}, of which /sys "
            "knows nothing: mount /sys, or give a device that exists, or give geometry="
        )
    nodes = sysfs.nvme_namespace(device)
    if nodes is None:
        raise ValueError(f"{path} is {_device_kind(device, sysfs)}")
    return nodes


def _file_kind(mode: int) -> str:
    for is_kind, name in (
        (stat.S_ISREG, "regular file"),
        (stat.S_ISDIR, "directory"),
        (stat.S_ISFIFO, "FIFO"),
    ):
        if is_kind(mode):
            return name
    return "socket"


def _device_kind(device: Device, sysfs: Sysfs) -> str:
    if device.subsystem == "nvme":
        names = sysfs.nvme_generic_names(device)
        example = f"/dev/{names[0]}" if names else "/dev/ng0n1"
        return f"the NVMe controller {device.name}: give one of its namespaces, such as {example}"
    if device.subsystem != "block":
        return f"the character device {device.name}, not an NVMe namespace: give one, /dev/ngXnY"
    if sysfs.read(device.directory, "partition") is None:
        return f"the block device {device.name}, not an NVMe namespace: read it as a file"
    disk = sysfs.device_at(device.parent)
    nodes = disk and sysfs.nvme_namespace(disk)
    give = f"give /dev/{nodes.generic}, or " if nodes and nodes.generic else ""
    return f"a partition of {os.path.basename(device.parent)}: {give}read the partition as a file"


class Namespace:
    """An NVMe namespace, open for reading.

    `path` is its generic character device `/dev/ngXnY`, its block device `/dev/nvmeXnY`, or a link
    to either, such as one in /dev/disk/by-id. It is known by its device number, and what it is like
    is asked of the drive, or of the kernel where this user may not ask the drive.

    With `geometry`, the caller's word is taken instead: `path` is opened as it is and nothing is
    asked. For `/dev/null` in tests and benchmarks, and drives that cannot be asked.

    ValueError for what is not an NVMe namespace, OSError (FileNotFoundError, PermissionError, ...)
    for one that cannot be opened or asked, RingUnavailableError where gdsdirect has no io_uring
    part. What it tells stays readable after `close()`.

    >>> word = Geometry(nsid=1, lba_size=512, capacity=1 << 21, max_transfer=128 << 10)
    >>> with Namespace("/dev/null", geometry=word) as namespace:
    ...     print(namespace)
    <Namespace '/dev/null', nsid 1, 2097152 blocks of 512 bytes>
    """

    # The ring reads `_source` by this name (csrc/submit.c).
    __slots__ = (
        "__weakref__",
        "_extended",
        "_geometry",
        "_model",
        "_path",
        "_pci_address",
        "_safe_transfer",
        "_serial",
        "_source",
    )

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        *,
        geometry: Geometry | None = None,
    ) -> None:
        ring = ring_module()
        self._path = os.fsdecode(path)
        self._pci_address: str | None = None
        self._model: str | None = None
        self._serial: str | None = None
        self._extended: bool | None = None
        limit = _SAFE_TRANSFER

        # It has the descriptor from its opening on: no exception can come between.
        if geometry is None:
            source, geometry, limit = self._open_and_ask(ring)
        else:
            source = _open(ring, self._path)
        self._geometry = geometry
        self._safe_transfer = max(
            min(geometry.max_transfer, limit - limit % geometry.lba_size), geometry.lba_size
        )
        source.bind(
            nsid=geometry.nsid,
            lba_size=geometry.lba_size,
            capacity=geometry.capacity,
            max_transfer=geometry.max_transfer,
            safe_transfer=self._safe_transfer,
            metadata_size=geometry.metadata_size,
        )
        self._source = source

    def _open_and_ask(self, ring: ModuleType) -> tuple[Source, Geometry, int]:
        sysfs = Sysfs()
        self._path, number, nodes = _find_generic(self._path, sysfs)
        source = _open(ring, self._path)
        try:
            source.using(_require_device, self._path, number)
            geometry, self._extended = source.using(_ask, self._path, nodes, sysfs, ring)
        except BaseException:
            source.close()
            raise
        self._identify(nodes, sysfs)
        segments = sysfs.read_int(nodes.disk, "queue/max_segments") if nodes.disk else None
        # One segment less than there are: memory that doesn't start with a page spans one more.
        return source, geometry, (segments - 1) * _PAGE if segments else _SAFE_TRANSFER

    def _identify(self, nodes: NvmeNamespaceNodes, sysfs: Sysfs) -> None:
        for controller in nodes.controllers[:1]:
            self._model = sysfs.read(controller, "model")
            self._serial = sysfs.read(controller, "serial")
            # Over fabrics, `address` is where the target is ("traddr=...").
            if sysfs.read(controller, "transport") == "pcie":
                self._pci_address = sysfs.read(controller, "address")

    @property
    def path(self) -> str:
        """The device node that is open: `/dev/ngXnY`, or what was given with a geometry."""
        return self._path

    @property
    def geometry(self) -> Geometry:
        """All sizes at once."""
        return self._geometry

    @property
    def nsid(self) -> int:
        """The namespace id that commands carry (the number in the device's name is another)."""
        return self._geometry.nsid

    @property
    def lba_size(self) -> int:
        """Bytes of one logical block, metadata not counted."""
        return self._geometry.lba_size

    @property
    def capacity(self) -> int:
        """Size in blocks: LBAs run from 0 to `capacity` - 1."""
        return self._geometry.capacity

    @property
    def metadata_size(self) -> int:
        """Bytes of metadata that go with each block."""
        return self._geometry.metadata_size

    @property
    def max_transfer(self) -> int:
        """The most bytes that one command may read, a multiple of `lba_size`.

        Scattered memory can take less: see `safe_transfer`.
        """
        return self._geometry.max_transfer

    @property
    def safe_transfer(self) -> int:
        """The most bytes that one command may read whatever pages its memory is in.

        The kernel also bounds the runs of pages in a command (`queue/max_segments` in sysfs, about
        127): with single pages of 4096 bytes, longer commands fail with EINVAL. Where the device
        was not asked, 128 KiB at most.
        """
        return self._safe_transfer

    @property
    def extended(self) -> bool | None:
        """Whether metadata is transferred behind each block's data; None where nobody could ask."""
        return self._extended

    @property
    def pci_address(self) -> str | None:
        """The drive's PCI address ("0000:03:00.0"); None over fabrics and with a geometry.

        Of a multipath namespace, the address of its first controller, as for `model` and `serial`.
        """
        return self._pci_address

    @property
    def model(self) -> str | None:
        """The drive's model; None where the kernel does not tell and with a geometry."""
        return self._model

    @property
    def serial(self) -> str | None:
        """The drive's serial number; None where the kernel does not tell and with a geometry."""
        return self._serial

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return bool(self._source.closed)

    def fileno(self) -> int:
        """The open file descriptor, still owned by this object; ValueError once closed."""
        if self.closed:
            raise ValueError(f"the namespace {self._path} is closed")
        return int(self._source.fileno())

    def close(self) -> None:
        """Close the device, once no command in flight uses it. More than once is harmless."""
        self._source.close()

    def __enter__(self) -> Namespace:
        if self.closed:
            raise ValueError(f"the namespace {self._path} is closed")
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        # `warn` is bound here: at the interpreter's end the module may be gone before this is.
        if not hasattr(self, "_source") or self.closed:  # never opened, or closed as it should be
            return
        try:
            warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        finally:
            self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self.closed else ""
        sizes = f"nsid {self.nsid}, {self.capacity} blocks of {self.lba_size} bytes"
        return f"<Namespace {self._path!r}, {sizes}{closed}>"


def _find_generic(path: str, sysfs: Sysfs) -> tuple[str, int | None, NvmeNamespaceNodes]:
    """Path and device number of the generic character device to open for `path`, and its nodes."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise _access_error(error, path) from None
    nodes = find_nodes(path, info, sysfs)
    node = os.path.realpath(path)
    if stat.S_ISCHR(info.st_mode):
        return node, info.st_rdev, nodes
    if nodes.generic is None:
        raise OSError(
            errno.EOPNOTSUPP,
            "the kernel has no generic character device for this namespace: NVMe passthrough over "
            "io_uring needs Linux 5.19 or newer; read it as a file",
            path,
        )
    return os.path.join(os.path.dirname(node), nodes.generic), nodes.generic_number, nodes


def _open(ring: ModuleType, path: str) -> Source:
    try:
        source: Source = ring.open_source(path, os.O_RDONLY, path)
        return source
    except OSError as error:
        raise _access_error(error, path) from None


def _access_error(error: OSError, path: str) -> OSError:
    """`error` again, with what is missing and how to get it."""
    if isinstance(error, FileNotFoundError):
        remedy = (
            "see /sys/class/nvme-generic for the namespaces of this host; in a container, pass the "
            "device in (--device)"
        )
    elif isinstance(error, PermissionError):
        remedy = (
            f"reading it needs read permission on the node{_whose(path)}: run `ls -lL {path}`, "
            "join the group that it shows, or give the node one by a udev rule "
            f"({UDEV_RULE}); in a container, pass the device in with read access"
        )
    else:
        return call_error(error.errno or 0, "open", path)
    return OSError(error.errno, f"{error.strerror}: {remedy}", path)


def _whose(path: str) -> str:
    try:
        info = os.stat(path)
    except OSError:  # a folder on the way there is closed too
        return ""
    return f" (mode {stat.S_IMODE(info.st_mode):04o}, of uid {info.st_uid} and gid {info.st_gid})"


def _require_device(fd: int, path: str, number: int | None) -> None:
    if os.fstat(fd).st_rdev != number:
        raise OSError(
            errno.ENODEV,
            "the node is not the device that /sys tells of: it is stale or was replaced while it "
            "was opened; make it anew, or open it again",
            path,
        )


def _ask(
    fd: int, path: str, nodes: NvmeNamespaceNodes, sysfs: Sysfs, ring: ModuleType
) -> tuple[Geometry, bool | None]:
    """The geometry of the namespace open as `fd`, and whether its blocks are extended."""
    import fcntl  # not at import time: gdsdirect imports on systems that have none

    try:
        nsid = fcntl.ioctl(fd, _NVME_IOCTL_ID) & 0xFFFFFFFF  # a u32 that comes back as an int
        try:
            form = parse_identify_namespace(ring.nvme_identify(fd, _CNS_NAMESPACE, nsid))
        except PermissionError:
            if nodes.disk is None:
                raise
            form = read_block_format(sysfs, nodes.disk)
        kilobytes = sysfs.read_int(nodes.disk, "queue/max_hw_sectors_kb") if nodes.disk else None
        if kilobytes:
            limit = kilobytes << 10
        else:
            limit = parse_max_transfer(ring.nvme_identify(fd, _CNS_CONTROLLER, 0))
    except OSError as error:
        error.filename = path
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    limit = min(limit, _LARGEST_BLOCKS * form.lba_size, _LARGEST_DATA_LEN)
    geometry = Geometry(
        nsid=nsid,
        lba_size=form.lba_size,
        capacity=form.capacity,
        max_transfer=limit - limit % form.lba_size,
        metadata_size=form.metadata_size,
    )
    return geometry, form.extended
