"""Files on every file system that the machine has."""

import errno
import os
from pathlib import Path
from typing import BinaryIO

import guest
import pytest
from guest import MIB

from gdsdirect import AsyncUringStream, DataPath, GpuMappedBuffer


def opened(path: Path) -> BinaryIO:
    """With O_DIRECT, where the file system takes that."""
    try:
        return open(os.open(path, os.O_RDONLY | os.O_DIRECT), "rb", buffering=0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return path.open("rb", buffering=0)


def check(folder: Path, buffer: GpuMappedBuffer, way: DataPath = DataPath.FILE_DIRECT) -> None:
    """What is written in `folder` is read back, on that way."""
    path, expected = folder / "written", os.urandom(MIB)
    with path.open("xb") as file:
        file.write(expected)
        file.flush()
        os.fsync(file.fileno())
    with AsyncUringStream(buffer) as stream, opened(path) as file:
        stream.submit_read(file, 0, MIB, 0)
        (completion,) = stream.wait()
        assert (completion.result(), completion.path) == (MIB, way)
    guest.check(buffer, expected)
    path.unlink()


def test_right_on_a_drive(file_system: Path, buffer: GpuMappedBuffer) -> None:
    check(file_system, buffer)


@pytest.mark.parametrize("name", ["overlay", "looped"])
def test_on_another(name: str, buffer: GpuMappedBuffer, request: pytest.FixtureRequest) -> None:
    check(request.getfixturevalue(name), buffer)


def test_in_memory(tmpfs: Path, buffer: GpuMappedBuffer) -> None:
    check(tmpfs, buffer, DataPath.BUFFERED)
