"""The row of a large file read in order, past the page cache, beside fio.

fio is a process that takes a while to start, so that each has a clock of its own, which runs while
the reads do: fio's report of its job, and here the clocks of this process, once there is a file, a
buffer and a ring.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gdsdirect
from benchmarks import scratch
from benchmarks.measure import CPU, RATE, Figures, Turn, figures_of, no_collections, take_turns
from benchmarks.results import Result
from benchmarks.rows import Bound
from gdsdirect import DataPath, File, GpuMappedBuffer, WayClosedError

_FILE = 2 << 30
_ROOM = 3 << 30  # bytes on the drive, to leave it some
_NBYTES = 1 << 20
_DEPTH = 32
_PIECE = 512 << 20
_SECONDS = 2  # of a turn, or one pass: fio tells processor time in whole milliseconds
_WAY = DataPath.FILE_FIXED

_TITLE = f"a file of {_FILE >> 30} GiB in order, O_DIRECT, {_NBYTES >> 20} MiB a read"
_STREAM, _INTO = "file.stream", f"file.read_into, {_PIECE >> 20} MiB"
_FIO, _FIO_SMALL_PAGES = "fio, huge pages", "fio, its own memory"
_FAST = Bound(0.97, at_most=False)

# Who, over whom, of what, bound.
_PAIRS = (
    (_STREAM, _FIO, RATE, _FAST),
    (_STREAM, _FIO, CPU, Bound(1.1)),
    (_INTO, _FIO, RATE, _FAST),
    (_INTO, _FIO, CPU, Bound(1)),
    (_STREAM, _FIO_SMALL_PAGES, RATE, None),
    (_STREAM, _FIO_SMALL_PAGES, CPU, None),
)
TURNS = 4  # of contestants in a round

# ---- Ours


def _stream(file: File, buffer: GpuMappedBuffer) -> Callable[[], int]:
    def run() -> int:
        with file.stream(buffer, chunk_size=_NBYTES, require=_WAY) as stream:
            return sum(chunk.nbytes for chunk in stream)

    return run


def _into(file: File, buffer: GpuMappedBuffer) -> Callable[[], int]:
    def run() -> int:
        return sum(
            file.read_into(buffer, offset=offset, size=_PIECE, require=_WAY).nbytes
            for offset in range(0, _FILE, _PIECE)
        )

    return run


def _passes(run: Callable[[], int], passes: int) -> Turn:
    def turn() -> Figures:
        with no_collections():
            busy, begun = time.process_time(), time.perf_counter()
            nbytes = sum(run() for _ in range(passes))
            seconds, cpu = time.perf_counter() - begun, time.process_time() - busy
        if nbytes != passes * _FILE:
            raise RuntimeError(f"{nbytes} bytes came of {passes * _FILE}")
        return figures_of(nbytes, seconds, cpu)

    return turn


# ---- fio


def _fio(path: str, passes: int, *more: str, **environment: str) -> Turn:
    """Its processor time is of the thread that reads, ours of the process with all its threads."""
    command = [
        *("fio", "--name=reads", f"--filename={path}", "--rw=read", f"--size={_FILE}", *more),
        *("--ioengine=io_uring", "--direct=1", "--fixedbufs=1", "--registerfiles=1"),
        *(f"--bs={_NBYTES}", f"--iodepth={_DEPTH}", f"--loops={passes}", "--output-format=json"),
    ]

    def turn() -> Figures:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | environment
        )
        (job,) = json.loads(done.stdout)["jobs"]
        read = job["read"]
        if read["io_bytes"] != passes * _FILE:
            raise RuntimeError(f"fio: {read['io_bytes']} bytes came of {passes * _FILE}")
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"]
        return figures_of(read["io_bytes"], read["runtime"] / 1000, cpu / 1000)

    return turn


def _all_of_fio(path: str, passes: int) -> dict[str, Turn]:
    """In pages of 4 KiB, a read of 1 MiB can have more pieces of memory than one request to the
    drive takes: then it is two. Ours are in huge pages where there are, and so are fio's, by the
    grace of glibc (2.35 or later), when it is asked for it."""
    huge = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return {
        _FIO: _fio(path, passes, "--mem=malloc", "--iomem_align=2M", **huge),
        _FIO_SMALL_PAGES: _fio(path, passes),
    }


# ---- All


@contextmanager
def _turns() -> Iterator[dict[str, Turn]]:
    with ExitStack() as stack:
        path = str(Path(stack.enter_context(scratch.folder()), "contents"))
        scratch.write(path, _FILE)
        file = stack.enter_context(gdsdirect.open(path))
        slots, piece = (
            stack.enter_context(GpuMappedBuffer.from_host_visible(nbytes))
            for nbytes in (_DEPTH * _NBYTES, _PIECE)
        )
        stream, into = _stream(file, slots), _into(file, piece)
        into()  # makes the ring, as the next does
        begun = time.perf_counter()
        stream()
        passes = max(1, round(_SECONDS / (time.perf_counter() - begun)))
        yield {
            _STREAM: _passes(stream, passes),
            _INTO: _passes(into, passes),
            **_all_of_fio(path, passes),
        }


def measure(rounds: int, on_turn: Callable[[], object]) -> tuple[list[Result], list[str]]:
    """All take turns, and who begins changes from round to round."""
    if not shutil.which("fio"):
        return [], ["fio is not installed (apt-get install fio): no file is read in order."]
    free = shutil.disk_usage(scratch.PLACE).free
    if free < _ROOM:
        return [], [f"No file is read in order: {free:,} bytes are free for it, of {_ROOM:,}."]
    try:
        with _turns() as turns:
            figures = take_turns(turns, rounds, on_turn)
    except WayClosedError as error:
        return [], [f"No file is read in order: {error}"]

    def of(name: str, unit: str) -> list[float]:
        return [turn[unit] for turn in figures[name]]

    return [
        Result(_TITLE, name, over, unit, of(name, unit), of(over, unit), bound)
        for name, over, unit, bound in _PAIRS
    ], []
