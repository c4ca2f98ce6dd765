"""`gdsdirect bench` of files. Of a namespace: tests/lab/test_command_line.py."""

import contextlib
import json
import os
import pty
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gdsdirect import AsyncUringStream, DataPath, bench, cli
from gdsdirect.bench import Bench, Cell, Pattern, Settings

SCRIPT = str(Path(sys.executable).with_name("gdsdirect"))
KIB = 1 << 10
SIZE = (1 << 20) + 12345
FILE_WAYS = ("FILE_FIXED", "FILE_DIRECT", "BUFFERED")
SHORT = ("--seconds", "0.02", "--rounds", "1", "--block-sizes", "4K", "--depths", "2")


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random("bench").randbytes(SIZE)


@pytest.fixture
def data(tmp_path: Path, content: bytes) -> Iterator[Path]:
    """A file, which must be as it was when the test ends."""
    path = tmp_path / "data"
    path.write_bytes(content)
    before = path.stat().st_mtime_ns
    yield path
    assert path.read_bytes() == content
    assert path.stat().st_mtime_ns == before


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, "bench", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def measured(*arguments: object) -> dict[str, Any]:
    """What it writes as JSON, and nothing else, on stdout."""
    done = run(*arguments, "--json", "-")
    assert (done.returncode, done.stderr != "") == (0, True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


# ---- Figures


def test_a_file(data: Path, tmp_path: Path) -> None:
    """Table, JSON and plot."""
    table, picture = tmp_path / "out.json", tmp_path / "out.png"
    more = ("--block-sizes", "4K,64K", "--depths", "1,4", "--seconds", "0.02", "--rounds", "2")
    done = run(data, *more, "--seed", "7", "--json", table, "--plot", picture)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(table.read_text())
    cells, closed = told.pop("cells"), told.pop("closed")
    assert told == {
        "path": str(data),
        "size": SIZE,
        "memory": "host_visible",
        "pattern": "random",
        "seconds": 0.02,
        "rounds": 2,
        "seed": 7,
        "kernel": os.uname().release,
        "refused": [],
        "failed": [],
    }
    is_open = {way.value for way in DataPath} - {each["way"] for each in closed}
    assert "buffered" in is_open
    found = [(cell["way"], cell["block_size"], cell["depth"]) for cell in cells]
    assert sorted(found) == sorted(
        (way, size * KIB, depth) for way in is_open for size in (4, 64) for depth in (1, 4)
    )
    lines = {tuple(re.split(r"\s{2,}", line.strip())[:3]) for line in done.stdout.splitlines()}
    for way, size, depth in found:
        assert (f"{size // KIB} KiB", way.upper(), str(depth)) in lines
    assert f"{data}, {SIZE} B: random reads into host memory, 2 rounds of 0.02 s" in done.stdout
    check_picture(picture)


def check_picture(path: Path) -> None:
    """A PNG, of a size to look at."""
    image = path.read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    width, height = struct.unpack(">II", image[16:24])
    assert 1000 < width < 3000
    assert 300 < height < 3000
    assert b"IEND" in image[-12:]


def test_the_figures_agree(data: Path) -> None:
    told = measured(data, *SHORT, "--rounds", "3", "--depths", "1,5")
    assert told["cells"]
    for cell in told["cells"]:
        rounds = cell["rounds"]
        assert len(rounds) == 3
        assert cell["iops"] == sorted(each["iops"] for each in rounds)[1]
        assert cell["bytes_per_second"] == cell["iops"] * cell["block_size"]
        assert cell["mean_latency_seconds"] == cell["depth"] / cell["iops"]
        for each in rounds:
            assert each["iops"] == each["reads"] / each["seconds"]
            assert each["seconds"] >= 0.02
            assert each["reads"] > 0
        costs = sorted(each["cpu_seconds"] / each["reads"] for each in rounds)
        assert costs[0] > 0
        assert cell["cpu_seconds_per_gib"] == pytest.approx(costs[1] * (1 << 30) / 4096)
        assert cell["registered"] == (cell["way"] != "file_direct")


def test_each_time_other_places_unless_a_seed_is_given(data: Path) -> None:
    seeds = [measured(data, *SHORT, "--ways", "buffered")["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_nothing_but_json_on_stdout(data: Path) -> None:
    done = run(data, *SHORT, "--json", "-")
    assert json.loads(done.stdout)["cells"]
    assert "mean latency" in done.stderr


# ---- Reads


def settings(data: Path, **more: Any) -> Settings:
    given: dict[str, Any] = {
        "ways": [DataPath.BUFFERED],
        "block_sizes": [4096],
        "depths": [1],
        "pattern": Pattern.RANDOM,
        "seconds": 0.02,
        "rounds": 1,
        "seed": 1,
    }
    return Settings(str(data), **{**given, **more})


def test_as_many_are_in_flight_as_asked_for(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it waits for one to come back."""
    seen = []

    class Watched(AsyncUringStream):
        def wait_into(self, *arguments: Any) -> int:
            seen.append((self.depth, self.inflight))
            return super().wait_into(*arguments)

    monkeypatch.setattr(bench, "AsyncUringStream", Watched)
    ways = [DataPath.FILE_FIXED, DataPath.FILE_DIRECT, DataPath.BUFFERED]
    with Bench(settings(data, ways=ways, depths=[1, 3, 64])) as it:
        assert it.run(lambda: None).failed == {}
    assert {depth for depth, _ in seen} == {1, 3, 64}
    assert [inflight for depth, inflight in seen if inflight != depth] == []


@pytest.mark.parametrize("depth", [1, 7, 32768])
def test_places(data: Path, depth: int) -> None:
    """All in the file, at whole blocks; random ones everywhere, others one after the other."""
    size = 3000
    blocks = SIZE // size
    cell = Cell(DataPath.BUFFERED, size, depth)
    with Bench(settings(data)) as it:
        places = it._places(cell, random.Random(1))
    assert set(places) == {block * size for block in range(blocks)}
    assert len(places) % depth == 0
    assert places[-depth:] == places[:depth]
    with Bench(settings(data, pattern=Pattern.SEQUENTIAL)) as it:
        places = it._places(cell, random.Random(1))
    first = places[0] // size
    laid_out = len(places) - depth
    assert list(places[:laid_out]) == [(first + n) % blocks * size for n in range(laid_out)]
    assert places[-depth:] == places[:depth]


def test_sequential(data: Path) -> None:
    told = measured(data, *SHORT, "--pattern", "sequential")
    assert told["pattern"] == "sequential"
    assert told["failed"] == []


def test_more_reads_than_are_laid_out(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_PLACES", 20)
    with Bench(settings(data, depths=[1, 3, 20])) as it:
        results = it.run(lambda: None)
    assert len(results.cells) == 3
    assert all(each.rounds[0].reads > 40 for each in results.cells)


# ---- What can't be measured


def test_a_way_that_is_closed(data: Path, tmp_path: Path) -> None:
    """With the reason; and where nothing else was asked for, the exit code is 1."""
    table, picture = tmp_path / "out.json", tmp_path / "out.png"
    done = run(data, *SHORT, "--ways", "passthrough,cufile", "--json", table, "--plot", picture)
    assert done.returncode == 1
    told = json.loads(table.read_text())
    assert told["cells"] == []
    passthrough, cufile = told["closed"]
    assert passthrough["way"] == "nvme_passthrough"
    assert passthrough["why"].startswith("it is not an NVMe namespace (/dev/ngXnY)")
    assert cufile["way"] == "cufile"
    assert cufile["why"].startswith("cuFile reads into GPU memory")
    assert "NVME_PASSTHROUGH is closed: it is not an NVMe namespace" in done.stdout
    check_picture(picture)


def test_block_sizes_that_the_path_does_not_take(data: Path) -> None:
    told = measured(data, *SHORT, "--block-sizes", "1000,2M,4K")
    closed = {each["way"] for each in told["closed"]}
    direct = {"file_fixed", "file_direct"} - closed
    refused = {(each["way"], each["block_size"]): each["why"] for each in told["refused"]}
    for way in (*direct, "buffered"):
        assert refused.pop((way, 2 << 20)) == f"the path has no more than {SIZE} bytes"
    for way in direct:
        assert re.fullmatch(
            r"direct reads of it are multiples of (512|4096) bytes", refused.pop((way, 1000))
        )
    assert refused == {}
    assert {(cell["way"], cell["block_size"]) for cell in told["cells"]} == {
        *((way, 4096) for way in direct),
        ("buffered", 4096),
        ("buffered", 1000),
    }


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    done = run(tmp_path / "empty", *SHORT)
    assert done.returncode == 1
    assert "BUFFERED, 4 KiB, is refused: the path has no more than 0 bytes" in done.stdout


def test_a_cell_with_short_reads_has_failed(tmp_path: Path) -> None:
    """The file is cut to half when the first of three cells is done."""
    path = tmp_path / "shrinking"
    path.write_bytes(bytes(SIZE))
    with Bench(settings(path, depths=[1, 2, 3], rounds=2)) as it:
        results = it.run(lambda: os.truncate(path, 4 * KIB))
    assert results.cells == ()
    assert tuple(results.failed) == tuple(it.cells)  # in that order, whatever they were tried in
    for why in results.failed.values():
        assert re.match(r"read 0 of 4096 bytes at offset [1-9]\d*; the file ends there", why)
    told = results.to_dict()["failed"]
    assert {"way", "block_size", "depth", "why"} == set(told[0])


def test_memory_that_is_not_to_be_had(data: Path) -> None:
    """A cell's own failure, and the others go on."""
    script = (
        "import resource, sys; from gdsdirect import cli; "
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31)); "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    more = ("--ways", "buffered", "--depths", "1,8192", "--block-sizes", "1M", "--seconds", "0.02")
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "bench", str(data), *more, "--rounds", "1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "BUFFERED, 1 MiB, depth 8192, failed: Cannot allocate memory" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{data}", "--json", "{data}"], "--json {data} is SOURCE itself, which is never written"),
        (["{data}", "--json", "{link}"], "--json {link} is SOURCE itself, which is never written"),
        (["{data}", "--plot", "{link}"], "--plot {link} is SOURCE itself, which is never written"),
        (["{data}.missing"], "data.missing: No such file or directory"),
        (["{folder}"], "is neither a file nor a device"),
        (["/dev/null"], "/dev/null is the character device null, not an NVMe namespace"),
        (["{data}", "--to", "peer:{data}"], "is a regular file, whose pages are RAM"),
    ],
)
def test_what_is_refused_is_said_in_one_line(
    data: Path, tmp_path: Path, arguments: Sequence[str], text: str
) -> None:
    link = tmp_path / "link.png"
    link.hardlink_to(data)
    names = {"data": data, "link": link, "folder": tmp_path}
    done = run(*(part.format(**names) for part in arguments), *SHORT)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert text.format(**names) in line
    assert {path.name for path in tmp_path.iterdir()} == {"data", "link.png"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "SOURCE"),
        (["x", "--block-sizes", "4K,many"], "'many' is no size"),
        (["x", "--block-sizes", "0"], "'0' is no block size: give 1 byte or more"),
        (["x", "--depths", "0"], "'0' is no count: give 1 to 32768"),
        (["x", "--depths", "1,32769"], "'32769' is no count"),
        (["x", "--rounds", "-1"], "'-1' is no count: give 1 or more"),
        (["x", "--ways", "fixed,fast"], "'fast' is no way: give some of passthrough,fixed,"),
        (["x", "--seconds", "0"], "'0' is no time: give seconds"),
        (["x", "--seconds", "inf"], "'inf' is no time"),
        (["x", "--pattern", "zigzag"], "'zigzag'"),
        (["x", "--to", "gpu"], "'gpu' is no target: give host or peer:PATH"),
        (["x", "--plot", "plot.svg"], "'plot.svg' is no PNG file: give a name ending in .png"),
    ],
)
def test_wrong_arguments(arguments: Sequence[str], text: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert text in done.stderr


# ---- Packages that may be missing


def test_without_rich_the_table_is_plain_text(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same words in the same columns."""
    shapes = []
    for missing in (False, True):
        if missing:
            for name in ("rich", "rich.console", "rich.table"):
                monkeypatch.setitem(sys.modules, name, None)
        assert cli.main(["bench", str(data), *SHORT]) == 0
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        shapes.append([re.sub(r"[\d.,]+", "0", re.sub(" +", " ", line)) for line in lines])
    with_rich, without = shapes
    assert without == with_rich
    assert sum("KiB" in line for line in without) >= 1


def test_without_matplotlib_there_is_no_plot(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And nothing is measured in vain."""
    monkeypatch.delitem(sys.modules, "gdsdirect.bench_plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", str(data), *SHORT, "--plot", str(tmp_path / "plot.png")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gdsdirect: --plot needs matplotlib (")
    assert err.endswith("): run `pip install 'gdsdirect[bench]'`\n")
    assert not (tmp_path / "plot.png").exists()


def test_a_progress_bar_on_a_terminal(data: Path) -> None:
    ours, theirs = pty.openpty()
    command = [SCRIPT, "bench", str(data), *SHORT, "--ways", "buffered", "--rounds", "2"]
    with open(ours, "rb", buffering=0) as terminal:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=theirs,
            timeout=60,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        )
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO, at the end
            while True:
                shown += terminal.read(1 << 16)
    assert done.returncode == 0
    assert b"0/2" in shown
    assert b"2/2" in shown
