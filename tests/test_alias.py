"""The addresses below 4 GiB that Linux may take for a buffer's are kept free: csrc/alias.h.

That it does so is seen in the lab, where tests/lab/test_faults.py has its worker threads send
commands; here, that nothing can be there, and that what is there already is never at risk.
"""

import ctypes
import gc
import mmap
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gdsdirect import (
    AsyncUringStream,
    Geometry,
    GpuMappedBuffer,
    Namespace,
    encode_nvme_read_sqe,
)

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="only x86-64 has the x32 ABI"
)

MIB = 1 << 20
GEOMETRY = Geometry(nsid=3, lba_size=512, capacity=1 << 20, max_transfer=64 << 10)
NOTHING, READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
FIXED_NOREPLACE, NORESERVE = 0x100000, 0x4000
FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def low_mappings() -> dict[range, str]:
    """What is mapped below 4 GiB, and how."""
    found = {}
    gc.collect()  # buffers that other tests left
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, access, *_ = line.split()
            start, end = (int(number, 16) for number in span.split("-"))
            if start < 1 << 32:
                found[range(start, end)] = access
    return found


def is_held(address: int, nbytes: int) -> bool:
    """Whether every alias of a range is mapped without access."""
    first = address & 0xFFFFFFFF
    pages = range(first - first % 4096, first + nbytes, 4096)
    held = [span for span, access in low_mappings().items() if access == "---p"]
    return all(any(page % (1 << 32) in span for span in held) for page in pages)


@contextmanager
def mapped(address: int, nbytes: int) -> Iterator[int]:
    """Memory at this address, as another library could have it; skips where something is there."""
    flags = PRIVATE | NORESERVE | (FIXED_NOREPLACE if address else 0)
    found = _libc.mmap(address, nbytes, READ_WRITE, flags, -1, 0)
    if found == FAILED or (address and found != address):
        pytest.skip(f"there is something at {address:#x} already")
    try:
        yield found
    finally:
        _libc.munmap(found, nbytes)


def at(address: int, nbytes: int) -> GpuMappedBuffer:
    return GpuMappedBuffer.from_object((ctypes.c_char * nbytes).from_address(address))


def command(address: int, blocks: int = 8) -> bytes:
    return encode_nvme_read_sqe(3, 0, blocks, address)


def test_aliases_are_held_as_long_as_the_buffer() -> None:
    before = low_mappings()
    buffer = GpuMappedBuffer.from_host_visible(3 * MIB)
    assert is_held(buffer.address, buffer.nbytes)
    again = GpuMappedBuffer.from_object(buffer)
    part = GpuMappedBuffer.from_object(memoryview(again)[5000 : 2 * MIB])
    address = buffer.address
    for one in (part, again, buffer):
        assert is_held(address, 3 * MIB)
        one.close()
    assert low_mappings() == before


def test_a_buffer_of_more_than_4_gib() -> None:
    before = low_mappings()
    with mapped(0, 5 << 30) as address:
        with at(address, 5 << 30) as large, GpuMappedBuffer.from_host_visible(MIB) as small:
            assert is_held(small.address, small.nbytes)
            free = sum(len(span) for span, access in low_mappings().items() if access == "---p")
            used = sum(len(span) + (128 << 10) for span in before)
            assert free >= (1 << 32) - used
            assert large._exposed == any(access != "---p" for access in before.values())
        assert low_mappings() == before


def test_memory_below_4_gib_is_its_own_alias() -> None:
    with mapped(0x3C000000, MIB) as address:
        before = low_mappings()
        with at(address, MIB) as buffer:
            assert not buffer._exposed
            assert low_mappings() == before


@pytest.fixture
def exposed() -> Iterator[tuple[GpuMappedBuffer, range]]:
    """A buffer of 1 MiB, and those of its addresses whose alias is somebody else's: 64 KiB."""
    with mapped(0, 2 * MIB) as found:
        start = -(-found // MIB) * MIB
        middle = start + (512 << 10)
        with mapped(middle & 0xFFFFFFFF, 64 << 10) as other:
            ctypes.memset(other, 0x5A, 64 << 10)
            with at(start, MIB) as buffer:
                assert buffer._exposed
                yield buffer, range(middle, middle + (64 << 10))
            assert ctypes.string_at(other, 64 << 10) == b"\x5a" * (64 << 10)


def test_what_could_be_written_to_instead_is_refused(
    exposed: tuple[GpuMappedBuffer, range],
) -> None:
    buffer, there = exposed
    with (
        Namespace("/dev/null", geometry=GEOMETRY) as namespace,
        AsyncUringStream(buffer, register=False) as stream,
    ):
        for address in (there.start, there.stop - 512, there.start - 3584, there[512]):
            good = command(buffer.address)
            with pytest.raises(ValueError, match=r"^command 1: dest_bar1_ptr, cut to 32 bits"):
                stream.submit_nvme_passthrough(namespace, good + command(address))
            assert stream.stats.submitted == 0
        for address in (buffer.address, there.start - 4096, there.stop, there.stop + 4096):
            stream.submit_nvme_passthrough(namespace, command(address))
        assert [done.result() for done in stream.wait(4)] == [4096] * 4
        # Reads of files are not cut.
        with open(__file__, "rb") as file:
            stream.submit_read(file, 0, 512, there.start - buffer.address)
            assert stream.wait()[0].result() == 512


def test_registered_memory_is_not_at_risk(exposed: tuple[GpuMappedBuffer, range]) -> None:
    buffer, there = exposed
    with (
        Namespace("/dev/null", geometry=GEOMETRY) as namespace,
        AsyncUringStream(buffer, register=True) as stream,
    ):
        stream.submit_nvme_passthrough(namespace, command(there.start))
        assert stream.wait()[0].result() == 4096
        assert stream.stats.registered == 1


def test_memory_of_our_own_is_placed_elsewhere() -> None:
    """All that is free below 4 GiB but the lowest part is taken: a place for it is found there."""
    with GpuMappedBuffer.from_host_visible(MIB) as before:
        below = before.address - 256 * MIB
    if below & 0xFFFFFFFF > below + 256 * MIB & 0xFFFFFFFF:
        below -= 256 * MIB
    with mapped(below & 0xFFFFFFFF, 256 * MIB):
        for _ in range(20):
            with GpuMappedBuffer.from_host_visible(MIB) as buffer:
                assert not buffer._exposed
                assert is_held(buffer.address, buffer.nbytes)
