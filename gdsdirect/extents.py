"""Extents: a file's blocks on an NVMe namespace, held still while they are read.

That goes past the file system; what makes it safe is said at `Extents.hold`. What can't be known to
be safe is refused, and the file is then read as a file.
"""

from __future__ import annotations

import bisect
import os
import signal
import struct
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from gdsdirect._nvme_sqe import _locate
from gdsdirect.errors import ring_module
from gdsdirect.fiemap import LAST, MERGED, SHARED, Extent, flag_names, map_extents
from gdsdirect.namespace import Namespace
from gdsdirect.plan import Plan, Range
from gdsdirect.sysfs import Sysfs

if TYPE_CHECKING:
    from gdsdirect._uring_cmd import Source

_FILE_SYSTEMS = ("ext4", "xfs")
_SECTOR = 512  # the unit of `start` in sysfs, whatever the drive's block size
_READ_AS_ANY = LAST | MERGED | SHARED

_FSGETXATTR = 0x801C581F  # FS_IOC_FSGETXATTR, linux/fs.h
_FSXATTR = struct.Struct("=I24x")  # fsx_xflags of struct fsxattr
_REALTIME = 0x00000001  # FS_XFLAG_REALTIME: on another device than the file system's own


class RefusedError(Exception):
    """Why a file can't be read by its extents, now or at all."""


class Extents:
    """A file and the namespace that it lies on; RefusedError for what is never safe to read so."""

    def __init__(self, source: Source) -> None:
        self._source = source
        source.using(_require_blocks_of_its_own)
        path, self._start = _namespace_below(source.using(os.fstat).st_dev, Sysfs())
        try:
            self.namespace = Namespace(path)
        except (OSError, ValueError) as error:
            raise RefusedError(f"{path} can't be opened: {error}") from None
        if self.namespace.metadata_size or self._start % self.namespace.lba_size:
            self.namespace.close()
            raise RefusedError(f"{path} has metadata, or blocks that the partition cuts")

    def close(self) -> None:
        """Close the namespace; reads in flight are not disturbed."""
        self.namespace.close()

    def hold(self, first: int, end: int) -> Held:
        """The blocks of the bytes from `first` to `end`, which stay the file's until `release`.

        A read lease (fcntl(2), F_SETLEASE) is granted only where nobody has the file open for
        writing, and who wants to must wait: no write, truncation, hole or defragmentation can be
        under way. Then what the page cache has is written. What needs no open file (deduplication
        on XFS), or a writer that the kernel lets in when it has waited lease-break-time, moves
        extents or changes times: `Held.moved` looks for both.
        """
        return Held(self._source, self._start, first, end)


class Held:
    """Blocks that are held still; to be released."""

    def __init__(self, source: Source, start: int, first: int, end: int) -> None:
        # An open file of its own: a forked child may give up its parent's leases.
        self._fd = source.using(_open_again)
        self._range = first, end
        try:
            self._lease()
            _require_blocks_of_its_own(self._fd)
            self._state = self._look()
            self._extents = self._map(sync=True)
        except BaseException:
            os.close(self._fd)
            raise
        self._starts = [extent.logical for extent in self._extents]
        self._start = start

    def _lease(self) -> None:
        import fcntl

        # To who waits for us to end nothing is to be said: the default, SIGIO, would kill.
        fcntl.fcntl(self._fd, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except BlockingIOError:
            raise RefusedError("it is open for writing") from None
        except PermissionError:
            raise RefusedError(
                "only its owner, or who has CAP_LEASE, may keep others from changing it"
            ) from None
        except OSError as error:
            raise RefusedError(f"nobody can be kept from changing it ({error.strerror})") from None

    def _look(self) -> tuple[int, int, int]:
        info = os.fstat(self._fd)
        return info.st_size, info.st_mtime_ns, info.st_ctime_ns

    def _map(self, *, sync: bool) -> list[Extent]:
        first, end = self._range
        try:
            return map_extents(self._fd, first, end - first, sync=sync)
        except OSError as error:
            raise RefusedError(f"its extents are not told ({error.strerror})") from None

    def on_the_device(self, ranges: Iterable[Range]) -> list[Range]:
        """The same bytes by their place on the namespace, in as many pieces as it takes."""
        return [piece for whole in ranges for piece in self._pieces(whole)]

    def _pieces(self, whole: Range) -> Iterable[Range]:
        offset, left, target = whole
        index = bisect.bisect_right(self._starts, offset) - 1
        while left > 0:
            if not 0 <= index < len(self._extents):
                raise RefusedError("it has a hole")
            extent = self._extents[index]
            into = offset - extent.logical
            if not 0 <= into < extent.length:
                raise RefusedError("it has a hole")
            self._require_plain(extent)
            size = min(left, extent.length - into)
            yield Range(self._start + extent.physical + into, size, target)
            offset, left, target, index = offset + size, left - size, target + size, index + 1

    @staticmethod
    def _require_plain(extent: Extent) -> None:
        if extent.flags & ~_READ_AS_ANY:
            words = ", ".join(flag_names(extent.flags & ~_READ_AS_ANY)) or f"{extent.flags:#x}"
            raise RefusedError(f"it has extents that are {words}")

    def located(self, plan: Plan) -> Plan | None:
        """The plan by places on the namespace; None if a read isn't inside one extent."""
        table = array("Q")
        for extent in self._extents:
            self._require_plain(extent)
            table.extend((extent.logical, self._start + extent.physical, extent.length))
        places = _locate(table, plan.offsets, plan.sizes)
        return None if places is None else Plan(array("Q", places), plan.sizes, plan.targets)

    def moved(self) -> bool:
        """Whether the bytes that were read meanwhile may have been others'."""
        return self._look() != self._state or self._map(sync=False) != self._extents

    def release(self) -> None:
        """Let others change the file."""
        import fcntl

        fd, self._fd = self._fd, -1
        if fd >= 0:
            # Not by closing alone: a child that was forked meanwhile has the open file too.
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _open_again(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _namespace_below(number: int, sysfs: Sysfs) -> tuple[str, int]:
    """The generic device of the namespace that a file system's device is, and the byte on it where
    the device begins."""
    name = f"{os.major(number)}:{os.minor(number)}"
    kinds = {mount.kind for mount in sysfs.mounts() if mount.number == name}
    if not kinds or not kinds <= set(_FILE_SYSTEMS):
        known = " and ".join(sorted(kinds)) or "of a kind that is not told"
        raise RefusedError(f"its file system is {known}: only ext4 and XFS are known well enough")
    device = sysfs.device("block", number)
    if device is None:
        raise RefusedError(f"/sys knows nothing of its device, {name}")
    start = 0
    if sysfs.read(device.directory, "partition") is not None:
        start = (sysfs.read_int(device.directory, "start") or 0) * _SECTOR
        device = sysfs.device_at(device.parent) or device
    nodes = sysfs.nvme_namespace(device)
    if nodes is None or nodes.generic is None:
        raise RefusedError(f"its device, {device.name}, is no NVMe namespace or partition of one")
    return f"/dev/{nodes.generic}", start


def _require_blocks_of_its_own(fd: int) -> None:
    """Not those of a journal, of a cipher, of an inode or of a second device.

    Linux says with STATX_DIOALIGN (0, 0), for ext4, of files with data=journal, whose newest bytes
    may be in the journal alone, of encrypted, inline and verified ones.
    """
    import fcntl  # not on every system

    told = ring_module().direct_alignment(fd)
    if told is None or told == (0, 0):
        raise RefusedError("the kernel doesn't say that it reads the file directly (Linux 6.1)")
    request = bytearray(_FSXATTR.size)
    try:
        fcntl.ioctl(fd, _FSGETXATTR, request)
    except OSError as error:
        raise RefusedError(f"its attributes are not told ({error.strerror})") from None
    if _FSXATTR.unpack(request)[0] & _REALTIME:
        raise RefusedError("it is on the realtime device of its file system")
