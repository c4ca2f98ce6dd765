"""Fixtures of the tests that run inside the virtual machine. tests/test_in_lab.py starts them."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import guest
import pytest

from gdsdirect import GpuMappedBuffer, Namespace

Open = Callable[[str], Namespace]


@pytest.fixture
def open_namespace() -> Iterator[Open]:
    """Opens the namespace of the drive with the serial given, until the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda serial: stack.enter_context(Namespace(guest.DRIVES[serial].generic))


@pytest.fixture
def data(open_namespace: Open) -> Namespace:
    """The drive that most tests read: blocks of 512 bytes."""
    return open_namespace("data")


@pytest.fixture
def small(open_namespace: Open) -> Namespace:
    """The drive with blocks of 4096 bytes and short transfers."""
    return open_namespace("small")


@pytest.fixture
def buffer() -> Iterator[GpuMappedBuffer]:
    with GpuMappedBuffer.from_host_visible(guest.MIB) as made:
        yield made


@pytest.fixture(scope="session")
def peer_source() -> str:
    """The file that maps to peer memory. Tests that use it are the only ones to be skipped."""
    if not guest.EXPECTED.peer_memory:
        pytest.skip("this kernel has no peer memory")
    folder = Path("/sys/bus/pci/devices", guest.DRIVES["peer"].pci_address)
    start, end, _ = (folder / "resource").read_text().splitlines()[2].split()
    guest.note(bar=[int(start, 16), int(end, 16)])
    return str(folder / "p2pmem/allocate")


@pytest.fixture
def peer(peer_source: str) -> Iterator[GpuMappedBuffer]:
    """1 MiB of peer memory. The CPU reaches it slowly in this machine."""
    with GpuMappedBuffer.from_bar1_peer(peer_source, guest.MIB) as made:
        yield made


@pytest.fixture(scope="session")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the files of the drive `files`, on ext4."""
    folder = tmp_path_factory.mktemp("mounted")
    disk = str(guest.DRIVES["files"].disk)
    subprocess.run(["mount", "-t", "ext4", "-o", "ro", disk, str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
