"""The stress program chaos.py: a minute of it, and that it sees what is wrong."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos import SLACK, Counts, Report, has_grown, judge_round
from chaos_checks import (
    REGION,
    Attempt,
    Course,
    Library,
    Part,
    Place,
    Region,
    WrongError,
    make_files,
    says_closed,
)
from chaos_rings import Case
from support import build_wheel

import gdsdirect
from gdsdirect import File, GpuMappedBuffer

TESTS = Path(__file__).parent
SECONDS = 40


def test_a_minute(tmp_path: Path) -> None:
    """On a build whose threads step aside at random, see csrc/chaos.h."""
    done = build_wheel(tmp_path, CFLAGS="-O1 -g -DGDSDIRECT_CHAOS")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    assert has_points(tmp_path / "installed" / "gdsdirect")
    done = subprocess.run(
        [sys.executable, TESTS / "chaos.py", "--seconds", str(SECONDS), "--seed", seed()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "nothing was wrong" in done.stdout


def seed() -> str:
    """Another one each time; the report has it."""
    return str(random.SystemRandom().randrange(1 << 30))


def has_points(package: Path) -> bool:
    (extension,) = package.glob("_uring_cmd*.so")
    return b"GDSDIRECT_CHAOS_SEED" in extension.read_bytes()


def test_no_other_build_has_points() -> None:
    assert not has_points(Path(gdsdirect.__file__).parent)


# ---- What a round tells


def play(tmp_path: Path, planted: str) -> Report:
    """A round of readers alone, with something planted that is wrong."""
    make_files(tmp_path)
    script = f"""
import os, sys, threading, time
sys.path.insert(0, {str(TESTS)!r})
import chaos
from gdsdirect import AsyncUringStream, File, GpuMappedBuffer
chaos.KINDS = {{chaos.Reader: (1.0, 2)}}
chaos._SETTLING = 1.0
plain = File.read_into
{planted}
sys.exit(chaos.main(sys.argv[1:]))
"""
    options = ("--one", "1", "--folder", tmp_path, "--round-seconds", "1", "--patience", "4")
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *options], capture_output=True, text=True, check=False
    )
    report = Report()
    judge_round(report, 1, done.returncode, done.stdout, done.stderr)
    return report


def test_a_round_in_which_nothing_is_wrong(tmp_path: Path) -> None:
    report = play(tmp_path, "")
    assert report.seen == {}
    assert report.turns["Reader"] > 0


@pytest.mark.parametrize(
    ("planted", "kind"),
    [
        ("File.read_into = lambda *_, **__: os.abort()", "SIGABRT < <lambda> < make"),
        ("File.read_into = lambda *_, **__: time.sleep(1000)", "HANG: Reader reading"),
        ("File.read_into = lambda *_, **__: [][0]", "IndexError: list index out of range < "),
        (
            "def read_into(self, buffer, *, offset, **others):\n"
            "    return plain(self, buffer, offset=offset ^ 1, **others)\n"
            "File.read_into = read_into",
            "a read brought bytes of another file or place",
        ),
        (
            "def read_into(self, buffer, **others):\n"
            "    os.open('/dev/null', os.O_RDONLY)\n"
            "    return plain(self, buffer, **others)\n"
            "File.read_into = read_into",
            "left when all was closed: descriptors: {'null': _}, _ more",
        ),
        (
            "def read_into(self, buffer, **others):\n"
            "    kept.append(GpuMappedBuffer.from_host_visible(1))\n"
            "    return plain(self, buffer, **others)\n"
            "kept = []\n"
            "File.read_into = read_into",
            "left when all was closed: buffers, _ more",
        ),
        (
            "def read_into(self, buffer, **others):\n"
            "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
            "    return plain(self, buffer, **others)\n"
            "File.read_into = read_into",
            "left when all was closed: threads, _ more",
        ),
    ],
    ids=["crash", "hang", "exception", "bytes", "descriptor", "buffer", "thread"],
)
def test_what_is_planted_is_told(planted: str, kind: str, tmp_path: Path) -> None:
    assert any(each.startswith(kind) for each in play(tmp_path, planted).seen)


def test_the_crash_of_a_round_is_told_with_its_functions() -> None:
    report = Report()
    frames = "".join(f'  File "a.py", line 1 in {name}\n' for name in ("wait", "turn", "run"))
    stack = f"Fatal Python error: Segmentation fault\n\nCurrent thread 0x1:\n{frames}\nThread 0x2:"
    judge_round(report, 7, -11, "", stack)
    judge_round(report, 8, -6, "", "double free or corruption (fasttop)\n" + stack)
    assert {kind: seen.seeds for kind, seen in report.seen.items()} == {
        "SIGSEGV < wait < turn": [7],
        "SIGABRT (double free or corruption (fasttop)) < wait < turn": [8],
    }


# ---- What is compared


@pytest.fixture
def library(tmp_path: Path) -> Library:
    make_files(tmp_path)
    return Library(tmp_path)


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place(2)
    yield place
    place.buffer.close()


@pytest.fixture
def file(library: Library) -> Iterator[File]:
    with gdsdirect.open(library.long[-1]) as file:
        yield file


def put(region: Region, at: int, some: bytes) -> None:
    with region.buffer.view() as view:
        view[region.start + at : region.start + at + len(some)] = some


def test_whose_bytes_are_told(library: Library) -> None:
    path, other = library.long[0], library.long[1]
    right = library.bytes[path][100:200]
    library.compare(right, path, 100, "it")
    for wrong, told in (
        (library.bytes[other][:100], "bytes of another file or place"),
        (library.bytes[path][:100], "bytes of another file or place"),
        (bytes(100), "zeros"),
        (right[:50] + bytes(range(50)), "bytes from nowhere"),
        (right[:-1] + b"\xff" if right[-1] != 0xFF else b"\0", "bytes too few to tell whose"),
        (right + library.bytes[path][-4000:] * 2, "more bytes than there are"),
    ):
        with pytest.raises(WrongError, match=f"it brought {told}"):
            library.compare(wrong, path, 100, "it")


def test_a_region_that_is_written_to_later(library: Library, place: Place, file: File) -> None:
    region = place.regions[1]
    region.settle(library)
    Attempt(library, file, region, [Part(5, 100, region.start + 9)]).make()
    region.settle(library)
    put(region, 500, b"x")
    with pytest.raises(WrongError, match="when no read was under way"):
        region.settle(library)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_read_that_writes_beside_its_parts(
    parts: int, library: Library, place: Place, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = place.regions[0]
    for name in ("read_into", "read_many_into"):
        plain: Callable[..., object] = getattr(File, name)

        def read(
            self: File,
            buffer: GpuMappedBuffer,
            *args: object,
            plain: Callable[..., object] = plain,
            **others: object,
        ) -> object:
            result = plain(self, buffer, *args, **others)
            put(region, 30_000, b"x")
            return result

        monkeypatch.setattr(File, name, read)
    attempt = Attempt(library, file, region, [Part(1, 99, 100 * part) for part in range(parts)])
    with pytest.raises(WrongError, match="beside its parts"):
        attempt.make()


def test_a_gap_that_is_written_to(place: Place) -> None:
    place.check()
    put(place.regions[0], REGION, b"x")
    with pytest.raises(WrongError, match="beyond its part"):
        place.check()


def test_chunks_that_are_left_out(library: Library) -> None:
    path = library.long[-1]
    size = len(library.bytes[path])
    with gdsdirect.stream_files([path], bytearray(1 << 20), chunk_size=100_000) as stream:
        course = Course(library, [(path, 0, size)])
        course.take(next(stream))
        with pytest.raises(WrongError, match="before its end"):
            course.end()
        next(stream)
        with pytest.raises(WrongError, match="left something out"):
            course.take(next(stream))


def test_completions_that_come_twice_or_not_at_all(library: Library, file: File) -> None:
    chance = random.Random(1)
    case = Case(library, chance, lambda: False)
    try:
        while not case.stream.inflight:
            case.submit(chance, file)
        case.feed(100)
        some = case.stream.wait(1)
        case.take(some)
        with pytest.raises(WrongError, match="twice, or from nowhere"):
            case.take(some)
        case.submit(chance, file)
        case.feed(100)
        assert case.stream.wait(1)
        with pytest.raises(WrongError, match="lost"):
            case.drain(lambda _: None)
    finally:
        case.close(0, lambda _: None)


def test_errors_that_say_that_something_is_closed(file: File) -> None:
    assert not says_closed(ValueError("it is closed"), [file])
    file.close()
    assert says_closed(ValueError("it is closed"), [file])
    assert not says_closed(ValueError("it is odd"), [file])
    assert not says_closed(OSError("it is closed"), [file])


def test_memory_that_grows() -> None:
    rising = [round * SLACK // 4 for round in range(40)]
    assert has_grown(rising)
    assert not has_grown([*rising[:10], *([rising[9]] * 30)])
    assert not has_grown(rising[:3])
    assert not has_grown([0, SLACK] * 20)


def test_pinned_memory_is_counted() -> None:
    before = Counts.now()
    buffer = GpuMappedBuffer.from_host_visible(1 << 20)
    with gdsdirect.AsyncUringStream(buffer, register=True):
        grown = Counts.now().grown(before, 0)
    assert any(each.startswith("pinned memory") for each in grown)
    assert any(each.startswith("buffers") for each in grown)
    buffer.close()
