"""GpuMappedBuffer: what it maps, what keeps it, and when it may go. Peer memory: tests/lab."""

import ctypes
import gc
import mmap
import os
import pickle
import weakref
from array import array
from pathlib import Path

import numpy as np
import pytest
from support import run_python

from gdsdirect import AsyncUringStream, GpuMappedBuffer, MemoryKind


def test_host_memory_is_whole_pages_and_zero() -> None:
    with GpuMappedBuffer.from_host_visible(10_000) as buffer:
        assert buffer.kind is MemoryKind.HOST_VISIBLE
        assert (buffer.nbytes, len(buffer)) == (10_000, 10_000)
        assert buffer.address % mmap.PAGESIZE == 0
        with buffer.view() as view:
            assert view == bytes(10_000)
            view[:4] = b"abcd"
        assert ctypes.string_at(buffer.address, 4) == b"abcd"
        assert np.frombuffer(buffer, np.uint8)[3] == ord("d")


def test_closed() -> None:
    buffer = GpuMappedBuffer.from_host_visible(4096)
    buffer.close()
    buffer.close()
    assert buffer.closed
    assert "closed" in repr(buffer)
    for use in (lambda: buffer.address, buffer.view, lambda: AsyncUringStream(buffer)):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_closing_waits_for_views_and_streams() -> None:
    buffer = GpuMappedBuffer.from_host_visible(4096)
    view = buffer.view()
    part = view[:10]
    with AsyncUringStream(buffer, depth=1):
        with pytest.raises(BufferError, match="in use by 2 streams, views or reads"):
            buffer.close()
        view.release()
    with pytest.raises(BufferError, match="in use by 1 "):
        buffer.close()
    part.release()
    buffer.close()


def test_an_error_is_not_hidden_by_views_that_it_holds() -> None:
    views = []

    def fail() -> None:
        with GpuMappedBuffer.from_host_visible(4096) as buffer:
            views.append(buffer.view())
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()


def test_closing_gives_the_memory_back() -> None:
    buffer = GpuMappedBuffer.from_host_visible(64 << 20)
    before = Path("/proc/self/statm").read_text().split()[0]
    buffer.close()
    after = Path("/proc/self/statm").read_text().split()[0]
    assert int(before) - int(after) >= (64 << 20) // mmap.PAGESIZE


@pytest.mark.parametrize("kind", [bytearray(100), array("d", [0.0] * 10), np.zeros((3, 4))])
def test_memory_of_an_object(kind: object) -> None:
    buffer = GpuMappedBuffer.from_object(kind)  # type: ignore[arg-type]
    with memoryview(kind) as view:  # type: ignore[arg-type]
        assert buffer.nbytes == view.nbytes
        buffer.view()[0] = 7
        assert view.cast("B")[0] == 7
    assert buffer.kind is MemoryKind.HOST_VISIBLE


def test_an_object_is_kept_and_not_resized() -> None:
    data = bytearray(b"x" * 4096)
    buffer = GpuMappedBuffer.from_object(data)
    with pytest.raises(BufferError):
        data.append(0)
    del data
    gc.collect()
    with buffer.view() as view:
        assert view == b"x" * 4096
    buffer.close()


@pytest.mark.parametrize(
    ("obj", "error", "text"),
    [
        (b"bytes", ValueError, "of this bytes is read-only"),
        (bytearray(), ValueError, "empty"),
        (np.zeros((4, 4))[:, 1], ValueError, "not contiguous"),
        (7, TypeError, "bytes-like"),
    ],
)
def test_what_is_no_memory_to_write_into(obj: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        GpuMappedBuffer.from_object(obj)  # type: ignore[arg-type]


def test_an_address_keeps_its_owner() -> None:
    class Owner(bytearray):
        pass

    owner = Owner(4096)
    alive = weakref.ref(owner)
    address = ctypes.addressof(ctypes.c_char.from_buffer(owner))
    buffer = GpuMappedBuffer.from_bar1_peer_address(address, 4096, owner)
    assert (buffer.kind, buffer.address, buffer.nbytes) == (MemoryKind.BAR1_PEER, address, 4096)
    del owner
    gc.collect()
    assert alive() is not None
    buffer.view()[:2] = b"hi"
    buffer.close()
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(("address", "nbytes"), [(0, 1), (-1, 1), (4096, 0), (4096, -1)])
def test_wrong_addresses(address: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="mapped range of at least 1 byte"):
        GpuMappedBuffer.from_bar1_peer_address(address, nbytes, object())


def test_an_address_range_beyond_the_address_space() -> None:
    with pytest.raises(ValueError, match="address space"):
        GpuMappedBuffer.from_bar1_peer_address(2**64 - 4096, 8192, object())


@pytest.mark.parametrize("nbytes", [0, -1])
def test_wrong_sizes(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"nbytes is {nbytes}"):
        GpuMappedBuffer.from_host_visible(nbytes)
    with pytest.raises(ValueError, match=f"nbytes is {nbytes}"):
        GpuMappedBuffer.from_bar1_peer("/dev/null", nbytes)


def test_a_missing_peer_file_says_what_there_is() -> None:
    path = "/sys/bus/pci/devices/ffff:ff:1f.7/p2pmem/allocate"
    with pytest.raises(FileNotFoundError, match=r"CONFIG_PCI_P2PDMA|lend theirs here: ") as raised:
        GpuMappedBuffer.from_bar1_peer(path, 4096)
    assert raised.value.filename == path


def test_a_regular_file_is_no_peer_memory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(8192))
    with pytest.raises(ValueError, match="is a regular file"):
        GpuMappedBuffer.from_bar1_peer(file, 4096)
    with file.open("r+b") as opened, pytest.raises(ValueError, match="is a regular file"):
        GpuMappedBuffer.from_bar1_peer(opened, 4096)


def test_a_device_that_does_not_map() -> None:
    with pytest.raises(OSError, match="can't be mapped, so it is no peer memory"):
        GpuMappedBuffer.from_bar1_peer("/dev/null", 4096)
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no peer memory"):
        GpuMappedBuffer.from_bar1_peer("/dev/null", 4096)
    assert len(os.listdir("/proc/self/fd")) == files


def test_huge_pages_or_how_to_get_them() -> None:
    """Both sides of it, whichever this host is on: they may be reserved or not."""
    free = next(
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("HugePages_Free")
    )
    if free == 0:
        with pytest.raises(OSError, match=r"sysctl vm.nr_hugepages=2`"):
            GpuMappedBuffer.from_host_visible((2 << 20) + 1, hugepages=True)
    else:
        with GpuMappedBuffer.from_host_visible(5000, hugepages=True) as buffer:
            assert buffer.nbytes == 5000
            assert buffer.address % (2 << 20) == 0


def test_not_pickled() -> None:
    with GpuMappedBuffer.from_host_visible(1) as buffer, pytest.raises(TypeError, match="pickled"):
        pickle.dumps(buffer)


@pytest.mark.parametrize(
    "memory",
    [
        "GpuMappedBuffer.from_host_visible(1 << 20)",
        "GpuMappedBuffer.from_object(memoryview(bytearray(4096))[8:])",
    ],
)
def test_a_cycle_with_memory_of_a_memoryview_is_collected(memory: str) -> None:
    """CPython before 3.11.9 and 3.12.3 crashes where a buffer of the memoryview itself is out."""
    run_python(f"""
import gc, weakref
from gdsdirect import GpuMappedBuffer
class Owner:
    pass
for _ in range(100):
    buffer = {memory}  # before the owner: the collector begins with the oldest
    owner = Owner()
    owner.itself, owner.buffer = owner, buffer
    alive = weakref.ref(owner)
    del owner, buffer
    gc.collect()
    assert alive() is None
""")


def test_garbage_cycles_are_collected() -> None:
    run_python("""
import gc, weakref
from gdsdirect import AsyncUringStream, GpuMappedBuffer
class Owner(bytearray):
    pass
gc.disable()
owner = Owner(4096)
alive = weakref.ref(owner)
buffer = GpuMappedBuffer.from_object(owner)
stream = AsyncUringStream(buffer, depth=1)
stream.close()
owner.stream, owner.buffer, owner.view = stream, buffer, buffer.view()
del owner, stream, buffer
assert alive() is not None
gc.collect()
assert alive() is None
""")
