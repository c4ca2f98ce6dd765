"""The probe over real files: what it answers, what it never does."""

from __future__ import annotations

import dataclasses
import doctest
import errno
import os
import pickle
import pty
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import run_python

from gdsdirect.probe import (
    Available,
    FeatureDisabled,
    GpuDirectCapability,
    Unavailable,
    UnavailableReason,
    probe,
    read_bounded,
)

LIMIT = 1 << 20
NOBODY = 65534


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    return tmp_path / "stats"


def test_examples() -> None:
    # By its name, because the package's attribute `probe` is the function.
    result = doctest.testmod(sys.modules["gdsdirect.probe"])
    assert result.failed == 0
    assert result.attempted > 0


def test_available_with_the_text_as_read(stats: Path) -> None:
    text = "\ufeff GDS Version: 1.13.0.11 \r\nReads\t: n=0 ok=0\x00 größer\n\n"
    stats.write_bytes(text.encode())
    result = probe(stats_path=stats)
    assert result == Available(text)
    assert result.is_available()


def test_path_forms(stats: Path) -> None:
    stats.write_text("x")
    for path in (stats, str(stats), os.fsencode(stats)):
        assert probe(stats_path=path) == Available("x")


def test_symlink_is_followed(stats: Path, tmp_path: Path) -> None:
    stats.write_text("x")
    (tmp_path / "link").symlink_to(stats)
    assert probe(stats_path=tmp_path / "link") == Available("x")


def test_default_path_is_that_of_nvidia_fs() -> None:
    expected = probe(stats_path="/proc/driver/nvidia-fs/stats")
    # The counters of a loaded module move between two reads.
    assert type(probe()) is type(expected)
    if not expected.is_available():
        assert probe() == expected


def test_a_file_of_proc_whose_size_is_0() -> None:
    assert os.stat("/proc/self/status").st_size == 0
    result = probe(stats_path="/proc/self/status")
    assert isinstance(result, Available)
    assert f"Pid:\t{os.getpid()}\n" in result.stats


def test_missing(stats: Path) -> None:
    result = probe(stats_path=stats)
    assert result == Unavailable(UnavailableReason.NOT_INSTALLED, errno.ENOENT)
    assert not result.is_available()


def test_dangling_symlink_is_missing(stats: Path) -> None:
    stats.symlink_to("nowhere")
    assert probe(stats_path=stats) == Unavailable(UnavailableReason.NOT_INSTALLED, errno.ENOENT)


@pytest.mark.parametrize("blank", [b"", b"\n", b" \t\r\n\x0b\x0c", "\u2003\u00a0".encode()])
def test_blank(stats: Path, blank: bytes) -> None:
    stats.write_bytes(blank)
    assert probe(stats_path=stats) == Unavailable(UnavailableReason.EMPTY, None)


def test_exactly_1_mib_is_allowed(stats: Path) -> None:
    stats.write_bytes(b"x" * LIMIT)
    assert probe(stats_path=stats) == Available("x" * LIMIT)


def test_one_byte_more_is_too_large(stats: Path) -> None:
    stats.write_bytes(b"x" * (LIMIT + 1))
    assert probe(stats_path=stats) == Unavailable(UnavailableReason.TOO_LARGE, None)


def test_too_large_goes_before_what_the_bytes_are(stats: Path) -> None:
    for content in (b" ", b"\xff"):
        stats.write_bytes(content * (LIMIT + 1))
        assert probe(stats_path=stats) == Unavailable(UnavailableReason.TOO_LARGE, None)


@pytest.mark.parametrize("content", [b"\xff", b"GDS \xc3", b"\xed\xa0\x80", b"\xc0\x80"])
def test_not_utf8(stats: Path, content: bytes) -> None:
    stats.write_bytes(content)
    assert probe(stats_path=stats) == Unavailable(UnavailableReason.NOT_TEXT, None)


def test_10_gib_cost_no_memory(stats: Path) -> None:
    with stats.open("wb") as file:
        file.truncate(10 << 30)
    # 64 MiB of address space above what the interpreter has: reading by st_size would need 10 GiB.
    script = """
import resource, sys
from gdsdirect.probe import probe, Unavailable, UnavailableReason
probe(stats_path="/")
with open("/proc/self/statm") as statm:
    limit = int(statm.read().split()[0]) * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    bytearray(1 << 30)
except MemoryError:
    pass
else:
    sys.exit("the limit does not bind")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert probe(stats_path=sys.argv[1]) == Unavailable(UnavailableReason.TOO_LARGE), "answer"
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 8 << 10, f"{grown} KiB"
"""
    run_python(script, str(stats))


def test_reads_one_byte_above_the_limit_and_no_more(
    stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats.write_bytes(b"x" * (3 * LIMIT))
    count = 0
    real_read = os.read

    def counted(fd: int, size: int) -> bytes:
        nonlocal count
        piece = real_read(fd, size)
        count += len(piece)
        return piece

    monkeypatch.setattr(os, "read", counted)
    probe(stats_path=stats)
    assert count == LIMIT + 1


def test_a_file_that_comes_in_pieces(stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats.write_text("GDS Version: 1.13\n" * 3)
    real_read = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: real_read(fd, min(size, 7)))
    assert probe(stats_path=stats) == Available("GDS Version: 1.13\n" * 3)


def test_a_read_that_fails_midway(stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats.write_text("x" * 100)
    real_read = os.read
    before = open_files()
    calls = 0

    def failing(fd: int, _size: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.EIO, "Input/output error")
        return real_read(fd, 10)

    with monkeypatch.context() as patched:
        patched.setattr(os, "read", failing)
        result = probe(stats_path=stats)
    assert result == Unavailable(UnavailableReason.READ_FAILED, errno.EIO)
    assert open_files() == before


def test_directory(tmp_path: Path) -> None:
    assert probe(stats_path=tmp_path) == Unavailable(UnavailableReason.READ_FAILED, errno.EISDIR)


def test_fifo_is_neither_waited_for_nor_emptied(stats: Path) -> None:
    os.mkfifo(stats)
    expected = Unavailable(UnavailableReason.READ_FAILED, errno.EINVAL)
    assert in_time(lambda: probe(stats_path=stats)) == expected

    fd = os.open(stats, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(fd, b"for someone else")
        assert in_time(lambda: probe(stats_path=stats)) == expected
        assert os.read(fd, 100) == b"for someone else"
    finally:
        os.close(fd)


def test_a_fifo_put_in_place_between_stat_and_open(
    stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(stats)
    regular = os.stat(__file__)
    monkeypatch.setattr(os, "stat", lambda _path: regular)
    assert in_time(lambda: probe(stats_path=stats)) == Unavailable(
        UnavailableReason.READ_FAILED, errno.EINVAL
    )


def test_terminal() -> None:
    controller, terminal = pty.openpty()
    try:
        result = in_time(lambda: probe(stats_path=os.ttyname(terminal)))
    finally:
        os.close(controller)
        os.close(terminal)
    assert result == Unavailable(UnavailableReason.READ_FAILED, errno.EINVAL)


def test_a_device_is_not_even_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", lambda *arguments: opened.append(arguments))
        probe(stats_path="/dev/null")
    assert opened == []


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_device(device: str) -> None:
    assert probe(stats_path=device) == Unavailable(UnavailableReason.READ_FAILED, errno.EINVAL)


def test_permission_denied() -> None:
    script = f"""
import errno, os, sys
from gdsdirect.probe import probe, Unavailable, UnavailableReason
probe(stats_path="/")
if os.getuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
result = probe(stats_path=sys.argv[1])
assert result == Unavailable(UnavailableReason.PERMISSION_DENIED, errno.EACCES), result
"""
    with tempfile.TemporaryDirectory() as folder:
        # Unlike tmp_path, open to every user: what is refused is the file itself.
        Path(folder).chmod(0o755)
        stats = Path(folder, "stats")
        stats.write_text("x")
        stats.chmod(0)
        run_python(script, str(stats))


def test_symlink_loop(stats: Path) -> None:
    stats.symlink_to(stats)
    assert probe(stats_path=stats) == Unavailable(UnavailableReason.READ_FAILED, errno.ELOOP)


def test_path_through_a_file(stats: Path) -> None:
    stats.write_text("x")
    assert probe(stats_path=stats / "more") == Unavailable(
        UnavailableReason.READ_FAILED, errno.ENOTDIR
    )


def test_name_too_long() -> None:
    for path in ("x" * 300, "/" + "x/" * 10_000):
        assert probe(stats_path=path) == Unavailable(
            UnavailableReason.READ_FAILED, errno.ENAMETOOLONG
        )


class BadPath:
    def __init__(self, result: object) -> None:
        self.result = result

    def __fspath__(self) -> Any:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    "path",
    [
        "nul\0inside",
        b"nul\0inside",
        "lone surrogate \ud800",
        None,
        0,
        1.5,
        True,
        object(),
        bytearray(b"/"),
        BadPath(3),
        BadPath(ZeroDivisionError()),
        BadPath(MemoryError()),
        BadPath(RecursionError()),
        BadPath(OSError("no number")),
    ],
    ids=repr,
)
def test_never_raises(path: Any) -> None:
    assert probe(stats_path=path) == Unavailable(UnavailableReason.READ_FAILED, None)


def test_empty_path() -> None:
    assert probe(stats_path="") == Unavailable(UnavailableReason.NOT_INSTALLED, errno.ENOENT)


def test_undecodable_name(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff"
    Path(os.fsdecode(path)).write_text("x")
    assert probe(stats_path=path) == Available("x")
    assert probe(stats_path=os.fsdecode(path)) == Available("x")


def test_keyboard_interrupt_passes() -> None:
    path: Any = BadPath(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        probe(stats_path=path)


def test_no_descriptor_is_left_open(stats: Path) -> None:
    before = open_files()
    stats.write_bytes(b"\xff")
    probe(stats_path=stats)
    probe(stats_path=stats.parent)
    stats.write_text("x")
    probe(stats_path=stats)
    assert open_files() == before


def test_disabled_without_the_ring(stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats.write_text("x")
    monkeypatch.setitem(sys.modules, "gdsdirect._uring_cmd", None)
    assert probe(stats_path=stats) == FeatureDisabled()
    assert not FeatureDisabled().is_available()


def test_disabled_off_linux(stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats.write_text("x")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert probe(stats_path=stats) == FeatureDisabled()


def test_probe_is_one_function_everywhere() -> None:
    assert probe is GpuDirectCapability.probe
    assert Available.probe is GpuDirectCapability.probe


def test_results_match_positionally() -> None:
    results: list[GpuDirectCapability] = [
        Available("text"),
        Unavailable(UnavailableReason.EMPTY, 5),
        FeatureDisabled(),
    ]
    seen: list[object] = []
    for result in results:
        match result:
            case Available(text):
                seen.append(text)
            case Unavailable(reason, number):
                seen.append((reason, number))
            case FeatureDisabled():
                seen.append(None)
    assert seen == ["text", (UnavailableReason.EMPTY, 5), None]


@pytest.mark.parametrize(
    "result", [Available("x"), Unavailable(UnavailableReason.EMPTY, None), FeatureDisabled()]
)
def test_results_are_frozen_values(result: Available | Unavailable | FeatureDisabled) -> None:
    assert isinstance(result, GpuDirectCapability)
    assert dataclasses.is_dataclass(result)
    for field in dataclasses.fields(result):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, field.name, None)
    assert not hasattr(result, "__dict__")
    assert len({result, pickle.loads(pickle.dumps(result))}) == 1


def test_reasons_are_six_sentences() -> None:
    assert [reason.name for reason in UnavailableReason] == [
        "NOT_INSTALLED",
        "PERMISSION_DENIED",
        "EMPTY",
        "TOO_LARGE",
        "NOT_TEXT",
        "READ_FAILED",
    ]
    for reason in UnavailableReason:
        sentence = str(reason)
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert ": " in sentence, "a cause, then what to do"


@pytest.mark.parametrize(
    ("limit", "expected"), [(0, b""), (3, b"abc"), (6, b"abcdef"), (9, b"abcdef")]
)
def test_read_bounded(stats: Path, limit: int, expected: bytes) -> None:
    stats.write_bytes(b"abcdef")
    assert read_bounded(str(stats), limit) == expected


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def in_time(call: Callable[[], object]) -> object:
    """The result of `call`, which must not block: a thread waits for it in its place."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert results, "still blocked after 10 s"
    return results[0]
