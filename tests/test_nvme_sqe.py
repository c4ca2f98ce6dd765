"""Packing: the 64 bytes of a command, one at a time and in arrays."""

import doctest
import struct
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdsdirect import (
    NVME_CMD_READ,
    _nvme_sqe,
    decode_nvme_read_sqe,
    encode_nvme_read_sqe,
    encode_nvme_read_sqes,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
BLOCKS = st.integers(1, 65536)
COMMANDS = st.tuples(U32, U64, BLOCKS, U64)

# The layout, written down once more and by other means than the C code's.
LAYOUT = struct.Struct("<B3xI24xQQI12x")


def expected(namespace_id: int, lba: int, blocks: int, destination: int) -> bytes:
    return LAYOUT.pack(NVME_CMD_READ, namespace_id, destination, lba, blocks - 1)


def test_golden_bytes() -> None:
    command = encode_nvme_read_sqe(1, 0x1122334455667788, 8, 0xAABBCCDDEEFF0011)
    assert command.hex(" ", 8) == (
        "0200000001000000 0000000000000000 0000000000000000 0000000000000000 "
        "1100ffeeddccbbaa 8877665544332211 0700000000000000 0000000000000000"
    )
    assert type(command) is bytes


def test_one_block_is_encoded_as_0() -> None:
    assert encode_nvme_read_sqe(1, 0, 1, 0)[48:52] == bytes(4)
    assert encode_nvme_read_sqe(1, 0, 65536, 0)[48:52] == b"\xff\xff\0\0"


@given(COMMANDS)
def test_round_trip(command: tuple[int, int, int, int]) -> None:
    packed = encode_nvme_read_sqe(*command)
    assert packed == expected(*command)
    assert decode_nvme_read_sqe(packed) == command


def test_by_keyword() -> None:
    packed = encode_nvme_read_sqe(dest_bar1_ptr=4, blocks=3, starting_lba=2, namespace_id=1)
    assert packed == expected(1, 2, 3, 4)
    assert encode_nvme_read_sqe(1, 2, dest_bar1_ptr=4, blocks=3) == packed
    assert encode_nvme_read_sqe(np.uint32(1), np.uint64(2), np.int8(3), True) == expected(
        1, 2, 3, 1
    )


@pytest.mark.parametrize("blocks", [0, -1, 65537, 2**32, 2**64, -(2**70)])
def test_blocks_out_of_range(blocks: int) -> None:
    with pytest.raises(ValueError, match=rf"blocks is {blocks}, outside 1..65536"):
        encode_nvme_read_sqe(1, 0, blocks, 0)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((2**32, 0, 1, 0), "namespace_id"),
        ((-1, 0, 1, 0), "namespace_id"),
        ((1, 2**64, 1, 0), "starting_lba"),
        ((1, -1, 1, 0), "starting_lba"),
        ((1, 0, 1, 2**64), "dest_bar1_ptr"),
        ((1, 0, 1, -(2**80)), "dest_bar1_ptr"),
    ],
)
def test_what_does_not_fit_its_field(arguments: tuple[int, int, int, int], field: str) -> None:
    with pytest.raises(OverflowError, match=rf"^{field} is -?\d+, outside"):
        encode_nvme_read_sqe(*arguments)


@pytest.mark.parametrize(
    ("arguments", "keywords", "text"),
    [
        ((1, 2, 3), {}, "needs the argument 'dest_bar1_ptr'"),
        ((1, 2, 3, 4, 5), {}, "takes 4 arguments, 5 were given"),
        ((1, 2, 3, 4), {"blocks": 3}, "a second argument 'blocks'"),
        ((1, 2, 3), {"destination": 4}, "an unknown argument 'destination'"),
        ((1.0, 2, 3, 4), {}, "namespace_id must be an integer, not 'float'"),
        ((1, "2", 3, 4), {}, "starting_lba must be an integer, not 'str'"),
        ((1, 2, None, 4), {}, "blocks must be an integer, not 'NoneType'"),
    ],
)
def test_wrong_arguments(arguments: tuple[object], keywords: dict[str, int], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        encode_nvme_read_sqe(*arguments, **keywords)  # type: ignore[call-overload]


def test_an_error_of_the_number_itself_passes() -> None:
    class Odd:
        def __index__(self) -> int:
            raise RuntimeError("odd")

    with pytest.raises(RuntimeError, match="odd"):
        encode_nvme_read_sqe(1, Odd(), 1, 0)


@given(U32, st.lists(st.tuples(U64, BLOCKS, U64), max_size=50))
def test_arrays_equal_the_single_form(namespace_id: int, rows: list[tuple[int, int, int]]) -> None:
    lbas = array("Q", [row[0] for row in rows])
    blocks = array("I", [row[1] for row in rows])
    destinations = array("Q", [row[2] for row in rows])
    packed = encode_nvme_read_sqes(namespace_id, lbas, blocks, destinations)
    assert packed == b"".join(expected(namespace_id, *row) for row in rows)


@pytest.mark.parametrize("kind", [np.uint64, np.int64, "<u8", "<i8"])
def test_kinds_of_arrays(kind: str) -> None:
    lbas = np.arange(5, dtype=kind)
    packed = encode_nvme_read_sqes(7, lbas, 8, lbas * 4096)
    assert packed == b"".join(expected(7, i, 8, i * 4096) for i in range(5))
    for blocks in (np.full(5, 8, np.uint32), np.full(5, 8, np.int32), np.int64(8)):
        assert encode_nvme_read_sqes(7, lbas, blocks, lbas * 4096) == packed


def test_into_out() -> None:
    lbas = array("Q", [1, 2])
    out = bytearray(b"\xff" * 192)
    assert encode_nvme_read_sqes(1, lbas, 8, lbas, out) is out
    assert out[:128] == encode_nvme_read_sqes(1, lbas, 8, lbas)
    assert out[128:] == b"\xff" * 64
    with pytest.raises(ValueError, match="out holds 127 bytes, 2 commands need 128"):
        encode_nvme_read_sqes(1, lbas, 8, lbas, out=bytearray(127))
    with pytest.raises(BufferError):
        encode_nvme_read_sqes(1, lbas, 8, lbas, out=bytes(128))


def test_unaligned_arrays() -> None:
    lbas = np.frombuffer(b"\0" + array("Q", [5, 6]).tobytes(), np.uint64, offset=1)
    assert encode_nvme_read_sqes(1, lbas, 8, lbas) == expected(1, 5, 8, 5) + expected(1, 6, 8, 6)


@pytest.mark.parametrize(
    ("lbas", "blocks", "destinations", "error", "text"),
    [
        (array("Q", [1]), 8, array("Q", [1, 2]), ValueError, "lbas 1, blocks 1, .*ptrs 2"),
        (array("Q", [1]), array("I", [1, 2]), array("Q", [1]), ValueError, "blocks 2"),
        (array("Q", [1]), array("I", [0]), array("Q", [1]), ValueError, r"blocks\[0\] is outside"),
        (array("Q", [1]), array("I", [65537]), array("Q", [1]), ValueError, r"blocks\[0\]"),
        (array("Q", [1]), 65537, array("Q", [1]), ValueError, "blocks is 65537"),
        (array("q", [1, -1]), 8, array("Q", [1, 2]), OverflowError, r"lbas\[1\] is negative"),
        (array("I", [1]), 8, array("Q", [1]), TypeError, "lbas has elements of format 'I'"),
        (array("d", [1]), 8, array("Q", [1]), TypeError, "lbas has elements of format 'd'"),
        (np.ones(1, ">u8"), 8, array("Q", [1]), TypeError, "format '>Q'"),
        (b"12345678", 8, array("Q", [1]), TypeError, "lbas has elements of format 'B'"),
        ([1], 8, array("Q", [1]), TypeError, "lbas must be a contiguous buffer of uint64"),
        (np.arange(4, dtype="u8")[::2], 8, array("Q", [1, 2]), ValueError, "contiguous"),
        (array("Q", [1]), array("Q", [1]), array("Q", [1]), TypeError, "blocks has elements"),
        (array("Q", [1]), "8", array("Q", [1]), TypeError, "blocks must be an integer"),
    ],
)
def test_wrong_arrays(
    lbas: object, blocks: object, destinations: object, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        encode_nvme_read_sqes(1, lbas, blocks, destinations)  # type: ignore[call-overload]


@pytest.mark.parametrize("byte", [0, 1, 3, 8, 16, 24, 31, 50, 51, 52, 56, 63])
def test_decoding_refuses_what_is_not_a_read_command(byte: int) -> None:
    command = bytearray(encode_nvme_read_sqe(1, 2, 3, 4))
    command[byte] ^= 0x80
    with pytest.raises(ValueError, match=r"^command: (opcode|reserved|blocks)"):
        decode_nvme_read_sqe(command)


@pytest.mark.parametrize("size", [0, 63, 65, 128])
def test_decoding_refuses_other_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"64 bytes, not {size}"):
        decode_nvme_read_sqe(bytes(size))


@given(COMMANDS, st.sampled_from([512, 4096]))
def test_the_kernels_form(command: tuple[int, int, int, int], lba_size: int) -> None:
    """Field by field, as struct nvme_uring_cmd in linux/nvme_ioctl.h lays them out."""
    namespace_id, lba, blocks, destination = command
    sent = _nvme_sqe._kernel_command(encode_nvme_read_sqe(*command), lba_size)
    assert len(sent) == 72
    names = "opcode flags rsvd1 nsid cdw2 cdw3 metadata addr metadata_len data_len"
    fields = dict(zip(names.split(), struct.unpack_from("=BBHIIIQQII", sent), strict=True))
    assert fields == {
        "opcode": 2,
        "flags": 0,
        "rsvd1": 0,
        "nsid": namespace_id,
        "cdw2": 0,
        "cdw3": 0,
        "metadata": 0,
        "addr": destination,
        "metadata_len": 0,
        "data_len": blocks * lba_size,
    }
    dwords = struct.unpack_from("=8I", sent, 40)
    assert dwords == (lba & 0xFFFFFFFF, lba >> 32, blocks - 1, 0, 0, 0, 0, 0)


def test_the_examples_run() -> None:
    functions = (encode_nvme_read_sqe, encode_nvme_read_sqes, decode_nvme_read_sqe)
    names = {function.__name__: function for function in functions}
    runner = doctest.DocTestRunner()
    for function in functions:
        (example,) = doctest.DocTestFinder(exclude_empty=False).find(
            function, module=False, globs=dict(names)
        )
        assert runner.run(example).attempted > 0
        assert runner.failures == 0
