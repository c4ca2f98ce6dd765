"""Slices: which bytes of a tensor an index takes, and what is left of it once they are there."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from types import EllipsisType
from typing import NamedTuple

Index = int | slice | EllipsisType

_RUN = 4096  # bytes; of shorter runs what lies between them is read too


class Selection(NamedTuple):
    """Runs of `nbytes` each, which begin `starts` bytes behind the tensor's own start.

    One after the other in memory they are an array of `shape`, and `left` of that array is what
    was asked for.
    """

    starts: list[int]
    nbytes: int
    shape: tuple[int, ...]
    left: tuple[int | slice, ...]


def select(shape: Sequence[int], itemsize: int, index: Index | tuple[Index, ...]) -> Selection:
    """What `index` takes of a tensor of this shape: integers, slices and an ellipsis, by NumPy's
    rules, with steps of 1 or more. IndexError, TypeError or ValueError for anything else."""
    parts = _for_each(shape, index if isinstance(index, tuple) else (index,))
    taken = [_range(length, part) for length, part in zip(shape, parts, strict=True)]
    counts = tuple(map(len, taken))
    left = tuple(slice(None) if isinstance(part, slice) else 0 for part in parts)
    if 0 in counts:
        return Selection([], 0, counts, left)
    # Behind the last dimension that isn't taken whole all lies together.
    cut = max((d for d, count in enumerate(counts) if count < shape[d]), default=0)
    nbytes = itemsize * math.prod(counts[cut:])
    runs = math.prod(counts[:cut])
    if (runs > 1 and nbytes < _RUN) or any(each.step > 1 and len(each) > 1 for each in taken):
        return _whole_rows(shape, itemsize, parts, taken[0])
    strides = [itemsize * math.prod(shape[d + 1 :]) for d in range(cut + 1)]
    firsts = taken[:cut] + [each[:1] for each in taken[cut : cut + 1]]
    starts = [sum(map(operator.mul, at, strides)) for at in itertools.product(*firsts)]
    return Selection(starts, nbytes, counts, left)


def _whole_rows(
    shape: Sequence[int], itemsize: int, parts: Sequence[int | slice], rows: range
) -> Selection:
    """All that is between the first row and the last one, of which the index is taken then."""
    count = rows[-1] + 1 - rows[0]
    stride = itemsize * math.prod(shape[1:])
    first = slice(None, None, rows.step) if isinstance(parts[0], slice) else 0
    return Selection([rows[0] * stride], count * stride, (count, *shape[1:]), (first, *parts[1:]))


def _for_each(shape: Sequence[int], index: tuple[Index, ...]) -> tuple[int | slice, ...]:
    """A part of the index for each dimension."""
    ellipses = [at for at, part in enumerate(index) if part is Ellipsis]
    given = len(index) - len(ellipses)
    if len(ellipses) > 1 or given > len(shape):
        raise IndexError(f"{index}: too many for a tensor of shape {tuple(shape)}")
    at = ellipses[0] if ellipses else len(index)
    whole = (slice(None),) * (len(shape) - given)
    return tuple(map(_part, index[:at] + whole + index[at + 1 :]))


def _part(part: object) -> int | slice:
    if isinstance(part, slice):
        return part
    if isinstance(part, bool) or not hasattr(part, "__index__"):
        raise TypeError(f"{part!r} is no index of a tensor in a file: give integers and slices")
    return operator.index(part)


def _range(length: int, part: int | slice) -> range:
    if isinstance(part, slice):
        start, stop, step = part.indices(length)
        if step < 1:
            raise ValueError(f"{part} goes backwards: give a step of 1 or more")
        return range(start, stop, step)
    if not -length <= part < length:
        raise IndexError(f"{part} is outside of {length}")
    return range(part % length, part % length + 1)
