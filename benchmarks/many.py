"""The row of many small files in the page cache: opened, read and closed, one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gdsdirect
from benchmarks import scratch
from benchmarks.rows import Bound, Contestant, Pair, Row
from gdsdirect import GpuMappedBuffer

_FILES = 10_000
_NBYTES = 100_000
_CHUNK = 128 << 10
_BUFFER = 16 << 20  # of 1 to 64 MiB the fastest, measured


def _make(folder: Path) -> list[str]:
    paths = [str(folder / f"{number:05}") for number in range(_FILES)]
    contents = os.urandom(_NBYTES)
    for path in paths:
        Path(path).write_bytes(contents)
    os.sync()  # else they are written while contestants run
    for path in paths:
        Path(path).read_bytes()
    return paths


def _all_of(nbytes: int) -> None:
    if nbytes != _FILES * _NBYTES:
        raise RuntimeError(f"{nbytes} bytes came of {_FILES * _NBYTES}")


def _ours(paths: Sequence[str], buffer: GpuMappedBuffer) -> Callable[[], None]:
    def run() -> None:
        nbytes = 0
        with gdsdirect.stream_files(paths, buffer, chunk_size=_CHUNK, direct=False) as stream:
            for chunk in stream:
                nbytes += chunk.nbytes
        _all_of(nbytes)

    return run


def _plain(paths: Sequence[str]) -> Callable[[], None]:
    target = bytearray(_CHUNK)

    def run() -> None:
        nbytes = 0
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                nbytes += file.readinto(target)
        _all_of(nbytes)

    return run


@contextmanager
def files() -> Iterator[Row]:
    with ExitStack() as stack:
        paths = _make(Path(stack.enter_context(scratch.folder())))
        buffer = stack.enter_context(GpuMappedBuffer.from_host_visible(_BUFFER))
        ours = Contestant("stream_files", _ours(paths, buffer), _FILES)
        plain = Contestant("open, readinto", _plain(paths), _FILES)
        pair = Pair(ours, plain, Bound(1.8, at_most=False))
        yield Row(f"{_FILES:,} cached files of {_NBYTES // 1000} KB", (pair,), counted="files/s")
