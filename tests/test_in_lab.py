"""The package on real kernels and emulated drives: boots the lab and runs tests/lab in it.

The tests inside compare the bytes. Here it is judged that all of them ran, that the kernel had
nothing to complain of, and that the drives wrote where the tests say they did: in their own trace,
the addresses of each read into peer memory lie in the peer's BAR, and those of no other read do.
"""

import json
import os
import random
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support import needs_lab

import lab
from lab import Drive, TraceRead

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
PAGE = 4096

# What tells the kernels apart for the tests inside: guest.Expected.
KERNELS = {
    "6.1": {"peer_memory": False, "commands_for_everyone": False, "maps_to_the_end": True},
    "6.12": {"peer_memory": False, "commands_for_everyone": True, "maps_to_the_end": False},
    "7": {"peer_memory": True, "commands_for_everyone": True, "maps_to_the_end": False},
}
NEED_PEER_MEMORY = "test_peer"
LEAST_TESTS = 90
BAD_BLOCKS = (16, 100, 1001, 1002, 1024, 2047)
# An ordinary user's PATH leaves out sbin.
ENVIRONMENT = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

Command = tuple[int, int, int]
"""Namespace id, first block, number of blocks."""


# ---- The drives


def make_drives(folder: Path) -> list[Drive]:
    """All drives, with known contents in files of `folder`. Each has a namespace id of its own."""

    def image(serial: str, nbytes: int) -> Path:
        path = folder / f"{serial}.image"
        path.write_bytes(random.Random(serial).randbytes(nbytes))
        return path

    return [
        Drive("peer", contents=image("peer", MIB), nsid=11, peer_memory=64 * MIB),
        Drive("data", contents=image("data", 8 * MIB), nsid=12),
        Drive("small", contents=image("small", 4 * MIB), nsid=13, block_size=4096, mdts=5),
        Drive("files", contents=file_system(folder), nsid=14),
        Drive("far", contents=partitioned(image("far", MIB)), nsid=15, own_root_port=True),
        Drive("broken", contents=image("broken", MIB), nsid=16, read_errors=BAD_BLOCKS),
        Drive("separate", size=520 * 4096, nsid=17, metadata=8),
        Drive("extended", size=520 * 4096, nsid=18, metadata=8, extended_metadata=True),
    ]


def make_victims(folder: Path) -> list[Drive]:
    """Drives for test_faults.py alone; slow, where 256 reads are to stay in flight for a while."""

    def image(serial: str) -> Path:
        path = folder / f"{serial}.image"
        path.write_bytes(random.Random(serial).randbytes(MIB))
        return path

    return [
        Drive("pulled", contents=image("pulled"), nsid=21, own_root_port=True, iops=40),
        Drive("unplugged", contents=image("unplugged"), nsid=22, own_root_port=True, iops=200),
        Drive("slow", contents=image("slow"), nsid=23, iops=200),
        Drive("fast", contents=image("fast"), nsid=24, own_root_port=True),
    ]


def make_file_systems(folder: Path) -> list[Drive]:
    """Drives with empty file systems, to be mounted and written to."""
    partition = ext4(folder / "partition.image", offset=MIB)
    return [
        Drive("ext4", contents=ext4(folder / "ext4.image"), nsid=31),
        Drive("xfs", contents=xfs(folder / "xfs.image"), nsid=32),
        Drive("partition", contents=partitioned(partition, MIB // 512, 64 * MIB // 512), nsid=33),
    ]


def ext4(image: Path, offset: int = 0) -> Path:
    """`image` with an empty ext4 of 64 MiB, with a journal, from `offset` on."""
    sparse(image, offset + 64 * MIB)
    mkfs("ext4", "-q", "-b", "4096", "-E", f"offset={offset}", image, "64M")
    return image


# What mkfs.xfs may turn on and Linux 6.1 does not know or calls experimental, by option.
XFS_IS_NEWER = {"nrext64": "-i", "exchange": "-i", "parent": "-n"}


def xfs(image: Path) -> Path:
    """`image` with an empty XFS, the smallest that mkfs.xfs makes."""
    usage = subprocess.run(["mkfs.xfs"], capture_output=True, text=True, env=ENVIRONMENT).stderr
    # An older mkfs.xfs refuses what it does not know either.
    known = {name: option for name, option in XFS_IS_NEWER.items() if f"{name}=" in usage}
    off = [part for name, option in known.items() for part in (option, f"{name}=0")]
    made = image.with_suffix(".made")
    sparse(made, 300 * MIB)
    mkfs("xfs", "-q", *off, made)
    # mkfs.xfs allocates the 64 MiB of its log, which take memory where /tmp is in memory.
    subprocess.run(["cp", "--sparse=always", made, image], check=True)
    made.unlink()
    return image


def sparse(image: Path, nbytes: int) -> None:
    image.write_bytes(b"")
    os.truncate(image, nbytes)


def mkfs(kind: str, *arguments: str | Path) -> None:
    subprocess.run([f"mkfs.{kind}", *arguments], check=True, env=ENVIRONMENT)


def file_system(folder: Path) -> Path:
    """An ext4 image with the files of the folder `files`, which is made too."""
    files, image = folder / "files", folder / "files.image"
    files.mkdir()
    (files / "model").write_bytes(random.Random("model").randbytes(2 * MIB + 4096))
    (files / "short").write_bytes(random.Random("short").randbytes(5000))
    sparse(image, 6 * MIB)
    mkfs("ext4", "-q", "-b", "4096", "-O", "^has_journal", "-d", files, image)
    return image


def partitioned(image: Path, first: int = 64, blocks: int = 1024) -> Path:
    """`image` with one partition: `blocks` blocks from block `first` on."""
    entry = struct.pack("<8sII", b"\0\0\0\0\x83", first, blocks)
    with image.open("r+b") as file:
        file.seek(446)
        file.write(entry + bytes(3 * 16) + b"\x55\xaa")
    return image


def describe(drive: Drive) -> dict[str, Any]:
    """What the tests inside know of a drive: the fields of guest.Drive."""
    names = ("serial", "nsid", "block_size", "blocks", "metadata", "extended_metadata", "mdts")
    return {name: getattr(drive, name) for name in (*names, "read_errors")}


# ---- What came of it


@dataclass(frozen=True)
class Report:
    """The tests that ran inside, as module::name."""

    passed: frozenset[str]
    skipped: dict[str, str]
    """With the reason."""
    failed: frozenset[str]

    @classmethod
    def load(cls, path: Path) -> "Report":
        passed, failed, skipped = set(), set(), {}
        for case in ElementTree.parse(path).iter("testcase"):
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            if (skip := case.find("skipped")) is not None:
                skipped[name] = skip.get("message", "")
            elif case.find("failure") is not None or case.find("error") is not None:
                failed.add(name)
            else:
                passed.add(name)
        return cls(frozenset(passed), skipped, frozenset(failed))


def check_tests(report: Report, peer_memory: bool) -> None:
    """All passed, but those that need peer memory on a kernel that has none."""
    assert not report.failed
    assert len(report.passed) + len(report.skipped) >= LEAST_TESTS
    of_peer_memory = {name for name in report.passed if name.startswith(f"{NEED_PEER_MEMORY}::")}
    if peer_memory:
        assert of_peer_memory
        assert report.skipped == {}
    else:
        assert not of_peer_memory
        assert {name.partition("::")[0] for name in report.skipped} == {NEED_PEER_MEMORY}
        assert set(report.skipped.values()) == {"this kernel has no peer memory"}


def check_trace(trace: Iterable[TraceRead], notes: Iterable[dict[str, Any]]) -> None:
    """Every read went where the tests say it did, and as often."""
    said: dict[str, Counter[Command]] = {"peer": Counter(), "host": Counter()}
    frames: dict[Command, set[int]] = {}
    bars: list[range] = []
    for note in notes:
        if "bar" in note:
            bars.append(range(note["bar"][0], note["bar"][1] + 1))
        elif "frames" in note:
            frames[note["nsid"], note["lba"], note["blocks"]] = set(note["frames"])
        else:
            said[note["target"]].update((note["nsid"], *extent) for extent in note["extents"])
    seen: dict[str, Counter[Command]] = {"peer": Counter(), "host": Counter()}
    for read in trace:
        if read.addresses:  # else the drive refused it
            command = (read.nsid, read.lba, read.blocks)
            seen[_target(read, bars)][command] += 1
            assert frames.get(command) in (None, _frames(read)), f"not the buffer's pages: {read}"
    assert seen["peer"] == said["peer"]
    assert not said["host"] - seen["host"], "reads that the drives did not see"
    assert not frames.keys() - seen["host"].keys(), "reads that the drives did not see"


def _frames(read: TraceRead) -> set[int]:
    """The page frames that a read went into."""
    return {
        frame
        for address, nbytes in read.addresses
        for frame in range(address // PAGE, (address + nbytes - 1) // PAGE + 1)
    }


def _target(read: TraceRead, bars: list[range]) -> str:
    """Where a read went: all of it, or the test fails."""
    assert sum(nbytes for _, nbytes in read.addresses) == read.nbytes
    inside = {
        any(address in bar and address + nbytes - 1 in bar for bar in bars)
        for address, nbytes in read.addresses
    }
    touched = {
        any(address < bar.stop and bar.start < address + nbytes for bar in bars)
        for address, nbytes in read.addresses
    }
    assert inside == touched, f"partly in the peer's memory: {read}"
    assert len(inside) == 1, f"partly in the peer's memory: {read}"
    return "peer" if inside.pop() else "host"


# ---- That the judge sees what is wrong

BAR = {"bar": [0xF4000000, 0xF7FFFFFF]}
INTO_PEER = {"target": "peer", "nsid": 2, "extents": [[8, 16]]}
INTO_HOST = {"target": "host", "nsid": 2, "extents": [[8, 16]]}
FRAMES = {"nsid": 2, "lba": 8, "blocks": 16, "frames": [0x100, 0x101, 0x300]}


def a_read(*addresses: tuple[int, int]) -> TraceRead:
    return TraceRead(2, 8, 16, 8192, addresses)


IN_PEER = a_read((0xF4000000, 8192))
IN_HOST = a_read((0x100200, 7680), (0x300000, 512))


@pytest.mark.parametrize(
    ("trace", "notes"),
    [
        ([], []),
        ([IN_PEER], [BAR, INTO_PEER]),
        ([IN_HOST], [BAR, INTO_HOST, FRAMES]),
        ([IN_HOST, IN_PEER, IN_HOST], [BAR, INTO_PEER, INTO_HOST]),
        ([a_read(), IN_PEER, a_read((0xF7FFE000, 8192))], [BAR, INTO_PEER, INTO_PEER]),
    ],
)
def test_a_right_trace(trace: list[TraceRead], notes: list[dict[str, Any]]) -> None:
    check_trace(trace, notes)


@pytest.mark.parametrize(
    ("trace", "notes"),
    [
        ([], [INTO_HOST]),
        ([], [BAR, INTO_PEER]),
        ([a_read()], [BAR, INTO_PEER]),
        ([IN_HOST], [BAR, INTO_PEER]),
        ([IN_PEER], [BAR, INTO_HOST]),
        ([IN_PEER], [BAR]),
        ([IN_PEER], [INTO_PEER]),
        ([IN_PEER, IN_PEER], [BAR, INTO_PEER]),
        ([IN_PEER, IN_HOST], [BAR, INTO_PEER, INTO_PEER]),
        ([a_read((0xF4000000, 4096))], [BAR, INTO_PEER]),
        ([a_read((0xF4000000, 4096), (0x1000, 4096))], [BAR, INTO_PEER]),
        ([a_read((0xF7FFF000, 8192))], [BAR, INTO_PEER]),
        ([a_read((0xF3FFF000, 8192))], [BAR, INTO_HOST]),
        ([a_read((0x100200, 7680), (0x400000, 512))], [INTO_HOST, FRAMES]),
        ([], [FRAMES]),
    ],
)
def test_a_wrong_trace(trace: list[TraceRead], notes: list[dict[str, Any]]) -> None:
    with pytest.raises(AssertionError):
        check_trace(trace, notes)


REPORT = """
<testsuites><testsuite>
<testcase classname="lab.test_reads" name="one"/>
<testcase classname="lab.test_peer" name="two">{}</testcase>
</testsuite></testsuites>
"""
SKIPPED = '<skipped type="pytest.skip" message="this kernel has no peer memory"/>'


@pytest.mark.parametrize(
    ("inside", "peer_memory", "fine"),
    [
        ("", True, True),
        ("", False, False),
        (SKIPPED, False, True),
        (SKIPPED, True, False),
        ('<skipped message="no reason"/>', False, False),
        ('<failure message="it failed"/>', True, False),
        ('<error message="it could not begin"/>', True, False),
    ],
)
def test_a_report(
    inside: str, peer_memory: bool, fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.xml").write_text(REPORT.format(inside))
    report = Report.load(tmp_path / "report.xml")
    monkeypatch.setattr(sys.modules[__name__], "LEAST_TESTS", 2)
    if fine:
        check_tests(report, peer_memory)
        monkeypatch.setattr(sys.modules[__name__], "LEAST_TESTS", 3)
    with pytest.raises(AssertionError):
        check_tests(report, peer_memory)


# ---- The real thing


# QEMU's drives can leave commands unanswered (seen with 7.2 in one boot of some thirty, as if a
# doorbell had been missed). The kernel says so after 30 s; only then is it tried again, once.
_UNANSWERED = re.compile(r"nvme nvme\d+: I/O .*timeout")


def unanswered(result: lab.Result) -> list[str]:
    """What the kernel said of commands that an emulated drive didn't answer."""
    return [line for line in result.kernel_log.splitlines() if _UNANSWERED.search(line)]


@pytest.mark.lab
@needs_lab("mkfs.ext4", "mkfs.xfs")
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_in_the_lab(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE.parent)  # seen in the guest, as pytest's own folders are not
    folder = tmp_path / "first"
    result = run_inside(kernel, folder)
    if result.status != 0 and (lines := unanswered(result)):
        print("Once more, since an emulated drive did not answer:", *lines, sep="\n")
        folder = tmp_path / "second"
        result = run_inside(kernel, folder)
    assert result.status == 0
    assert result.kernel_problems == ()
    check_tests(Report.load(folder / "report.xml"), KERNELS[kernel]["peer_memory"])
    notes = [json.loads(line) for line in (folder / "notes").read_text().splitlines()]
    check_trace(result.trace, notes)
    peer_reads = [note for note in notes if note.get("target") == "peer"]
    assert bool(peer_reads) == KERNELS[kernel]["peer_memory"]


def run_inside(kernel: str, folder: Path) -> lab.Result:
    """All of tests/lab, in a machine of its own; what it writes goes to `folder`."""
    folder.mkdir()
    drives = make_drives(folder)
    victims = make_victims(folder)
    file_systems = make_file_systems(folder)
    told = {
        "drives": [describe(drive) for drive in drives],
        "victims": [describe(drive) for drive in victims],
        "file_systems": [describe(drive) for drive in file_systems],
        "expected": KERNELS[kernel],
    }
    (folder / "machine.json").write_text(json.dumps(told))
    result = lab.run(
        [
            *(sys.executable, "-P", "-m", "pytest", str(HERE / "lab"), f"--confcutdir={HERE}/lab"),
            *("-o", "addopts=", "-o", "timeout=60", "-p", "pytest_timeout"),
            *("-p", "no:cacheprovider", "--strict-markers", "--durations=10"),
            f"--junitxml={folder}/report.xml",
        ],
        kernel=kernel,
        drives=[*drives, *victims, *file_systems],
        share=folder,
        append="nvme.poll_queues=1",
        timeout=240,
        env={
            **ENVIRONMENT,
            "GDSDIRECT_LAB": str(folder),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",
        },
    )
    print(result.output)
    return result
