"""The reads of the lab's rows, inside the virtual machine, where benchmarks/lab_rows.py starts it.

    python -m benchmarks.guest ROUNDS REPORT

In each round every contestant of every row has a turn of a second, and prints a line. REPORT gets
JSON: {row: {contestant: [{"iops": …, "cpu": …}, …]}}, where `cpu` is how many processors the guest
kept busy meanwhile; fio, which takes a while to start, has none.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import gdsdirect
from benchmarks.yardstick import RECORD_BYTES, Loop, Work
from gdsdirect import (
    AsyncUringStream,
    DataPath,
    File,
    GpuMappedBuffer,
    Namespace,
    encode_nvme_read_sqes,
)

_SECONDS = 1
_READS = 8192  # in one pass; many, for it ends with nothing in flight
_WIRE_BYTES = 64

Figures = dict[str, float]
Turn = Callable[[], Figures]


@dataclass(frozen=True)
class Load:
    """Random reads: so large, so many in flight, so many submitted at once."""

    nbytes: int
    depth: int
    batch: int


LARGE = Load(4096, 64, 32)
SMALL = Load(512, 256, 128)
LARGE_TWICE = Load(4096, 128, 64)  # on two drives the same for each


def _busy() -> float:
    """Processor seconds that were not idle, since the guest began."""
    with open("/proc/stat") as lines:
        user, nice, system, _, _, *interrupts = map(int, next(lines).split()[1:8])
    return sum((user, nice, system, *interrupts)) / os.sysconf("SC_CLK_TCK")


def _passes(run: Callable[[], None]) -> Turn:
    """As many passes as a turn takes."""

    def turn() -> Figures:
        passes = 0
        busy, begun = _busy(), time.perf_counter()
        while (elapsed := time.perf_counter() - begun) < _SECONDS:
            run()
            passes += 1
        return {"iops": passes * _READS / elapsed, "cpu": (_busy() - busy) / elapsed}

    return turn


# ---- Ours and the C loop


@dataclass(frozen=True)
class Target:
    """Drives, and memory with what is to be read into it."""

    drives: Sequence[Namespace]
    buffer: GpuMappedBuffer
    load: Load
    lbas: array[int]
    addresses: array[int]

    @classmethod
    def make(cls, drives: Sequence[Namespace], buffer: GpuMappedBuffer, load: Load) -> Target:
        chance = random.Random(load.nbytes)
        blocks = load.nbytes // drives[0].lba_size
        last = min(drive.capacity for drive in drives) // blocks
        lbas = array("Q", (chance.randrange(last) * blocks for _ in range(_READS)))
        slots = buffer.nbytes // load.nbytes
        addresses = (buffer.address + i % slots * load.nbytes for i in range(_READS))
        return cls(drives, buffer, load, lbas, array("Q", addresses))

    @property
    def blocks(self) -> int:
        return self.load.nbytes // self.drives[0].lba_size

    def batches(self) -> list[tuple[memoryview, memoryview]]:
        lbas, addresses, batch = memoryview(self.lbas), memoryview(self.addresses), self.load.batch
        return [
            (lbas[start : start + batch], addresses[start : start + batch])
            for start in range(0, _READS, batch)
        ]


def _c_loop(target: Target) -> Loop:
    load = target.load
    nsids = tuple(drive.nsid for drive in target.drives)
    work = Work(
        target.lbas, target.addresses, load.nbytes, target.blocks, nsids, load.depth, load.batch
    )
    return Loop([drive.path for drive in target.drives], target.buffer, work)


def _one_drive(target: Target, stream: AsyncUringStream) -> Callable[[], None]:
    (drive,) = target.drives
    load, blocks, nsid = target.load, target.blocks, drive.nsid
    wire, records = bytearray(load.batch * _WIRE_BYTES), bytearray(load.depth * RECORD_BYTES)
    batches = target.batches()

    def run() -> None:
        encode, wait = encode_nvme_read_sqes, stream.wait_into
        submit = stream.submit_nvme_passthrough
        flying = 0
        for lbas, addresses in batches:
            while flying + load.batch > load.depth:
                flying -= wait(records, load.batch)
            encode(nsid, lbas, blocks, addresses, wire)
            submit(drive, wire)
            flying += load.batch
        while flying:
            flying -= wait(records, min(flying, load.batch))

    return run


def _two_drives(target: Target, stream: AsyncUringStream) -> Callable[[], None]:
    """Half of each batch is for either."""
    load, blocks = target.load, target.blocks
    nsids = [drive.nsid for drive in target.drives]
    half = load.batch // 2
    wires = bytearray(half * _WIRE_BYTES), bytearray(half * _WIRE_BYTES)
    records = bytearray(load.depth * RECORD_BYTES)
    halves = [
        (lbas[:half], addresses[:half], lbas[half:], addresses[half:])
        for lbas, addresses in target.batches()
    ]
    share = list(zip(target.drives, wires, strict=True))

    def run() -> None:
        encode, wait = encode_nvme_read_sqes, stream.wait_into
        submit = stream.submit_nvme_passthroughs
        flying = 0
        for lbas, addresses, other_lbas, other_addresses in halves:
            while flying + load.batch > load.depth:
                flying -= wait(records, load.batch)
            encode(nsids[0], lbas, blocks, addresses, wires[0])
            encode(nsids[1], other_lbas, blocks, other_addresses, wires[1])
            submit(share)
            flying += load.batch
        while flying:
            flying -= wait(records, min(flying, load.batch))

    return run


def _ours(target: Target, stream: AsyncUringStream) -> Turn:
    """Every read has succeeded, into registered memory, or there is no figure."""
    passes = _passes((_one_drive if len(target.drives) == 1 else _two_drives)(target, stream))

    def turn() -> Figures:
        figures = passes()
        stats = stream.stats
        if stats.failed or stats.registered != stats.submitted:
            raise SystemExit(f"reads failed, or went into memory that isn't registered: {stats}")
        return figures

    return turn


# ---- fio


def _fio(path: str, load: Load, *more: str) -> Turn:
    command = [
        *("fio", "--name=reads", *more, f"--filename={path}", "--rw=randread"),
        *(f"--bs={load.nbytes}", f"--iodepth={load.depth}", "--fixedbufs=1", "--registerfiles=1"),
        *(f"--iodepth_batch_submit={load.batch}", f"--iodepth_batch_complete_min={load.batch}"),
        *(f"--runtime={_SECONDS}", "--time_based", "--thread", "--output-format=json"),
    ]

    def turn() -> Figures:
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        (job,) = json.loads(done.stdout)["jobs"]
        return {"iops": job["read"]["iops"]}

    return turn


_PASSTHROUGH = ("--ioengine=io_uring_cmd", "--cmd_type=nvme")
_BLOCK = ("--ioengine=io_uring", "--direct=1")
# At its best fio takes no clocks of each read and keeps no map of what it has read, as the loops
# beside it. No other option made it faster by more than a hundredth (docs/performance.md).
_BARE = ("--gtod_reduce=1", "--norandommap")


def _all_of_fio(path: str) -> dict[str, Turn]:
    block = path.replace("/ng", "/nvme")
    return {
        "fio io_uring_cmd": _fio(path, LARGE, *_PASSTHROUGH, *_BARE),
        "fio io_uring_cmd, timed": _fio(path, LARGE, *_PASSTHROUGH),
        "fio block path": _fio(block, LARGE, *_BLOCK, *_BARE),
        "fio block path, timed": _fio(block, LARGE, *_BLOCK),
    }


# ---- A file


_FILE = 64 << 20
_PAGE = 4096
_A_CALL = 4096  # ranges: many, for a file is held still and looked at once a call


@contextmanager
def _file(disk: str) -> Iterator[dict[str, Turn]]:
    """The same ranges of a file by its extents, and through its file system."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "ext4", disk, folder], check=True)
        try:
            path = Path(folder, "file")
            path.write_bytes(random.Random(_FILE).randbytes(_FILE))
            with (
                GpuMappedBuffer.from_host_visible(64 * _PAGE) as buffer,
                gdsdirect.open(path, extents=True) as file,
            ):
                yield {
                    "gdsdirect, extents": _ranges(file, buffer, DataPath.NVME_PASSTHROUGH),
                    "gdsdirect, file system": _ranges(file, buffer, DataPath.FILE_FIXED),
                }
        finally:
            subprocess.run(["umount", folder], check=True)


def _ranges(file: File, buffer: GpuMappedBuffer, way: DataPath) -> Turn:
    chance = random.Random(_READS)
    sizes = array("I", [_PAGE] * _A_CALL)
    targets = array("Q", (i % 64 * _PAGE for i in range(_A_CALL)))
    calls = [
        array("Q", (chance.randrange(0, _FILE, _PAGE) for _ in range(_A_CALL)))
        for _ in range(_READS // _A_CALL)
    ]

    def run() -> None:
        for offsets in calls:
            file.read_many_into(buffer, offsets, sizes, targets, require=way)

    return _passes(run)


# ---- All


def _generic(serial: str) -> str:
    """The generic device of the drive with this serial number."""
    for controller in Path("/sys/class/nvme").iterdir():
        if (controller / "serial").read_text().strip() == serial:
            (generic,) = (node.name for node in controller.glob("ng*n*"))
            return f"/dev/{generic}"
    raise SystemExit(f"no drive has the serial number {serial}")


@contextmanager
def _rows() -> Iterator[dict[str, dict[str, Turn]]]:
    with ExitStack() as stack:

        def opened(*serials: str) -> list[Namespace]:
            return [stack.enter_context(Namespace(_generic(serial))) for serial in serials]

        fast, slow = opened("fast", "fast2"), opened("slow", "slow2")
        buffer = stack.enter_context(GpuMappedBuffer.from_host_visible(1 << 20))

        def loops(drives: Sequence[Namespace], load: Load, which: str = "") -> dict[str, Turn]:
            target = Target.make(drives, buffer, load)
            stream = stack.enter_context(AsyncUringStream(buffer, load.depth))
            loop = stack.enter_context(_c_loop(target))
            return {f"gdsdirect{which}": _ours(target, stream), f"C loop{which}": _passes(loop.run)}

        yield {
            "file": stack.enter_context(_file(_generic("file").replace("/ng", "/nvme"))),
            "large": {
                **loops(fast[:1], LARGE),
                **(_all_of_fio(fast[0].path) if shutil.which("fio") else {}),
            },
            "small": loops(fast[:1], SMALL),
            "slow drives": {
                **loops(slow, LARGE_TWICE, ", two drives"),
                **loops(slow[:1], LARGE, ", one drive"),
            },
            "fast drives": {
                **loops(fast, LARGE_TWICE, ", two drives"),
                **loops(fast[:1], LARGE, ", one drive"),
            },
        }


def main(rounds: int, report: Path) -> None:
    with _rows() as rows:
        figures: dict[str, dict[str, list[Figures]]] = {
            row: {name: [] for name in turns} for row, turns in rows.items()
        }
        for number in range(rounds):
            for row, turns in rows.items():
                names = list(turns)
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    figures[row][name].append(turns[name]())
                    print(row, name, figures[row][name][-1], flush=True)
    report.write_text(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
