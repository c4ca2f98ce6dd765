"""The rows that are measured on this machine, in the order to be shown in."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from benchmarks import depth, drive, files, many, opening, packing, passthrough, tensors
from benchmarks.rows import Row

ROWS: tuple[Callable[[], AbstractContextManager[Row]], ...] = (
    packing.one,
    packing.many,
    *passthrough.ROWS,
    files.cached,
    files.singly,
    drive.singly,
    drive.by_tasks,
    many.files,
    opening.alone,
    opening.with_a_read,
    tensors.cached,
    tensors.cold,
    depth.time,
)
