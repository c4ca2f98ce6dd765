"""Rows of packing: no kernel, no ring."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.rows import Bound, Contestant, Pair, Row
from benchmarks.yardstick import Packer, Work
from gdsdirect import NVME_CMD_READ, encode_nvme_read_sqe, encode_nvme_read_sqes

_COMMANDS = 4096
_NSID = 1
_BLOCKS = 8
_NBYTES = 4096
_ADDRESS = 0x7F52_4000_0000  # never followed; as large as real ones are

_WIRE = struct.Struct("<B3xI24xQQI12x")


def _lbas() -> array[int]:
    return array("Q", range(1 << 20, (1 << 20) + _COMMANDS * _BLOCKS, _BLOCKS))


def _addresses() -> array[int]:
    return array("Q", range(_ADDRESS, _ADDRESS + _COMMANDS * _NBYTES, _NBYTES))


@contextmanager
def one() -> Iterator[Row]:
    pieces = list(zip(_lbas(), _addresses(), strict=True))

    def ours() -> None:
        encode = encode_nvme_read_sqe
        for lba, address in pieces:
            encode(_NSID, lba, _BLOCKS, address)

    def standard() -> None:
        pack = _WIRE.pack
        for lba, address in pieces:
            pack(NVME_CMD_READ, _NSID, address, lba, _BLOCKS - 1)

    yield Row(
        "pack one command",
        (
            Pair(
                Contestant("encode_nvme_read_sqe", ours, _COMMANDS),
                Contestant("struct.Struct.pack", standard, _COMMANDS),
                Bound(0.7),
            ),
        ),
    )


@contextmanager
def many() -> Iterator[Row]:
    lbas, addresses = _lbas(), _addresses()
    packed, packed_by_c, packed_singly = (bytearray(_WIRE.size * _COMMANDS) for _ in range(3))
    yardstick = Packer(Work(lbas, addresses, _NBYTES, _BLOCKS, (_NSID,)), packed_by_c)
    pieces = list(zip(range(0, len(packed), _WIRE.size), lbas, addresses, strict=True))

    def ours() -> None:
        encode_nvme_read_sqes(_NSID, lbas, _BLOCKS, addresses, packed)

    def standard() -> None:
        pack_into = _WIRE.pack_into
        for offset, lba, address in pieces:
            pack_into(packed_singly, offset, NVME_CMD_READ, _NSID, address, lba, _BLOCKS - 1)

    for run in (ours, standard, yardstick.run):
        run()
    if not packed == packed_by_c == packed_singly:
        raise RuntimeError("the contestants don't pack the same bytes")

    contestant = Contestant("encode_nvme_read_sqes", ours, _COMMANDS)
    yield Row(
        "pack 4,096 from arrays",
        (
            Pair(contestant, Contestant("C loop", yardstick.run, _COMMANDS), Bound(1.5)),
            Pair(contestant, Contestant("struct.Struct.pack_into", standard, _COMMANDS)),
        ),
    )
