"""Origin: what a path is open as, and which ways lead from it into a buffer."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from gdsdirect.errors import ring_module
from gdsdirect.extents import Extents, RefusedError
from gdsdirect.fiemap import WHOLE, flag_names, map_extents
from gdsdirect.memory import MemoryKind
from gdsdirect.namespace import Namespace
from gdsdirect.plan import SLOT
from gdsdirect.shared_ring import SharedRing
from gdsdirect.stream import DataPath

if TYPE_CHECKING:
    from gdsdirect._uring_cmd import Source

BEST_FIRST = (
    DataPath.NVME_PASSTHROUGH,
    DataPath.FILE_FIXED,
    DataPath.FILE_DIRECT,
    DataPath.CUFILE,
    DataPath.BUFFERED,
)

_ALIGNMENT = 4096  # bytes; what O_DIRECT wants of offset, size and address at the most
DWORD = 4  # bytes; what NVMe wants of an address (PRP entries, Base Specification 2.0, 4.1.1)


class ShortWay(NamedTuple):
    """What one read of whole blocks, in their place, is held to, and what is told of it."""

    source: Source
    alignment: int
    memory_alignment: int
    fixed: bool
    path: DataPath
    why: str | None


class Origin:
    """A namespace, block device or file, open for reading.

    `source` is what the ring reads from. `alignment` is what direct reads want of offsets and
    sizes, `memory_alignment` of addresses, in bytes. `undirected` says why there is no direct way
    of reading it as a file, or is None. `extents` is there if it was asked for and passthrough may
    read them; if not, `unmapped` says why.
    """

    def __init__(
        self, path: str, *, direct: bool, extents: bool = False, opened: Source | None = None
    ) -> None:
        """`opened` is the file, where it isn't to be looked up by its path again."""
        self.path = path
        self._opened = opened
        self.source: Source
        self.namespace: Namespace | None = None
        self.undirected: str | None = None
        self.extents: Extents | None = None
        self.unmapped: str | None = None
        self._buffered: Source | None = None
        mode = (os.stat(path) if opened is None else opened.using(os.fstat)).st_mode
        if stat.S_ISCHR(mode):
            self.namespace = Namespace(path)
            self.source = self.namespace._source
            self.alignment = self.namespace.lba_size
            self.memory_alignment = DWORD
            return
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ValueError(
                f"{path} is neither a file nor a device: give an NVMe namespace (/dev/ngXnY), "
                "a block device or a regular file"
            )
        self.alignment = self.memory_alignment = _ALIGNMENT
        self.source = self._open(direct)
        try:
            _ = self.size
        except OSError as error:
            self.close()
            text = f"{error.strerror}: a file without an end can't be read, such as those in /proc"
            raise OSError(error.errno, text, path) from None
        if extents:
            try:
                self.extents = self._map()
            except RefusedError as refused:
                self.unmapped = str(refused)

    # ---- Descriptors

    def _map(self) -> Extents:
        if self.undirected is not None:
            raise RefusedError(self.undirected)
        if not stat.S_ISREG(self.source.using(os.fstat).st_mode):
            raise RefusedError("a device has no extents")
        return Extents(self.source)

    def _open(self, direct: bool) -> Source:
        if not direct:
            self.undirected = "it was opened with direct=False"
            return self._open_with(self._opened, 0)
        try:
            source = self._open_with(self._opened, os.O_DIRECT)
        except OSError as error:
            self.undirected = f"its file system takes no O_DIRECT ({error.strerror})"
            return self._open_with(self._opened, 0)  # raises where more than that is in the way
        told = source.using(ring_module().direct_alignment)
        if told == (0, 0):
            self.undirected = "its file system reads this file without O_DIRECT only"
        elif not source.direct:
            self.undirected = (
                "its file system keeps files in memory, and copies in spite of O_DIRECT"
            )
        elif told is not None:
            self.memory_alignment, self.alignment = told[0], max(told)
        else:
            self.undirected = source.using(_copied_in_silence)
        if self.alignment > SLOT:
            self.undirected = f"direct reads of it are multiples of {self.alignment} bytes"
        if self.undirected is None:
            return source
        source.close()
        return self._open_with(self._opened, 0)

    def _open_with(self, opened: Source | None, flag: int) -> Source:
        """Open the path, or once more the file that is open."""
        source: Source
        if opened is None:
            source = ring_module().open_source(self.path, os.O_RDONLY | flag, self.path)
        else:
            source = opened.using(self._open_again, flag)
        return source

    def _open_again(self, fd: int, flag: int) -> Source:
        source: Source = ring_module().open_source(
            f"/proc/self/fd/{fd}", os.O_RDONLY | flag, self.path
        )
        return source

    @property
    def buffered(self) -> Source:
        """The file without O_DIRECT, opened anew when it is first asked for: the same file,
        whatever the path means by then."""
        if self.undirected is not None:
            return self.source
        if self._buffered is None:
            self._buffered = self._open_with(self.source, 0)
        return self._buffered

    def close(self) -> None:
        """Close what is open."""
        for each in (self.namespace, self.source, self._buffered, self.extents):
            if each is not None:
                each.close()

    @property
    def size(self) -> int:
        """Bytes that there are now."""
        if self.namespace is not None:
            return self.namespace.capacity * self.namespace.lba_size
        return self.source.size()

    # ---- Ways

    def short_way(self, ring: SharedRing) -> ShortWay | None:
        """The way of a read that needs no choice, as a Transfer would choose; or None."""
        if self.namespace is not None or self.extents is not None or self.unmapped is not None:
            return None
        if self.undirected is not None:
            return ShortWay(self.source, 1, 1, ring.registered, DataPath.BUFFERED, self.undirected)
        grain = self.alignment
        if ring.registered:
            return ShortWay(self.source, grain, grain, True, DataPath.FILE_FIXED, None)
        return ShortWay(
            self.source,
            grain,
            self.memory_alignment,
            False,
            DataPath.FILE_DIRECT,
            ring.unregistered,
        )

    def obstacle(self, way: DataPath, ring: SharedRing) -> str | None:
        """What stands in the way, into the memory of this ring; None: it is open."""
        if way is DataPath.CUFILE:
            return "cuFile reads into GPU memory, and this is memory of the host or of a BAR"
        if way is DataPath.NVME_PASSTHROUGH:
            if self.namespace is None and self.extents is None:
                return self.unmapped or (
                    "it is not an NVMe namespace (/dev/ngXnY), and wasn't opened with extents=True"
                )
        elif self.namespace is not None:
            return "a namespace's character device is read by passthrough only"
        if way in (DataPath.FILE_FIXED, DataPath.FILE_DIRECT) and self.undirected is not None:
            return self.undirected
        if way is DataPath.FILE_FIXED and not ring.registered:
            if ring.kind is MemoryKind.BAR1_PEER:
                return "the kernel can't register peer memory"
            return ring.unregistered
        return None


def _copied_in_silence(fd: int) -> str | None:
    """Why a file is copied although it was opened with O_DIRECT, or None.

    Where statx(2) doesn't tell: btrfs reads compressed and inline extents by its page cache.
    """
    try:
        flags = {flag for extent in map_extents(fd, 0, WHOLE) for flag in flag_names(extent.flags)}
    except OSError:  # devices and network file systems have no extents to tell of
        return None
    odd = sorted(flags & {"encoded", "encrypted", "inline", "tail"})
    return f"its file system copies what is {' or '.join(odd)}" if odd else None
