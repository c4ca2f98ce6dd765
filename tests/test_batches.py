"""What C does with many reads at once, beside the same in Python; and what it refuses."""

from __future__ import annotations

import errno
import os
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdsdirect import GpuMappedBuffer
from gdsdirect._nvme_sqe import _locate, _survey
from gdsdirect._uring_cmd import Source, open_sources, read_sources
from gdsdirect.shared_ring import ring_of

READS = st.lists(
    st.tuples(
        st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
    ),
    max_size=20,
)


def arrays(reads: list[tuple[int, int, int]]) -> tuple[array[int], array[int], array[int]]:
    offsets, sizes, targets = zip(*reads, strict=True) if reads else ((), (), ())
    return array("Q", offsets), array("I", sizes), array("Q", targets)


@given(READS)
def test_survey(reads: list[tuple[int, int, int]]) -> None:
    blocks, places, least, most, total, first, end, target_end = _survey(*arrays(reads))
    ored = [0, 0]
    for offset, size, target in reads:
        ored = [ored[0] | offset | size, ored[1] | target]
    assert [blocks, places] == ored
    sizes = [size for _, size, _ in reads]
    assert (least, most, total) == (min(sizes, default=(1 << 32) - 1), max([0, *sizes]), sum(sizes))
    top = (1 << 64) - 1
    assert first == min((offset for offset, _, _ in reads), default=top)
    assert end == max([0, *(min(top, offset + size) for offset, size, _ in reads)])
    assert target_end == max([0, *(min(top, target + size) for _, size, target in reads)])


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), max_size=8),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), min_size=1, max_size=8),
)
def test_locate(lengths: list[tuple[int, int]], reads: list[tuple[int, int]]) -> None:
    """Extents of any length, with any holes between, in places that have no order."""
    extents, at = [], 0
    for number, (length, hole) in enumerate(lengths):
        extents.append((at, 10_000 * (number * 7 % 8 + 1), length))
        at += length + hole
    expected = []
    for offset, size in reads:
        inside = [
            physical + offset - logical
            for logical, physical, length in extents
            if logical <= offset < logical + length and offset + size <= logical + length
        ]
        expected += inside or [None]
    table = array("Q", [number for extent in extents for number in extent])
    found = _locate(
        table, array("Q", [offset for offset, _ in reads]), array("I", [size for _, size in reads])
    )
    if None in expected:
        assert found is None
    else:
        assert list(array("Q", found or b"")) == expected


def test_arrays_that_are_wrong() -> None:
    one, two = array("Q", [0]), array("Q", [0, 0])
    sizes = array("I", [512])
    for call in (
        lambda: _survey(two, sizes, two),
        lambda: _survey(one, sizes, two),
        lambda: _locate(one, two, sizes),
    ):
        with pytest.raises(ValueError, match="different lengths"):
            call()
    with pytest.raises(TypeError):
        _survey(one, one, one)


# ---- Files


def test_open_sources(tmp_path: Path) -> None:
    paths = [str(tmp_path / str(number)) for number in range(200)]
    for number, path in enumerate(paths):
        Path(path).write_bytes(b"x" * number)
    os.mkfifo(tmp_path / "fifo")
    odd = [str(tmp_path), str(tmp_path / "missing"), str(tmp_path / "fifo"), "/dev/null"]
    before = len(os.listdir("/proc/self/fd"))
    found = open_sources([*paths, *odd], os.O_RDONLY | os.O_CLOEXEC).result()
    assert [(path, size) for path, _, size in found[:200]] == list(
        zip(paths, range(200), strict=True)
    )
    assert [source and source.path for _, source, _ in found] == paths + [None] * 4
    assert found[200:] == [(path, None, 0) for path in odd]
    assert len(os.listdir("/proc/self/fd")) == before + 200
    del found
    assert len(os.listdir("/proc/self/fd")) == before
    assert open_sources([], os.O_RDONLY).result() == []
    for wrong, error in ((["a\0b"], ValueError), ([3], TypeError), (3, TypeError)):
        with pytest.raises(error):
            open_sources([paths[0], *wrong] if isinstance(wrong, list) else wrong, 0)


def test_without_descriptors(tmp_path: Path) -> None:
    """Those that were opened are closed again by their owner; none is lost."""
    import resource

    (tmp_path / "file").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, hard))
    try:
        found = open_sources([str(tmp_path / "file")] * (used + 20), os.O_RDONLY).result()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {source is None for _, source, _ in found} == {True, False}


def test_read_sources(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data := os.urandom(5000))
    folder = Source(os.open(tmp_path, os.O_RDONLY), "folder")
    file = Source(os.open(tmp_path / "file", os.O_RDONLY), "file")
    with GpuMappedBuffer.from_host_visible(8192) as buffer, buffer.view() as view:
        job = read_sources(buffer, (file, folder, file), (5000, 1, 8192), (0, 0, 0))
        found = job.result()
        assert job.done
        assert job.result() == found
        del job  # which uses the memory as long as it is there
        assert found == [5000, -errno.EISDIR, 5000]
        assert view[:5000] == data
        for sources, sizes, targets in (
            ((file,), (8193,), (0,)),
            ((file,), (1,), (8192,)),
            ((file,), (-1,), (0,)),
            ((file,), (1,), (-1,)),
            ((file,), (1,), (0, 0)),
            ((3,), (1,), (0,)),
        ):
            with pytest.raises(ValueError, match=r"of 8192|as many"):
                read_sources(buffer, sources, sizes, targets)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            read_sources(buffer, [file], (1,), (0,))  # type: ignore[arg-type]


def test_one_read_of_each_file_in_one_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data := os.urandom(8192))
    sources = tuple(
        Source(os.open(tmp_path / "file", os.O_RDONLY), str(number)) for number in range(300)
    )
    offsets, sizes = array("Q", [0] * 300), array("I", [16] * 300)
    targets = array("Q", range(0, 4800, 16))
    with GpuMappedBuffer.from_host_visible(8192) as buffer, buffer.view() as view:
        ring = ring_of(buffer)
        for fixed in (True, False):
            view[:] = bytes(8192)
            request = ring.files(sources, (offsets, sizes, targets), fixed=fixed)
            ring._carry_out((request,), None)
            assert request.take() == []
            assert view[:4800] == data[:16] * 300
        for wrong in (sources[:5], (3,) * 300):
            with pytest.raises((ValueError, TypeError)):
                ring.files(wrong, (offsets, sizes, targets), fixed=True)  # type: ignore[arg-type]
        sources[299].close()
        with pytest.raises(ValueError, match="299 is closed"):
            ring._carry_out((ring.files(sources, (offsets, sizes, targets), fixed=True),), None)
        assert ring.stats.submitted == 600


def test_part_of_a_buffer() -> None:
    buffer = GpuMappedBuffer.from_host_visible(8192)
    part = buffer._part(4096, 100)
    view = memoryview(part)
    assert (part.nbytes, part.address, part._in_use) == (100, buffer.address + 4096, True)
    with pytest.raises(BufferError):
        buffer.close()
    view.release()
    assert not part._in_use
    for wrong in ((-1, 5), (0, -1), (8192, 1), (1, 8192)):
        with pytest.raises(ValueError, match="outside of 8192"):
            buffer._part(*wrong)
    del part
    buffer.close()
    with pytest.raises(ValueError, match="closed"):
        buffer._part(0, 1)
