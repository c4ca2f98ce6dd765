"""Rows of safetensors files on the CPU, beside the safetensors package, into NumPy's arrays."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.numpy

import gdsdirect.safetensors
from benchmarks import scratch
from benchmarks.rows import Bound, Contestant, Pair, Row

_TENSORS = 64
_NBYTES = 4 << 20  # of each
_SIZE = _TENSORS * _NBYTES
_PACKAGE = "safetensors.numpy"


def write(path: Path, tensors: int, nbytes: int) -> int:
    """A checkpoint of so many tensors of so many bytes each; returns the bytes of the file."""
    header = {
        f"layers.{number}.weight": {
            "dtype": "F32",
            "shape": [1024, nbytes // 4096],
            "data_offsets": [number * nbytes, (number + 1) * nbytes],
        }
        for number in range(tensors)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(tensors):
            file.write(os.urandom(nbytes))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


@contextmanager
def _row(
    title: str, load: Callable[[Path], object], bound: Bound, before: Callable[[Path], None]
) -> Iterator[Row]:
    with scratch.folder() as folder:
        path = Path(folder, "model.safetensors")
        write(path, _TENSORS, _NBYTES)

        def contestant(name: str, load: Callable[[Path], object]) -> Contestant:
            return Contestant(name, lambda: load(path), _SIZE >> 20, lambda: before(path))

        ours = contestant("gdsdirect", load)
        theirs = contestant(_PACKAGE, safetensors.numpy.load_file)
        yield Row(title, (Pair(ours, theirs, bound),), counted="MiB/s")


@contextmanager
def cached() -> Iterator[Row]:
    title = f"safetensors of {_SIZE >> 20} MiB from page cache"

    def before(path: Path) -> None:
        """Each pass finds it there."""
        path.read_bytes()

    with _row(title, gdsdirect.safetensors.load_file, Bound(1, at_most=False), before) as row:
        yield row


@contextmanager
def cold() -> Iterator[Row]:
    title = f"safetensors of {_SIZE >> 20} MiB from the drive"

    def load(path: Path) -> object:
        return gdsdirect.safetensors.load_file(path, direct=True)

    with _row(title, load, Bound(1.3, at_most=False), scratch.forget) as row:
        yield row
