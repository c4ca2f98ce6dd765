"""A folder for the files of a row, gone after it."""

import os
import tempfile

from benchmarks.yardstick import LIBRARY

PLACE = LIBRARY.parent
_PIECE = 64 << 20


def folder() -> tempfile.TemporaryDirectory[str]:
    """Beside what is built, for /tmp can be memory."""
    return tempfile.TemporaryDirectory(dir=PLACE)


def write(path: str | os.PathLike[str], nbytes: int) -> None:
    """Write a file of nothing that compresses, and wait until it is on the drive."""
    piece = os.urandom(min(nbytes, _PIECE))
    with open(path, "wb") as file:
        for start in range(0, nbytes, _PIECE):
            file.write(piece[: nbytes - start])
        file.flush()
        os.fsync(file.fileno())


def forget(path: str | os.PathLike[str]) -> None:
    """Clear the page cache of a file, so that the next read of it is the drive's."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
