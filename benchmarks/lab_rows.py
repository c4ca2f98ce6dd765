"""The rows that need NVMe drives: emulated ones, in the virtual machine of lab/.

They are instant drives: with an image behind it, a drive is what all contestants wait for. Only the
file needs one, which is in the page cache of this machine.
"""

import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Result
from benchmarks.rows import Bound
from lab import Drive, LabError, run

_SIZE = 256 << 20
_FILE_SYSTEM = 128 << 20  # for a file of half of that
_SLOW = 20_000  # IOPS; both together take a fraction of a processor to emulate

# By their names in guest.py.
_DRIVES = (
    Drive("fast", size=_SIZE, nsid=1, instant=True),
    Drive("fast2", size=_SIZE, nsid=2, instant=True),
    Drive("slow", size=_SIZE, nsid=3, instant=True, iops=_SLOW),
    Drive("slow2", size=_SIZE, nsid=4, instant=True, iops=_SLOW),
)
_TITLES = {
    "large": "lab: 4 KiB random, depth 64, 32 a batch",
    "small": "lab: 512 B random, depth 256, 128 a batch",
    "slow drives": f"lab: one ring, drives of {_SLOW:,} IOPS",
    "fast drives": "lab: one ring, drives without a limit",
    "file": "lab: 4 KiB random of a file on ext4, 4,096 a call",
}
_TWO, _ONE = "gdsdirect, two drives", "gdsdirect, one drive"


def _at_least(limit: float) -> Bound:
    return Bound(limit, at_most=False)


# Row, who, over whom, bound.
_PAIRS = (
    ("large", "gdsdirect", "fio io_uring_cmd", _at_least(1.1)),
    ("large", "gdsdirect", "fio io_uring_cmd, timed", None),
    ("large", "gdsdirect", "fio block path", None),
    ("large", "gdsdirect", "fio block path, timed", None),
    ("large", "gdsdirect", "C loop", None),
    ("small", "gdsdirect", "C loop", _at_least(0.95)),
    ("file", "gdsdirect, extents", "gdsdirect, file system", _at_least(1.2)),
    ("slow drives", _TWO, _ONE, _at_least(1.8)),
    ("slow drives", "C loop, two drives", "C loop, one drive", None),
    ("fast drives", _TWO, _ONE, None),
    ("fast drives", "C loop, two drives", "C loop, one drive", None),
    ("fast drives", _TWO, "C loop, two drives", None),
)
TURNS = 18  # of contestants in a round; the guest prints a line for each
_SECONDS_A_ROUND = 60  # three times what a round takes here


@dataclass(frozen=True)
class LabFigures:
    """What came of it, and what to know about it."""

    results: list[Result]
    notes: list[str]


def measure(rounds: int, on_turn: Callable[[], object]) -> LabFigures:
    """Boot the machine, and have each contestant take its turn in every round."""
    with tempfile.TemporaryDirectory(prefix="gdsdirect-bench-") as share:
        report = Path(share, "report")
        image = Path(share, "image")
        image.touch()
        os.truncate(image, _FILE_SYSTEM)
        mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        subprocess.run([mkfs or "mkfs.ext4", "-q", image], check=True)
        begun, busy = time.monotonic(), _children()
        result = run(
            [sys.executable, "-m", "benchmarks.guest", str(rounds), str(report)],
            drives=[*_DRIVES, Drive("file", contents=image, nsid=5, uring=True)],
            share=Path(share),
            output=_Turns(on_turn),
            timeout=60 + _SECONDS_A_ROUND * rounds,
            traced=False,
        )
        if result.status or result.kernel_problems:
            said = "\n".join([*result.output.splitlines()[-5:], *result.kernel_problems])
            raise LabError(f"the reads ended with status {result.status}:\n{said}")
        figures = json.loads(report.read_text())
        emulator = (_children() - busy) / (time.monotonic() - begun)
    return LabFigures([*_results(figures)], [*_notes(figures, emulator)])


class _Turns(io.StringIO):
    """Takes what the guest prints."""

    def __init__(self, on_turn: Callable[[], object]) -> None:
        super().__init__()
        self._on_turn = on_turn

    def write(self, text: str) -> int:
        for _ in range(text.count("\n")):
            self._on_turn()
        return len(text)


def _children() -> float:
    """Processor seconds of the processes that this one has started and seen end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _results(figures: dict[str, Any]) -> Iterator[Result]:
    def iops(row: str, name: str) -> list[float]:
        return [turn["iops"] for turn in figures[row][name]]

    for row, of, over, bound in _PAIRS:
        if over in figures[row]:
            yield Result(_TITLES[row], of, over, "IOPS", iops(row, of), iops(row, over), bound)


def _notes(figures: dict[str, Any], emulator: float) -> Iterator[str]:
    """What limits: one thread of the emulator executes all of the guest, and a good part of what
    its drives do."""

    def busy(row: str, name: str) -> float:
        return statistics.median([float(turn["cpu"]) for turn in figures[row][name]])

    if "fio io_uring_cmd" not in figures["large"]:
        yield "fio is not installed (apt-get install fio): no comparison with it."
    drives = "; ".join(
        f"{busy(row, _ONE):.2f} with one of the {row}, {busy(row, _TWO):.2f} with two"
        for row in ("slow drives", "fast drives")
    )
    yield f"lab: of the guest's processors, which share one thread here, one ring took {drives}."
    yield f"lab: the emulator took {emulator:.1f} of this machine's {os.cpu_count()} processors."
