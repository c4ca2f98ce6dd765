"""Files, partitions and block devices into host memory, and the way that is told."""

import os
from array import array
from pathlib import Path

import guest
import pytest
from guest import DRIVES, KIB, MIB

from gdsdirect import AsyncUringStream, DataPath, GpuMappedBuffer, ShortReadError


@pytest.mark.parametrize("fixed", [True, False])
def test_a_file(fixed: bool, mounted: Path) -> None:
    expected = (guest.FOLDER / "files/model").read_bytes()
    with (
        GpuMappedBuffer.from_host_visible(len(expected)) as buffer,
        AsyncUringStream(buffer) as stream,
        open(os.open(mounted / "model", os.O_RDONLY | os.O_DIRECT), "rb", buffering=0) as file,
    ):
        submit = stream.submit_reads_fixed if fixed else stream.submit_reads
        starts = array("Q", reversed(range(0, len(expected), 256 * KIB)))
        sizes = array("I", [min(256 * KIB, len(expected) - start) for start in starts])
        done = stream.wait(len(submit(file, starts, sizes, starts)))
        assert sum(completion.result() for completion in done) == len(expected)
        way = DataPath.FILE_FIXED if fixed else DataPath.FILE_DIRECT
        assert {completion.path for completion in done} == {way}
        assert stream.stats.registered == (len(done) if fixed else 0)
        guest.check(buffer, expected)


def test_the_end_of_a_file(mounted: Path, buffer: GpuMappedBuffer) -> None:
    """What is there is delivered, and that it's less than was asked for is an error."""
    expected = (guest.FOLDER / "files/short").read_bytes()
    with (
        AsyncUringStream(buffer) as stream,
        open(os.open(mounted / "short", os.O_RDONLY | os.O_DIRECT), "rb", buffering=0) as file,
    ):
        stream.submit_read_fixed(file, 0, 8192, 0)
        (completion,) = stream.wait()
        assert not completion.ok
        with pytest.raises(ShortReadError, match=f"{len(expected)} of 8192"):
            completion.result()
        guest.check(buffer, expected)


def test_a_partition_is_read_as_a_file(buffer: GpuMappedBuffer) -> None:
    drive = DRIVES["far"]
    partition = os.open(f"{drive.disk}p1", os.O_RDONLY | os.O_DIRECT)
    with (
        AsyncUringStream(buffer) as stream,
        open(partition, "rb", buffering=0) as file,
    ):
        stream.submit_read_fixed(file, 4096, 64 * KIB, 8192)
        (completion,) = stream.wait()
        assert completion.result() == 64 * KIB
        assert completion.path is DataPath.FILE_FIXED
        guest.check(buffer, drive.contents([(64 + 8, 128)]), offset=8192)


def test_through_the_page_cache(mounted: Path, buffer: GpuMappedBuffer) -> None:
    """Without O_DIRECT the kernel copies, and the way told says so."""
    with AsyncUringStream(buffer) as stream, (mounted / "model").open("rb") as file:
        stream.submit_read(file, 1, MIB - 1, 1)
        (completion,) = stream.wait()
        assert (completion.result(), completion.path) == (MIB - 1, DataPath.BUFFERED)
        guest.check(buffer, (guest.FOLDER / "files/model").read_bytes()[1:MIB], offset=1)
