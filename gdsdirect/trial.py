"""A small read actually done one way, into the kind of memory it leads to, and compared.

The bytes read plainly come first and again after, so that a device that changes meanwhile is not
taken for a way that lies; and the buffer is filled with other bytes before, so that a read which
writes nothing is not taken for one that does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from typing import Any

from gdsdirect.file import File
from gdsdirect.host import opened
from gdsdirect.memory import GpuMappedBuffer
from gdsdirect.stream import DataPath

_MOST = 16 << 10  # bytes of a trial: some pages, and little enough to be done while others work
_TIMES = 3  # that a trial is repeated where the bytes change under it
_PATIENCE = 10.0  # seconds for a read that should take a millisecond


def try_read(
    way: DataPath, path: str, plain_path: str | None, allocate: str | None
) -> dict[str, Any]:
    """The fields of a `Trial`: a read of the first bytes of `path` by `way`.

    `path` is a namespace for NVME_PASSTHROUGH. `plain_path` is what has the same bytes for a plain
    read (a namespace's block device), or None, when a second passthrough read into host memory
    takes its place. `allocate` is the file that maps to peer memory, None for host memory. Every
    error is an answer.
    """
    try:
        for _ in range(_TIMES):
            before, compared_with = _plainly(path, plain_path)
            if not before:
                return {"ok": False, "error": f"{path} is empty, so that nothing can be compared"}
            read = _by(way, path, len(before), allocate, _inverted(before))
            if read == before:
                return {"ok": True, "nbytes": len(read), "compared_with": compared_with}
            after, _ = _plainly(path, plain_path)
            if after == before:
                break
        text = f"its bytes are not those of {compared_with}"
        return {"ok": False, "nbytes": len(read), "compared_with": compared_with, "error": text}
    except OSError as error:
        return {"ok": False, "error": error.strerror or str(error)}
    except (ValueError, RuntimeError, MemoryError) as error:
        return {"ok": False, "error": str(error)}


def _inverted(data: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in data)


# ---- Plainly


def _plainly(path: str, plain_path: str | None) -> tuple[bytes, str]:
    """The first bytes by a plain read, and what it was."""
    if plain_path is not None:
        what = f"pread of {plain_path}"
        if stat.S_ISBLK(os.stat(plain_path).st_mode):
            # What the page cache has of a device can be older than the device.
            with contextlib.suppress(OSError):
                return _pread(plain_path, os.O_DIRECT), f"{what} with O_DIRECT"
        try:
            return _pread(plain_path, 0), what
        except OSError as error:
            text = f"nothing to compare with, since {what} fails: {error.strerror}"
            raise OSError(error.errno, text) from None
    with File(path) as namespace:
        nbytes = min(_MOST, namespace.size)
    text = "another passthrough read, into host memory, since there is no block device to read"
    return _by(DataPath.NVME_PASSTHROUGH, path, nbytes, None, bytes(nbytes)), text


def _pread(path: str, flags: int) -> bytes:
    with opened(path, os.O_RDONLY | flags) as fd, mmap.mmap(-1, _MOST) as pages:
        count = os.preadv(fd, [pages], 0)
        return pages[:count]


# ---- By the way


def _by(way: DataPath, path: str, nbytes: int, allocate: str | None, filling: bytes) -> bytes:
    with (
        GpuMappedBuffer.from_host_visible(_MOST)
        if allocate is None
        else GpuMappedBuffer.from_bar1_peer(allocate, _MOST) as buffer,
        File(path) as file,
        buffer.view() as view,
    ):
        view[:nbytes] = filling
        file.read_into(buffer, size=nbytes, require=way, timeout=_PATIENCE)
        return bytes(view[:nbytes])
