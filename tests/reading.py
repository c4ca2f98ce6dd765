"""Reads of files that are compared, and not only their bytes: also those beside them."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from gdsdirect import DataPath, File, GpuMappedBuffer, ReadResult, ShortReadError

FILLING = 0xA5
_BESIDE = 8192  # bytes looked at on both sides of what was read


def read_and_compare(
    file: File,
    buffer: GpuMappedBuffer,
    data: bytes,
    offset: int,
    size: int,
    target: int,
    require: DataPath | Collection[DataPath] | None = None,
) -> ReadResult:
    """Read, and fail unless the buffer then has what `data` has there, and nothing else new."""
    first, last = max(0, target - _BESIDE), min(buffer.nbytes, target + size + _BESIDE)
    with buffer.view() as view:
        view[first:last] = bytes([FILLING]) * (last - first)
        result = file.read_into(
            buffer, offset=offset, size=size, target_offset=target, require=require
        )
        expected = data[offset : offset + size]
        what = (file.path, offset, size, target, result)
        assert result.nbytes == len(expected), what
        end = target + len(expected)
        assert view[target:end] == expected, what
        assert not bytes(view[first:target]).strip(b"\xa5"), what
        assert not bytes(view[end:last]).strip(b"\xa5"), what
    assert sum(result.ways.values()) == result.nbytes, what
    assert 0 <= result.bounce_bytes <= result.nbytes, what
    return result


def check_own_or_zero(
    file: File,
    buffer: GpuMappedBuffer,
    data: bytes,
    where: tuple[int, int, int],
    require: DataPath | None = None,
) -> ReadResult | None:
    """Read what a writer cuts off, punches and writes again meanwhile: each byte is 0 or the one of
    its place. None where the file had more, and the kernel brought none of it."""
    offset, size, target = where
    try:
        result = file.read_into(
            buffer, offset=offset, size=size, target_offset=target, require=require
        )
    except ShortReadError:
        return None
    with buffer.view() as view:
        found = np.frombuffer(bytes(view[target : target + result.nbytes]), np.uint8)
    same = found == np.frombuffer(data[offset : offset + result.nbytes], np.uint8)
    assert np.all(same | (found == 0))
    return result


def random_range(chance: random.Random, file_size: int, room: int) -> tuple[int, int, int]:
    """Offset, size and target, often at or beside the edges of blocks, pages, file and buffer."""
    edges = (0, 512, 4096, 16384, 1 << 20, file_size, room)

    def near(most: int) -> int:
        if chance.random() < 0.5:
            return chance.randint(0, most)
        edge = chance.choice(edges) + chance.choice((-4096, -512, -4, -1, 0, 1, 4, 512, 4096))
        return max(0, min(most, edge))

    offset, target = near(file_size + 5000), near(room - 1)
    size = min(near(room), chance.choice((1, 700, 5000, 70_000, room)), room - target)
    return offset, size, target


def read_randomly(
    path: str | Path,
    data: bytes,
    buffer: GpuMappedBuffer,
    ways: Sequence[DataPath | None],
    count: int,
    seed: object,
    *,
    extents: bool = False,
) -> None:
    """`count` random reads along each of `ways`, and of each way once it was taken at all."""
    chance = random.Random(str(seed))
    with File(path, extents=extents) as file:
        for way in ways:
            taken: set[DataPath] = set()
            for _ in range(count):
                where = random_range(chance, len(data), buffer.nbytes)
                result = read_and_compare(file, buffer, data, *where, require=way)
                taken.update(result.ways)
            assert way is None or taken == {way}


# ---- Writing


_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


def punch(fd: int, offset: int, size: int) -> None:
    """Make a hole of a part of a file: its blocks are given back, and it reads as zeros."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (fd, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(size))
    if libc.fallocate(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "fallocate")
