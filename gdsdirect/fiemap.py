"""Where the bytes of a file are on its device: FS_IOC_FIEMAP (linux/fiemap.h)."""

from __future__ import annotations

import struct
from typing import NamedTuple

WHOLE = (1 << 64) - 1  # bytes: to the end of any file

_FIEMAP = 0xC020660B  # FS_IOC_FIEMAP
_HEADER = struct.Struct("=QQIIII")  # start, length, flags, mapped, count, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_SYNC = 1  # FIEMAP_FLAG_SYNC: what is only in the page cache is written first
_A_TIME = 256  # extents

LAST, MERGED, SHARED = 0x0001, 0x1000, 0x2000
"""Flags of extents that are read as any other: the last, of blocks that the file system joins for
the answer, and shared with other files."""

_NAMES = {
    0x0002: "unknown",
    0x0004: "delayed",
    0x0008: "encoded",
    0x0080: "encrypted",
    0x0100: "not aligned",
    0x0200: "inline",
    0x0400: "tail",
    0x0800: "unwritten",
    SHARED: "shared",
}


class Extent(NamedTuple):
    """Bytes of a file that lie one after the other: where in it, and where on the device."""

    logical: int
    physical: int
    length: int
    flags: int


def flag_names(flags: int) -> list[str]:
    """The flags that say something about an extent's bytes, in words."""
    return [name for bit, name in _NAMES.items() if flags & bit]


def map_extents(
    fd: int, start: int, length: int, *, sync: bool = False, most: int | None = None
) -> list[Extent]:
    """The extents of a range of a file, in order; those at both ends reach beyond it.

    With `sync` its data is written to the device first. OSError where the file system doesn't tell.
    """
    import fcntl  # not on every system

    found: list[Extent] = []
    end = start + length
    request = bytearray(_HEADER.size + _A_TIME * _EXTENT.size)
    while start < end and (most is None or len(found) < most):
        _HEADER.pack_into(request, 0, start, end - start, _SYNC if sync else 0, 0, _A_TIME, 0)
        fcntl.ioctl(fd, _FIEMAP, request)
        count = _HEADER.unpack_from(request)[3]
        extents = memoryview(request)[_HEADER.size :][: count * _EXTENT.size]
        found += map(Extent._make, _EXTENT.iter_unpack(extents))
        if count < _A_TIME or found[-1].flags & LAST:
            break
        start = found[-1].logical + found[-1].length
    return found[:most]
