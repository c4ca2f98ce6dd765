"""The header of a safetensors file, checked as a whole before a byte of a tensor is read.

A file is the header's length (u64, little-endian), the header (JSON, a map from each tensor's name
to its dtype, shape and data_offsets, and "__metadata__" to a map of strings), and the tensors'
bytes, which follow one another without gap or overlap. See "Format" in the README of
https://github.com/huggingface/safetensors (0.8).
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of an element of each dtype."""

_LENGTH = struct.Struct("<Q")
_MOST = 100_000_000  # bytes of a header, as in the format's own implementation
_METADATA = "__metadata__"
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_LARGEST = 2**64 - 1


class SafetensorsError(ValueError):
    """A file that is not, or not rightly, in the safetensors format; it says where and why."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: `nbytes` from byte `offset` of the file on, in C order."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file has: the tensors in the order of their bytes, which lie from `begin` to `end`.

    `stamp` tells whether a file is this one still: see `stamp_of`.
    """

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    begin: int
    end: int
    stamp: Stamp


class Stamp(NamedTuple):
    """What changes when another file takes an open one's path, or its bytes are written anew."""

    device: int
    inode: int
    nbytes: int
    modified: int


def stamp_of(fd: int) -> Stamp:
    """The stamp of an open file."""
    status = os.fstat(fd)
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_header(path: str) -> Header:
    """The header of a file. SafetensorsError if there is anything wrong with it."""
    with open(path, "rb") as file:
        stamp = stamp_of(file.fileno())
        nbytes = stamp.nbytes
        first = file.read(_LENGTH.size)
        if len(first) < _LENGTH.size:
            _refuse(path, f"it has {nbytes} bytes, and a header's length alone takes 8")
        (length,) = _LENGTH.unpack(first)
        if length > _MOST:
            _refuse(path, f"its header would have {length} bytes, and at most {_MOST} are read")
        if length > nbytes - _LENGTH.size:
            _refuse(path, f"its header would have {length} bytes, and the file has {nbytes}")
        text = file.read(length)
    begin = _LENGTH.size + length
    if len(text) < length:
        _refuse(path, "it became shorter while its header was read")
    tensors, metadata = _checked(path, _parsed(path, text), begin, nbytes)
    return Header(tensors, metadata, begin, nbytes, stamp)


def _refuse(path: str, reason: str) -> NoReturn:
    raise SafetensorsError(f"{path} is no safetensors file that can be read: {reason}")


# ---- JSON


class _TwiceError(ValueError):
    """A name that is there twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise _TwiceError(f"{names.most_common(1)[0][0]!r} is there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _parsed(path: str, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        _refuse(path, "its header doesn't begin with a brace")
    try:
        found: dict[str, Any] = json.loads(
            text.decode(), object_pairs_hook=_once, parse_constant=_no_number
        )
    except UnicodeDecodeError as error:
        _refuse(path, f"its header is not UTF-8 at byte {error.start}")
    except _TwiceError as error:
        _refuse(path, f"in its header {error}")
    except RecursionError:
        _refuse(path, "its header is nested too deeply")
    except ValueError as error:
        _refuse(path, f"its header is no JSON: {error}")
    return found


# ---- Checks


def _checked(
    path: str, found: dict[str, Any], begin: int, nbytes: int
) -> tuple[dict[str, Entry], dict[str, str]]:
    metadata = found.pop(_METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(path, f"{_METADATA} is no map of strings")
    entries = {name: _entry(path, name, told, begin) for name, told in found.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    end = _check_order(path, ordered, begin)
    if end != nbytes:
        what = "more than it has" if end > nbytes else "with bytes behind them of no tensor"
        _refuse(path, f"its tensors end at byte {end}, and the file at {nbytes}: {what}")
    return dict(ordered), metadata


def _entry(path: str, name: str, told: Any, begin: int) -> Entry:
    def refuse(reason: str) -> NoReturn:
        _refuse(path, f"tensor {name!r} {reason}")

    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        refuse("has half of a surrogate pair in its name")
    if not isinstance(told, dict) or not told.keys() >= _FIELDS:
        refuse(f"has not all of {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        refuse(f"has the dtype {dtype!r}, which is none of {', '.join(BITS)}")
    if not _are_sizes(shape):
        refuse(f"has the shape {shape!r}: a list of integers from 0 to 2**64 - 1 is due")
    if not _are_sizes(offsets) or len(offsets) != 2:
        refuse(f"has the data_offsets {offsets!r}: two integers from 0 to 2**64 - 1 are due")
    bits = BITS[dtype]
    for length in shape:  # one by one, since the product of a hostile list would take for ever
        bits *= length
        if bits > 8 * _LARGEST:
            refuse("has a shape of more than 2**64 bytes")
    first, last = offsets
    if bits % 8:
        refuse(f"has {bits} bits, which are no whole bytes")
    if last - first != bits // 8:
        refuse(f"has {bits // 8} bytes by its dtype and shape, and {last - first} by its offsets")
    return Entry(dtype, tuple(shape), begin + first, bits // 8)


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number <= _LARGEST for number in numbers
    )


def _check_order(path: str, ordered: Iterable[tuple[str, Entry]], begin: int) -> int:
    """Where the last one ends: each begins where the one before it ended."""
    end = begin
    for name, entry in ordered:
        if entry.offset != end:
            fault = "overlaps another" if entry.offset < end else "has bytes of none before it"
            _refuse(path, f"tensor {name!r} begins at byte {entry.offset}, not at {end}: {fault}")
        end = entry.offset + entry.nbytes
    return end
