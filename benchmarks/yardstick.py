"""The C loop of yardstick.c, compiled here and called in this process."""

from __future__ import annotations

import ctypes
import os
import subprocess
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks import ROOT
from gdsdirect import GpuMappedBuffer

SOURCE = Path(__file__).with_name("yardstick.c")
LIBRARY = ROOT / "build/bench/yardstick.so"
# Optimised, for any x86-64: the emulated processor of the lab hasn't all that this one has.
_FLAGS = ("-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden")

MOST_FILES = 2
RECORD_BYTES = 16  # of struct record, which is COMPLETION_FORMAT

# What AsyncUringStream(single_thread=True) asks for: SINGLE_ISSUER, DEFER_TASKRUN, TASKRUN_FLAG.
SINGLE_THREAD = 1 << 12 | 1 << 13 | 1 << 9


def build() -> None:
    """Compile the library."""
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CC", "cc")
    command = [compiler, *_FLAGS, "-shared", "-fPIC", "-o", str(LIBRARY), str(SOURCE), "-luring"]
    subprocess.run(command, check=True)


class _Work(ctypes.Structure):
    """struct work."""

    _fields_ = (
        ("positions", ctypes.c_void_p),
        ("addresses", ctypes.c_void_p),
        ("n", ctypes.c_uint64),
        ("nbytes", ctypes.c_uint32),
        ("blocks", ctypes.c_uint32),
        ("nsids", ctypes.c_uint32 * MOST_FILES),
        ("depth", ctypes.c_uint32),
        ("batch", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Work:
    """What there is to read: at each of `positions` (blocks, or bytes of a file) `nbytes`, to the
    address beside it. `blocks` is 0 for files; then `nsids` has no meaning."""

    positions: array[int]
    addresses: array[int]
    nbytes: int
    blocks: int = 0
    nsids: tuple[int, ...] = ()
    depth: int = 1
    batch: int = 1

    def struct(self) -> _Work:
        """For C, which knows the arrays by their addresses alone."""
        return _Work(
            self.positions.buffer_info()[0],
            self.addresses.buffer_info()[0],
            len(self.positions),
            self.nbytes,
            self.blocks,
            (ctypes.c_uint32 * MOST_FILES)(*self.nsids),
            self.depth,
            self.batch,
        )


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY), use_errno=True)
    library.yardstick_open.restype = ctypes.c_void_p
    library.yardstick_open.argtypes = [
        *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
        *(ctypes.c_void_p, ctypes.c_size_t),
    ]
    library.yardstick_run.restype = ctypes.c_int64
    library.yardstick_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.yardstick_close.restype = None
    library.yardstick_close.argtypes = [ctypes.c_void_p]
    library.yardstick_pack.restype = None
    library.yardstick_pack.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library


class Loop:
    """The C loop that reads, with a ring of its own on one file or two."""

    def __init__(
        self,
        paths: Sequence[str],
        buffer: GpuMappedBuffer,
        work: Work,
        setup_flags: int = 0,
        *,
        direct: bool = False,
    ) -> None:
        self._library = _load()
        self._kept = (buffer, work)
        self._work = work.struct()
        self._records = ctypes.create_string_buffer(work.depth * RECORD_BYTES)
        self._arguments = (ctypes.byref(self._work), self._records)
        first, second = (*map(os.fsencode, paths), None)[:MOST_FILES]
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        self._handle = self._library.yardstick_open(
            first, second, flags, work.depth, setup_flags, buffer.address, buffer.nbytes
        )
        if not self._handle:
            number = ctypes.get_errno()
            raise OSError(number, f"the C loop can't be set up: {os.strerror(number)}", paths[0])

    def run(self) -> None:
        """All of the work once."""
        failed = self._library.yardstick_run(self._handle, *self._arguments)
        if failed:
            raise RuntimeError(f"{failed} of the C loop's reads failed (negative: -errno)")

    def close(self) -> None:
        self._library.yardstick_close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Packer:
    """The C loop that packs commands."""

    def __init__(self, work: Work, out: bytearray) -> None:
        self._pack = _load().yardstick_pack
        self._kept = work
        self._work = work.struct()
        self._out = (ctypes.c_char * len(out)).from_buffer(out)
        self._arguments = (ctypes.byref(self._work), ctypes.byref(self._out))

    def run(self) -> None:
        """All commands once."""
        self._pack(*self._arguments)
