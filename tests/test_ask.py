"""What the kernel can do, asked of it: csrc/ask.c."""

import os
from pathlib import Path

import pytest

from gdsdirect import AsyncUringStream, GpuMappedBuffer, _uring_cmd

OPTIONS = ("single_thread", "sqpoll", "iopoll")


def test_the_answers_agree_with_what_a_stream_can() -> None:
    answers = _uring_cmd.ask_io_uring()
    assert all(0 <= number < 4096 for number in answers.values())
    with GpuMappedBuffer.from_host_visible(4096) as buffer:
        for option in OPTIONS:
            if answers[option] == 0:
                AsyncUringStream(buffer, **{option: True}).close()
                continue
            with pytest.raises(OSError, match="can't make a ring") as caught:
                AsyncUringStream(buffer, **{option: True})
            assert caught.value.errno == answers[option]
        if answers["registers"] == 0:
            AsyncUringStream(buffer, register=True).close()


def test_asking_leaves_nothing_behind() -> None:
    before = os.listdir("/proc/self/fd")
    answers = [_uring_cmd.ask_io_uring() for _ in range(50)]
    assert len({tuple(answer.items()) for answer in answers}) == 1
    assert os.listdir("/proc/self/fd") == before


def test_the_alignment_of_a_file(tmp_path: Path) -> None:
    """Reads that keep to it work, or the kernel tells nothing."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    fd = os.open(path, os.O_RDONLY)
    try:
        found = _uring_cmd.direct_alignment(fd)
        if found is None:
            pytest.skip("this kernel or file system tells no alignment")
        memory, offset = found
        assert memory & (memory - 1) == 0
        assert offset & (offset - 1) == 0
        if offset:
            direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
            with GpuMappedBuffer.from_host_visible(1 << 15) as buffer, buffer.view() as view:
                assert os.preadv(direct, [view[memory : memory + offset]], offset) == offset
            os.close(direct)
    finally:
        os.close(fd)


def test_the_alignment_of_no_file() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        _uring_cmd.direct_alignment(-1)
    with pytest.raises(TypeError):
        _uring_cmd.direct_alignment("x")  # type: ignore[arg-type]
