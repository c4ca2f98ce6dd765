"""The parsers of nvidia-fs's files: a real text, what other versions print, and anything else."""

from __future__ import annotations

import dataclasses
import doctest
import pickle
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdsdirect import nvidia_fs
from gdsdirect.nvidia_fs import (
    NvidiaFsGpu,
    NvidiaFsStats,
    parse_nvidia_fs_modules,
    parse_nvidia_fs_stats,
    parse_nvidia_fs_version,
)

SAMPLE = Path(__file__).with_name("samples").joinpath("nvidia-fs-stats-2.25.7.txt").read_text()
SAMPLE_LINES = SAMPLE.split("\n")

# Written from the formats of driver 2.25.7, with both kinds of IO stats on.
ALL_ON = """\
GDS Version: 1.14.0.31\x20
NVFS statistics(ver: 4.0)
NVFS Driver(version: 2.25.7)
Mellanox PeerDirect Supported: False
IO stats: Enabled, peer IO stats: Enabled
Logging level: debug

Active Shadow-Buffer (MiB): 256
Active Process: 3
Batches\t\t\t\t: n=7 ok=6 err=1 Avg-Submit-Latency(usec)=50
Reads\t\t\t\t: n=10 ok=8 err=2 readMiB=40 io_state_err=1
Reads\t\t\t\t: Bandwidth(MiB/s)=12 Avg-Latency(usec)=34
Sparse Reads\t\t        : n=1 io=2 holes=3 pages=4\x20
Writes\t\t\t\t: n=5 ok=5 err=0 writeMiB=20 io_state_err=0 pg-cache=9 pg-cache-fail=3 pg-cache-eio=4
Writes\t\t\t\t: Bandwidth(MiB/s)=56 Avg-Latency(usec)=78
Mmap\t\t\t\t: n=183 ok=183 err=0 munmap=180
Bar1-map\t\t\t: n=183 ok=183 err=0 free=165 callbacks=18 active=0 delay-frees=2
Error\t\t\t\t: cpu-gpu-pages=0 sg-ext=5 dma-map=0 dma-ref=4294967295
Ops\t\t\t\t: Read=1 Write=2 BatchIO=3
GPU 0000:be:00.0  uuid:87e5c586-88ed-583b-df45-fcee0f1e7917 : \
Registered_MiB=32 Cache_MiB=16 max_pinned_MiB=64 cross_root_port(%)=12
GPU 10000:e7:1f.0  uuid:029faa3b-cb0d-2718-259c-6dc650c636eb : \
Registered_MiB=0 Cache_MiB=0 max_pinned_MiB=18446744073709551615 cross_root_port(%)=0
"""

# Before 2.7: no line of switches, another version's form; and the MB of older documents.
OLD = """\
NVFS statistics(ver: 2.0)
NVFS Driver(version: 2:7:47)

Active Shadow-Buffer (MB): 128
Active Process: 1
Reads\t\t\t\t: n=0 ok=0 err=0 readMB=0 io_state_err=0
Reads\t\t\t\t: Bandwidth(MB/s)=0 Avg-Latency(usec)=0
Bar1-map\t\t\t: n=3584 ok=3584 err=0 free=3456 callbacks=0 active=128
Error\t\t\t\t: cpu-gpu-pages=0 sg-ext=0 dma-map=0
Ops\t\t\t\t: Read=128 Write=0
GPU 0000:34:00.0  uuid:12a86a5e-3002-108f-ee49-4b51266cdc07 : \
Registered_MB=32 Cache_MB=0 max_pinned_MB=1977\x20
"""


def test_examples() -> None:
    result = doctest.testmod(nvidia_fs)
    assert result.failed == 0
    assert result.attempted > 0


# ---- Texts of the driver's


def test_the_real_text() -> None:
    assert parse_nvidia_fs_stats(SAMPLE) == NvidiaFsStats(
        gds_version="1.14.0.31",
        stats_version="4.0",
        driver_version="2.25.7",
        peer_direct=True,
        io_stats=False,
        peer_io_stats=False,
        logging_level="info",
        active_shadow_buffer_mib=0,
        active_process=0,
        counters={
            "Reads": {"err": 0, "io_state_err": 0},
            "Sparse Reads": {"n": 0, "io": 0, "holes": 0, "pages": 0},
            "Writes": {
                "err": 0,
                "io_state_err": 0,
                "pg-cache": 0,
                "pg-cache-fail": 0,
                "pg-cache-eio": 0,
            },
            "Mmap": {"n": 1, "ok": 1, "err": 0, "munmap": 2},
            "Bar1-map": {
                "n": 1,
                "ok": 1,
                "err": 0,
                "free": 1,
                "callbacks": 0,
                "active": 0,
                "delay-frees": 0,
            },
            "Error": {"cpu-gpu-pages": 0, "sg-ext": 0, "dma-map": 0, "dma-ref": 0},
            "Ops": {"Read": 0, "Write": 0, "BatchIO": 0},
        },
        gpus=(
            NvidiaFsGpu(
                "0000:01:00.0",
                "fb1e6550-2a78-d767-1f0d-7512eb8c552d",
                {"Registered_MiB": 0, "Cache_MiB": 0, "max_pinned_MiB": 1},
            ),
        ),
        unknown=(),
    )
    assert parse_nvidia_fs_stats(SAMPLE).errors == {}


def test_all_stats_on() -> None:
    stats = parse_nvidia_fs_stats(ALL_ON)
    assert stats.unknown == ()
    assert (stats.io_stats, stats.peer_io_stats, stats.peer_direct) == (True, True, False)
    assert (stats.logging_level, stats.active_process) == ("debug", 3)
    assert stats.active_shadow_buffer_mib == 256
    assert stats.counters["Batches"] == {"n": 7, "ok": 6, "err": 1, "Avg-Submit-Latency(usec)": 50}
    assert stats.counters["Reads"] == {
        "n": 10,
        "ok": 8,
        "err": 2,
        "readMiB": 40,
        "io_state_err": 1,
        "Bandwidth(MiB/s)": 12,
        "Avg-Latency(usec)": 34,
    }
    assert stats.counters["Writes"]["writeMiB"] == 20
    assert stats.counters["Writes"]["Avg-Latency(usec)"] == 78
    assert stats.gpus[0].values["cross_root_port(%)"] == 12
    assert stats.gpus[1].pci_address == "10000:e7:1f.0"
    assert stats.gpus[1].values["max_pinned_MiB"] == 2**64 - 1


def test_errors_are_the_counters_of_errors_that_are_not_0() -> None:
    assert parse_nvidia_fs_stats(ALL_ON).errors == {
        "Batches.err": 1,
        "Reads.err": 2,
        "Reads.io_state_err": 1,
        "Writes.pg-cache-fail": 3,
        "Writes.pg-cache-eio": 4,
        "Error.sg-ext": 5,
        "Error.dma-ref": 4294967295,
    }


def test_an_old_text() -> None:
    stats = parse_nvidia_fs_stats(OLD)
    assert stats.unknown == ()
    assert stats.gds_version is None
    assert (stats.stats_version, stats.driver_version) == ("2.0", "2.7.47")
    assert (stats.peer_direct, stats.io_stats, stats.peer_io_stats) == (None, None, None)
    assert stats.logging_level is None
    assert stats.active_shadow_buffer_mib == 128
    assert "readMB" in stats.counters["Reads"]
    assert "delay-frees" not in stats.counters["Bar1-map"]
    assert "dma-ref" not in stats.counters["Error"]
    assert "BatchIO" not in stats.counters["Ops"]
    assert stats.gpus == (
        NvidiaFsGpu(
            "0000:34:00.0",
            "12a86a5e-3002-108f-ee49-4b51266cdc07",
            {"Registered_MB": 32, "Cache_MB": 0, "max_pinned_MB": 1977},
        ),
    )


def test_spaces_and_line_ends_do_not_matter() -> None:
    expected = parse_nvidia_fs_stats(ALL_ON)
    assert parse_nvidia_fs_stats(ALL_ON.replace("\n", "\r\n")) == expected
    assert parse_nvidia_fs_stats(ALL_ON.replace("\t", " ")) == expected
    assert parse_nvidia_fs_stats(ALL_ON.replace(" \n", "\n").rstrip("\n")) == expected
    assert parse_nvidia_fs_stats(ALL_ON.replace("\n", "\n \t\n")) == expected


def test_a_gpu_line_can_end_in_a_space() -> None:
    # As the driver prints it while peer IO stats are off.
    assert parse_nvidia_fs_stats(SAMPLE.rstrip("\n") + " \n") == parse_nvidia_fs_stats(SAMPLE)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("NVFS statistics(ver:1.0)", NvidiaFsStats(stats_version="1.0")),
        ("NVFS Driver(version: 2.24)", NvidiaFsStats(driver_version="2.24")),
        ("GDS Version: 1.16.0.x", NvidiaFsStats(gds_version="1.16.0.x")),
        ("Logging level: warn", NvidiaFsStats(logging_level="warn")),
        ("New: a=1 b(%)=2.5", NvidiaFsStats(counters={"New": {"a": 1, "b(%)": 2.5}})),
        (
            "IO stats: Enabled, peer IO stats: Disabled",
            NvidiaFsStats(io_stats=True, peer_io_stats=False),
        ),
    ],
)
def test_one_line(line: str, expected: NvidiaFsStats) -> None:
    assert parse_nvidia_fs_stats(line) == expected


# ---- What is not there


def test_no_text_says_nothing() -> None:
    for text in ("", "\n", " \t\r\n\x0b\x0c\n"):
        assert parse_nvidia_fs_stats(text) == NvidiaFsStats()
    assert NvidiaFsStats().errors == {}


@pytest.mark.parametrize(
    ("start", "fields"),
    [
        ("GDS Version", ["gds_version"]),
        ("NVFS statistics", ["stats_version"]),
        ("NVFS Driver", ["driver_version"]),
        ("Mellanox", ["peer_direct"]),
        ("IO stats", ["io_stats", "peer_io_stats"]),
        ("Logging", ["logging_level"]),
        ("Active Shadow", ["active_shadow_buffer_mib"]),
        ("Active Process", ["active_process"]),
    ],
)
def test_an_absent_line_is_none(start: str, fields: list[str]) -> None:
    text = "\n".join(line for line in SAMPLE_LINES if not line.startswith(start))
    assert text != SAMPLE
    absent: dict[str, Any] = dict.fromkeys(fields)
    expected = dataclasses.replace(parse_nvidia_fs_stats(SAMPLE), **absent)
    assert parse_nvidia_fs_stats(text) == expected


@pytest.mark.parametrize("label", list(parse_nvidia_fs_stats(SAMPLE).counters))
def test_an_absent_counter_is_not_0(label: str) -> None:
    text = "\n".join(line for line in SAMPLE_LINES if not line.startswith(label))
    stats = parse_nvidia_fs_stats(text)
    assert label not in stats.counters
    assert len(stats.counters) == len(parse_nvidia_fs_stats(SAMPLE).counters) - 1


# ---- What is not understood


@pytest.mark.parametrize(
    "line",
    [
        "junk",
        ":",
        "GDS Version:",
        "GDS Version: 1.14 and more",
        "NVFS statistics(ver: 4.0",
        "NVFS Driver(version: )",
        "NVFS Driver(version: 2..7)",
        "Mellanox PeerDirect Supported: Maybe",
        "IO stats: Enabled",
        "IO stats: Enabled, peer IO stats: on",
        "Logging level: very loud",
        "Active Shadow-Buffer (KiB): 1",
        "Active Process: -1\r",
        "Active Process: 1.5",
        "Active Process: \u0661",
        "Active Process: " + "9" * 21,
        "Reads : ",
        "Reads : n",
        "Reads : n=",
        "Reads : n=1 ok=1x",
        "Reads : n=1 more",
        "Reads : n=-1",
        "Reads : n=\u0661",
        "Reads : n=" + "9" * 10_000,
        "Reads : n=1." + "9" * 10_000,
        "Reads : n=1 n=2",
        "Reads n=1",
        " : n=1",
        "\tpg-cache=0 pg-cache-fail=0 pg-cache-eio=0",
        "Re\0ads : n=1",
        "Reads : n=1\0",
        "Reads\ud800 : n=1",
        "GPU",
        "GPU : Registered_MiB=1",
        "GPU 0000:01:00.0 : Registered_MiB=1",
        "GPU 0000:01:00.0  uuid:fb1e6550-2a78-d767-1f0d-7512eb8c552d : ",
        "GPU 0000:01:00.0  uuid:fb1e6550 : Registered_MiB=1",
        "GPU 0000:01:00.8  uuid:fb1e6550-2a78-d767-1f0d-7512eb8c552d : Registered_MiB=1",
        "  indented, with spaces behind it  ",
    ],
)
def test_an_unknown_line_is_kept_as_it_is(line: str) -> None:
    assert parse_nvidia_fs_stats(line) == NvidiaFsStats(unknown=(line,))
    assert parse_nvidia_fs_stats(f"Active Process: 7\n{line}\nMmap : munmap=1") == NvidiaFsStats(
        active_process=7, counters={"Mmap": {"munmap": 1}}, unknown=(line,)
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Active Process: 1", "Active Process: 2"),
        ("NVFS Driver(version: 2.25.7)", "NVFS Driver(version: 2.25.8)"),
        ("Reads : n=1 ok=1", "Reads : n=2 err=0"),
        ("Active Shadow-Buffer (MiB): 1", "Active Shadow-Buffer (MB): 2"),
    ],
)
def test_a_line_that_contradicts_an_earlier_one_is_not_taken(first: str, second: str) -> None:
    expected = dataclasses.replace(parse_nvidia_fs_stats(first), unknown=(second,))
    assert parse_nvidia_fs_stats(f"{first}\n{second}") == expected
    assert parse_nvidia_fs_stats(f"{first}\n{first}") == parse_nvidia_fs_stats(first)


def test_results_are_frozen_values() -> None:
    stats = parse_nvidia_fs_stats(ALL_ON)
    assert pickle.loads(pickle.dumps(stats)) == stats
    for value in (stats, stats.gpus[0]):
        assert not hasattr(value, "__dict__")
        for entry in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, entry.name, None)


# ---- Any text


NOISE = [
    *("GPU", "Reads", "Ops", "IO stats", "Active Process", "GDS Version", "n", "ok", "(MiB)"),
    *("0", "1", "2.5", "9" * 5_000, "Enabled", "Disabled", ",", "%", "=", ":", " : "),
    *("0000:01:00.0", "uuid:fb1e6550-2a78-d767-1f0d-7512eb8c552d"),
    *(" ", "\t", "\r", "\x85", "\u2028", "\0", "\ud800", "\u0661"),
]


def lines_of_noise() -> st.SearchStrategy[str]:
    words = st.sampled_from(NOISE)
    pairs = st.builds("{} : {}={}".format, words, words, words)
    return st.lists(words, max_size=12).map("".join) | pairs


def any_text() -> st.SearchStrategy[str]:
    # Surrogates too, which st.text() leaves out where it is not told.
    return st.text(st.characters(exclude_categories=()), max_size=200)


@st.composite
def changed_samples(draw: st.DrawFn) -> str:
    """The lines of a driver's text, some deleted, doubled, moved, garbled or between noise."""
    lines = draw(st.sampled_from([SAMPLE, ALL_ON, OLD])).split("\n")
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["delete", "double", "move", "garble", "insert"])):
            case "delete" if len(lines) > 1:
                del lines[place]
            case "double":
                lines.insert(draw(st.integers(0, len(lines))), lines[place])
            case "move":
                line = lines.pop(place)
                lines.insert(draw(st.integers(0, len(lines))), line)
            case "garble":
                start = draw(st.integers(0, len(lines[place])))
                end = draw(st.integers(start, len(lines[place])))
                noise = draw(any_text() | lines_of_noise())
                lines[place] = lines[place][:start] + noise + lines[place][end:]
            case _:
                lines.insert(place, draw(any_text() | lines_of_noise()))
    return "\n".join(lines)


@settings(max_examples=400, deadline=None)
@given(changed_samples() | any_text() | st.lists(lines_of_noise()).map("\n".join))
def test_every_line_is_understood_or_unknown(text: str) -> None:
    stats = parse_nvidia_fs_stats(text)
    lines = [line for line in text.split("\n") if line.strip()]
    understood = [line for line in lines if line not in stats.unknown]
    assert [line for line in lines if line in stats.unknown] == list(stats.unknown)
    assert parse_nvidia_fs_stats("\n".join(understood)) == dataclasses.replace(stats, unknown=())

    # The result has each number of the lines understood, read here in the crudest way.
    values = [*stats.counters.values(), *(gpu.values for gpu in stats.gpus)]
    known = {(key, str(value)) for pairs in values for key, value in pairs.items()}
    told = {str(value) for value in dataclasses.astuple(stats)[:9]}
    for line in understood:
        pairs = re.findall(r"([^\s:=]+)=(\S+)", line)
        assert all((key, normal(value)) in known for key, value in pairs)
        last = line.partition(":")[2].split()[-1].strip(")")
        assert pairs or told & {last, last.replace(":", "."), normal(last), "True", "False"}
    assert all(stats.errors.values())


def normal(number: str) -> str:
    """A number as str() writes it."""
    try:
        return str(float(number) if "." in number else int(number))
    except ValueError:
        return number


@settings(deadline=None)
@given(any_text() | st.lists(lines_of_noise()).map("\n".join))
def test_the_other_parsers_take_any_text(text: str) -> None:
    version = parse_nvidia_fs_version(text)
    assert version is None or version.replace(".", "").isdigit()
    for name, value in parse_nvidia_fs_modules(text).items():
        assert name
        assert value


JUNK = {
    "one long line": "x" * (1 << 20),
    "short lines": "x\n" * (1 << 19),
    "colons": ":" * (1 << 20),
    "spaces, then a letter": " " * (1 << 20) + "x",
    "digits": "Reads : n=" + "9" * (1 << 20),
    "dots": "GDS Version: " + "1." * (1 << 19) + "!",
    "a version without an end": "NVFS Driver(version: " + "1:" * (1 << 19),
    "a value of spaces": "Active Process:" + " " * (1 << 20) + "x",
    "a key without an end": "Reads : " + "n" * (1 << 20),
    "pairs": "Reads : " + " ".join(f"k{number}=1" for number in range(100_000)),
    "pairs and then none": "Reads : " + "n=1 " * (1 << 18) + "x",
    "equals signs": "Reads : " + "=" * (1 << 20),
    "a label of spaces": "R" + " " * (1 << 20) + "!: n=1",
    "a GPU of spaces": "GPU" + " " * (1 << 20) + "x",
    "a GPU between spaces": "GPU 0000:01:00.0" + " " * (1 << 20) + "uuid:",
    "GPU lines": "GPU 0000:01:00.0 uuid:fb1e6550-2a78-d767-1f0d-7512eb8c552d : x\n" * (1 << 14),
    "many labels": "\n".join(f"L{number}:n=1" for number in range(100_000)),
    "contradictions": "Reads : n=1\nReads : n=2\n" * 45_000,
    "modules": "nvme: 1\n" * (1 << 17),
}


@pytest.mark.parametrize("junk", JUNK)
def test_1_mib_of_junk_takes_linear_time(junk: str) -> None:
    # Processor time, since other processes may have the machine.
    for parse in (parse_nvidia_fs_stats, parse_nvidia_fs_version, parse_nvidia_fs_modules):
        before = time.process_time()
        parse(JUNK[junk])
        assert time.process_time() - before < 2


# ---- The other files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 2.28\n", "2.28"),
        ("version: 2.28", "2.28"),
        ("\nversion:2.28.4 \r\n", "2.28.4"),
        ("version: 2:7\n", "2.7"),
        ("version: none\nversion: 2.3\n", "2.3"),
        ("", None),
        ("2.28\n", None),
        ("version:\n", None),
        ("version: 2.28 beta\n", None),
        ("version: 2.28\0", None),
        ("versions: 2.28\n", None),
    ],
)
def test_version(text: str, expected: str | None) -> None:
    assert parse_nvidia_fs_version(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("wekafsio: 1\n", {"wekafsio": "1"}),
        (
            "nvme: (null)\nnvme_rdma: (null)\nlnet: 2.14.0_ddn 5\n",
            {"nvme": "(null)", "nvme_rdma": "(null)", "lnet": "2.14.0_ddn 5"},
        ),
        ("nvme: 1\r\n\nnvme: 2", {"nvme": "1"}),
        ("nvme\nnvme:\n: 1\ntwo words: 1\nnv\0me: 1\n", {}),
    ],
)
def test_modules(text: str, expected: dict[str, str]) -> None:
    assert parse_nvidia_fs_modules(text) == expected
