"""The command line, as the installed console script. Namespaces and peer memory: tests/lab."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from gdsdirect import cli
from gdsdirect.probe import Available, FeatureDisabled, Unavailable, UnavailableReason

SCRIPT = str(Path(sys.executable).with_name("gdsdirect"))


def gdsdirect(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger than the buffer that `read` takes, and no multiple of anything."""
    path = tmp_path_factory.mktemp("cli") / "data"
    path.write_bytes(os.urandom((17 << 20) + 12345))
    return path


def test_a_whole_file(data: Path) -> None:
    done = gdsdirect("read", str(data), "--sha256")
    assert done.returncode == 0
    assert done.stdout.decode() == hashlib.sha256(data.read_bytes()).hexdigest() + "\n"
    assert done.stderr.decode().startswith(f"{data}: {data.stat().st_size} bytes by ")
    assert any(way in done.stderr.decode() for way in ("FILE_FIXED", "FILE_DIRECT", "BUFFERED"))


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (1, 1), (4095, 2), (4096, 4096), (12345, 9_876_543), (17 << 20, 12345), (5, 0)],
)
def test_a_part_of_a_file(data: Path, tmp_path: Path, offset: int, size: int) -> None:
    expected = data.read_bytes()[offset : offset + size]
    output = tmp_path / "output"
    where = ("--offset", str(offset), "--size", str(size))
    assert gdsdirect("read", str(data), *where, "--output", str(output)).returncode == 0
    assert output.read_bytes() == expected
    done = gdsdirect("read", str(data), *where, "--output", "-", "--sha256")
    assert done.stdout == expected
    assert hashlib.sha256(expected).hexdigest() in done.stderr.decode()


def test_sizes_have_units(data: Path) -> None:
    done = gdsdirect("read", str(data), "--offset", "0x10K", "--size", "1M", "--output", "-")
    assert done.stdout == data.read_bytes()[16 << 10 :][: 1 << 20]


def test_output_that_is_not_buffered(data: Path) -> None:
    """A pipe then takes less than it is given, when a completion interrupts the call."""
    done = subprocess.run(
        [SCRIPT, "read", str(data), "--output", "-"],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.stdout == data.read_bytes()


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    done = gdsdirect("read", str(tmp_path / "empty"), "--sha256")
    assert (done.returncode, done.stdout.decode().strip()) == (0, hashlib.sha256().hexdigest())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{data}", "--offset", "20M"], "has 17838137 bytes: --offset 20971520 end beyond them"),
        (["{data}", "--offset", "17M", "--size", "1M"], "and --size 1048576 end beyond"),
        (["{data}.missing"], "data.missing: No such file or directory"),
        (["{data}", "--output", "{data}"], "is SOURCE itself, which is never written to"),
        (["{folder}"], "is neither a file nor a device"),
        (["/dev/null"], "/dev/null is the character device null, not an NVMe namespace"),
        (["/proc/version"], "a file without an end"),
        (["{data}", "--to", "peer:{data}"], "is a regular file, whose pages are RAM"),
        (["{data}", "--to", "peer:/sys/missing"], "/sys/missing: no peer memory|no such file"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    data: Path, arguments: Sequence[str], text: str
) -> None:
    before = data.read_bytes()
    filled = [part.format(data=data, folder=data.parent) for part in arguments]
    done = gdsdirect("read", *filled)
    assert (done.returncode, done.stdout) == (1, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("gdsdirect: ")
    assert any(part in line for part in text.split("|"))
    assert data.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["read"], "SOURCE"),
        (["read", "x", "--size", "-1"], "'-1' is no size"),
        (["read", "x", "--size", "many"], "'many' is no size"),
        (["read", "x", "--to", "gpu"], "'gpu' is no target: give host or peer:PATH"),
        (["read", "x", "--to", "peer:"], "'peer:' is no target"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments(arguments: Sequence[str], text: str) -> None:
    done = gdsdirect(*arguments)
    assert done.returncode == 2
    assert text in done.stderr.decode()


def test_version() -> None:
    done = gdsdirect("--version")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == f"gdsdirect {version('gdsdirect')}\n"


def test_a_reader_that_goes_away(data: Path) -> None:
    with subprocess.Popen(
        [SCRIPT, "read", str(data), "--output", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("result", "code", "line"),
    [
        (Available("\n GDS Version: 1.14 \nmore"), 0, "available: GDS Version: 1.14"),
        (Unavailable(UnavailableReason.EMPTY), 1, f"unavailable: {UnavailableReason.EMPTY}"),
        (FeatureDisabled(), 2, "feature disabled: this system or this build"),
    ],
)
def test_probe(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    result: object,
    code: int,
    line: str,
) -> None:
    """The three results in place of what this machine has, which is one of them."""
    monkeypatch.setattr(cli, "probe", lambda: result)
    assert cli.main(["probe"]) == code
    out = capsys.readouterr().out
    assert out.startswith(line)
    assert out.count("\n") == 1


def test_probe_of_this_machine() -> None:
    done = gdsdirect("probe")
    assert done.returncode in (0, 1), "the ring was built"
    assert done.stdout.startswith(b"available: " if done.returncode == 0 else b"unavailable: ")
