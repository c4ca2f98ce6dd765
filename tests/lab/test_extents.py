"""Files by passthrough of their blocks: right bytes, or a reason to read them as files."""

import contextlib
import errno
import fcntl
import os
import random
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import guest
import pytest
from guest import DRIVES, FILE_SYSTEMS, KIB, MIB
from reading import check_own_or_zero, punch, random_range, read_and_compare, read_randomly

import gdsdirect
from gdsdirect import DataPath, File, GpuMappedBuffer, ReadResult, WayClosedError
from gdsdirect._uring_cmd import Source
from gdsdirect.extents import Extents, RefusedError, _require_blocks_of_its_own

PASSTHROUGH = DataPath.NVME_PASSTHROUGH

_DEDUPE = 0xC0189436  # FIDEDUPERANGE, linux/fs.h
_MOVE = 0xC028660F  # EXT4_IOC_MOVE_EXT, fs/ext4/ext4.h


@pytest.fixture
def written(file_system: Path) -> Iterator[tuple[Path, bytes]]:
    """A file that nobody has told to go to the drive."""
    path, data = file_system / "extents", random.Random("extents").randbytes(MIB + 12345)
    path.write_bytes(data)
    yield path, data
    path.unlink()


@contextmanager
def extents_of(path: Path) -> Iterator[Extents]:
    source = Source(os.open(path, os.O_RDONLY | os.O_DIRECT), str(path))
    extents = Extents(source)
    yield extents
    extents.close()
    source.close()


def as_a_file(path: Path, buffer: GpuMappedBuffer, data: bytes, why: str) -> ReadResult:
    """It is read all the same, and the result says why not by its extents."""
    size = min(len(data), buffer.nbytes)
    with gdsdirect.open(path, extents=True) as file:
        result = read_and_compare(file, buffer, data, 0, size, 0)
        assert result.path is not PASSTHROUGH
        assert f"NVME_PASSTHROUGH is closed: {why}" in str(result.why)
        with pytest.raises(WayClosedError, match=why):
            file.read_into(buffer, size=size, require=PASSTHROUGH)
    return result


# ---- Right bytes


def test_any_range(written: tuple[Path, bytes], buffer: GpuMappedBuffer) -> None:
    path, data = written
    read_randomly(path, data, buffer, [None, PASSTHROUGH], 60, path, extents=True)
    with gdsdirect.open(path, extents=True) as file:
        result = read_and_compare(file, buffer, data, 0, MIB, 0)
        assert (result.path, result.why, result.bounce_bytes) == (PASSTHROUGH, None, 0)
        end = read_and_compare(file, buffer, data, MIB, 50_000, 0)
        assert (end.path, end.nbytes) == (PASSTHROUGH, 12345)


def test_many_extents(file_system: Path, buffer: GpuMappedBuffer) -> None:
    """Two files that grow in turns, a block each, have no two blocks beside each other."""
    path, other = file_system / "one", file_system / "other"
    data = random.Random("many").randbytes(600 * KIB)
    with path.open("wb", buffering=0) as one, other.open("wb", buffering=0) as two:
        for start in range(0, len(data), 4096):
            one.write(data[start : start + 4096])
            os.fsync(one.fileno())
            two.write(bytes(4096))
            os.fsync(two.fileno())
    read_randomly(path, data, buffer, [PASSTHROUGH], 40, path, extents=True)
    with gdsdirect.open(path, extents=True) as file, file.stream(buffer, offset=7) as stream:
        assert b"".join(bytes(chunk.view) for chunk in stream) == data[7:]
        assert set(stream.progress.ways) == {PASSTHROUGH}
    path.unlink()
    other.unlink()


def test_many_ranges(written: tuple[Path, bytes], buffer: GpuMappedBuffer) -> None:
    path, data = written
    offsets = random.Random(1).sample(range(0, MIB, 4096), 200)
    targets = range(0, 200 * 4096, 4096)
    with gdsdirect.open(path, extents=True) as file, buffer.view() as view:
        for way in (PASSTHROUGH, DataPath.FILE_FIXED):
            view[:] = bytes(buffer.nbytes)
            result = file.read_many_into(buffer, offsets, [4096] * 200, targets, require=way)
            assert (result.nbytes, result.path) == (200 * 4096, way)
            assert view[: 200 * 4096] == b"".join(data[at : at + 4096] for at in offsets)


def test_what_is_written_next_is_read_next(file_system: Path, buffer: GpuMappedBuffer) -> None:
    """Between reads the file may change, and move."""
    path, chance = file_system / "changes", random.Random("changes")
    with gdsdirect.open(_with(path, b"x"), extents=True) as file:
        for _ in range(20):
            _with(path, data := chance.randbytes(chance.randrange(1, 300_000)))
            assert read_and_compare(file, buffer, data, 0, len(data), 0).path is PASSTHROUGH
    path.unlink()


def _with(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---- Held still


def test_who_wants_to_write_waits(written: tuple[Path, bytes]) -> None:
    path, _ = written
    with extents_of(path) as extents:
        held = extents.hold(0, MIB)
        with extents.hold(0, 4096):  # another reader need not wait
            pass
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        with pytest.raises(RefusedError, match="it is open for writing"):
            extents.hold(0, 4096)  # as soon as somebody wants to
        opened = []
        writer = threading.Thread(target=lambda: opened.append(os.open(path, os.O_WRONLY)))
        writer.start()
        writer.join(0.05)
        assert not opened
        assert not held.moved()
        held.release()
        writer.join(5)
        os.close(opened[0])


def test_moved_blocks_are_seen(xfs: Path) -> None:
    """Deduplication gives the file the blocks of another with the same bytes, without a writer."""
    path, twin = _with(xfs / "one", bytes(range(256)) * 256), xfs / "twin"
    _with(twin, path.read_bytes())
    with extents_of(path) as extents, extents.hold(0, 65536) as held:
        assert not held.moved()
        with path.open("rb") as one, twin.open("rb") as two:
            request = struct.pack("=QQHHIqQQiI", 0, 65536, 1, 0, 0, one.fileno(), 0, 0, 0, 0)
            answer = fcntl.ioctl(two, _DEDUPE, request)
        assert struct.unpack("=QQHHIqQQiI", answer)[7:9] == (65536, 0), "not deduplicated"
        assert held.moved()
    path.unlink()
    twin.unlink()


def test_changed_times_are_seen(written: tuple[Path, bytes]) -> None:
    path, _ = written
    with extents_of(path) as extents, extents.hold(0, MIB) as held:
        assert not held.moved()
        path.chmod(0o600)
        assert held.moved()


# ---- Refused


def test_a_file_that_is_open_for_writing(
    written: tuple[Path, bytes], buffer: GpuMappedBuffer
) -> None:
    path, data = written
    with path.open("r+b"):
        as_a_file(path, buffer, data, "it is open for writing")


def test_holes_and_what_was_never_written(file_system: Path, buffer: GpuMappedBuffer) -> None:
    path = file_system / "holes"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * 400)
        file.flush()
        punch(file.fileno(), 8192, 4096)
    as_a_file(path, buffer, path.read_bytes(), "it has a hole")
    with gdsdirect.open(path, extents=True) as whole:
        data = path.read_bytes()
        assert read_and_compare(whole, buffer, data, 12288, 5000, 0).path is PASSTHROUGH
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 200_000)
    as_a_file(path, buffer, path.read_bytes(), "it has extents that are unwritten")
    path.unlink()


@pytest.mark.parametrize("name", ["overlay", "looped", "tmpfs"])
def test_other_file_systems(
    name: str, buffer: GpuMappedBuffer, request: pytest.FixtureRequest
) -> None:
    why = {
        "overlay": "its file system is",
        "looped": "its device, loop[0-9]+, is no NVMe namespace",
        "tmpfs": "",
    }[name]
    path = _with(request.getfixturevalue(name) / "data", data := os.urandom(50_000))
    with gdsdirect.open(path, extents=True) as file:
        result = read_and_compare(file, buffer, data, 1, 49_000, 0)
        assert result.path is not PASSTHROUGH
        with pytest.raises(WayClosedError, match=f"NVME_PASSTHROUGH, {why}"):
            file.read_into(buffer, size=1, require=PASSTHROUGH)
    path.unlink()


def test_a_device_has_no_extents(buffer: GpuMappedBuffer) -> None:
    drive = DRIVES["far"]
    with gdsdirect.open(drive.disk, extents=True) as file:
        result = read_and_compare(file, buffer, drive.image, 0, 4096, 0)
        assert "a device has no extents" in str(result.why)
    with gdsdirect.open(drive.generic, extents=True) as raw:
        assert read_and_compare(raw, buffer, drive.image, 0, 4096, 0).path is PASSTHROUGH


def test_data_in_the_journal(journalled: Path, buffer: GpuMappedBuffer) -> None:
    """The newest bytes may be in the journal alone, and the kernel reads such files by copies."""
    path = _with(journalled / "data", data := os.urandom(100_000))
    with path.open("rb") as file, pytest.raises(RefusedError, match="the kernel doesn't say"):
        _require_blocks_of_its_own(file.fileno())
    with gdsdirect.open(path, extents=True) as origin:
        result = read_and_compare(origin, buffer, data, 0, 100_000, 0)
    assert result.path is DataPath.BUFFERED
    assert "its file system reads this file without O_DIRECT only" in str(result.why)


def why_not_as_nobody(path: Path) -> str:
    """What an ordinary user is told. A fork, who may not read the interpreter's own files."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with gdsdirect.open(path, extents=True) as file:
                told = str(file.read_into(bytearray(4096), size=4096).why)
        except BaseException as error:
            told = repr(error)
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return told


def test_who_may_not_keep_others_from_writing(ext4: Path, buffer: GpuMappedBuffer) -> None:
    path = _with(ext4 / "roots", data := os.urandom(8192))
    with gdsdirect.open(path, extents=True) as file:  # loads all that the fork needs
        read_and_compare(file, buffer, data, 0, 8192, 0)
    ext4.chmod(0o755)
    for folder in ext4.parents:
        with contextlib.suppress(OSError):  # the root, which all may read
            folder.chmod(folder.stat().st_mode | 0o005)
    node = FILE_SYSTEMS["ext4"].generic
    node.chmod(0o600)
    assert f"{node} can't be opened" in why_not_as_nobody(path)
    node.chmod(0o644)
    if guest.EXPECTED.commands_for_everyone:
        told = why_not_as_nobody(path)
        assert "only its owner, or who has CAP_LEASE, may keep others from changing it" in told
    node.chmod(0o600)
    path.unlink()


# ---- Writers meanwhile


def test_a_writer_meanwhile(file_system: Path, buffer: GpuMappedBuffer) -> None:
    """Cut off, extended, punched, written and moved all the time, and never held open for long:
    each byte is 0 or the one of its place, and some reads go by extents."""
    path, stop = file_system / "busy", threading.Event()
    data = random.Random(9).randbytes(MIB)
    _with(path, data)
    failures: list[BaseException] = []
    writer = threading.Thread(target=_change, args=(path, data, stop, failures))
    writer.start()
    chance, taken = random.Random(10), set()
    try:
        with gdsdirect.open(path, extents=True) as file:
            for _ in range(150):
                where = random_range(chance, len(data), buffer.nbytes)
                result = check_own_or_zero(file, buffer, data, where)
                taken.update(result.ways if result is not None else ())
    finally:
        stop.set()
        writer.join()
    assert not failures
    assert PASSTHROUGH in taken
    path.unlink()


def _change(path: Path, data: bytes, stop: threading.Event, failures: list[BaseException]) -> None:
    chance = random.Random(11)
    try:
        while not stop.is_set():
            at, size = chance.randrange(len(data)), chance.randrange(1, 200_000)
            with path.open("r+b", buffering=0) as file:
                match chance.randrange(4):
                    case 0:
                        file.truncate(at)
                        file.truncate(len(data))
                        os.pwrite(file.fileno(), data[at:], at)
                    case 1:
                        punch(file.fileno(), at, size)
                        os.pwrite(file.fileno(), data[at : at + size], at)
                    case 2:
                        os.pwrite(file.fileno(), data[at : at + size], at)
                    case _:
                        _defragment(path, file.fileno(), len(data))
            stop.wait(0.005)
    except BaseException as error:
        failures.append(error)


def _defragment(path: Path, fd: int, nbytes: int) -> None:
    """Give the file other blocks, as e4defrag does; on XFS those of a copy."""
    with path.with_name("donor").open("w+b") as donor:
        os.posix_fallocate(donor.fileno(), 0, nbytes)
        blocks = nbytes // 4096
        request = struct.pack("=IIQQQQ", 0, donor.fileno(), 0, 0, blocks, 0)
        try:
            fcntl.ioctl(fd, _MOVE, request)
        except OSError as error:  # not ext4, or a part of it is a hole
            if error.errno not in (errno.ENOTTY, errno.ENODATA, errno.EINVAL, errno.EBUSY):
                raise
    path.with_name("donor").unlink()


def test_the_file_is_a_file_again(written: tuple[Path, bytes], buffer: GpuMappedBuffer) -> None:
    """No lease is left behind."""
    path, data = written
    with File(path, extents=True) as file:
        read_and_compare(file, buffer, data, 5, 70_000, 3)
        with open(os.open(path, os.O_RDWR | os.O_NONBLOCK), "r+b") as writer:
            writer.write(b"changed")
        read_and_compare(file, buffer, b"changed" + data[7:], 0, 70_000, 3)
