"""Streaming: the memory that it takes must not grow with what is read.

python -m benchmarks.streaming FILE    streams it, and prints what that took, as JSON
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gdsdirect
from benchmarks import scratch
from benchmarks.results import Result
from benchmarks.rows import Bound
from gdsdirect import GpuMappedBuffer

_FILE = 8 << 30
_BUFFER = 64 << 20
_MOST = Bound(100 << 20, unit="bytes")


def memory(rounds: int = 3) -> tuple[list[Result], list[str]]:
    """Bytes on top of what the package takes once it is imported, each in a process of its own.

    The file is one hole, which takes no room on the drive, and no time of it.
    """
    with scratch.folder() as folder:
        path = Path(folder, "hole")
        path.touch()
        os.truncate(path, _FILE)
        took = [_ask(path) for _ in range(rounds)]
    peaks = [each["bytes"] for each in took]
    rate = statistics.median(_FILE / each["seconds"] for each in took) / (1 << 30)
    ways = " and ".join(dict.fromkeys(way for each in took for way in each["ways"]))
    title = f"peak memory: a file of {_FILE >> 30} GiB through {_BUFFER >> 20} MiB"
    return (
        [Result(title, "file.stream", "", "bytes", peaks, [0] * rounds, _MOST)],
        [f"peak memory: streamed at {rate:.1f} GiB/s by {ways}, but from holes, not from a drive."],
    )


def _ask(path: Path) -> Any:
    command = [sys.executable, "-m", "benchmarks.streaming", str(path)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def _status(name: str) -> int:
    """Bytes of this process: VmRSS those in memory now, VmHWM the most that there were.

    ru_maxrss would begin with those of the process that this one was started from.
    """
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _stream(path: str) -> dict[str, Any]:
    before = _status("VmRSS")
    begun = time.perf_counter()
    with (
        gdsdirect.open(path) as file,
        GpuMappedBuffer.from_host_visible(_BUFFER) as buffer,
        file.stream(buffer) as stream,
    ):
        nbytes = sum(chunk.nbytes for chunk in stream)
        ways = [way.name for way in stream.progress.ways]
    seconds = time.perf_counter() - begun
    if nbytes != _FILE:
        raise RuntimeError(f"{nbytes} bytes came of {_FILE}")
    return {"bytes": _status("VmHWM") - before, "seconds": seconds, "ways": ways}


if __name__ == "__main__":
    print(json.dumps(_stream(sys.argv[1])))
