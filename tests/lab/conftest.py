"""Fixtures of the tests that run inside the virtual machine. tests/test_in_lab.py starts them."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import guest
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # reading.py is in there

from gdsdirect import GpuMappedBuffer, Namespace

Open = Callable[[str], Namespace]
Mount = Callable[..., Path]


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
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """Mounts, as mount(8) is told, in a new folder until the session ends."""
    with contextlib.ExitStack() as stack:

        def mount_anew(*arguments: str | Path) -> Path:
            folder = tmp_path_factory.mktemp("mounted")
            subprocess.run(["mount", *arguments, folder], check=True)
            stack.callback(lambda: subprocess.run(["umount", folder], check=True))
            return folder

        yield mount_anew


@pytest.fixture(scope="session")
def mounted(mount: Mount) -> Path:
    """The folder with the files of the drive `files`, on ext4."""
    return mount("-t", "ext4", "-o", "ro", guest.DRIVES["files"].disk)


@pytest.fixture(scope="session")
def ext4(mount: Mount) -> Path:
    """A folder to write to, as all below: 64 MiB, with a journal."""
    return mount("-t", "ext4", guest.FILE_SYSTEMS["ext4"].disk)


@pytest.fixture(scope="session")
def xfs(mount: Mount) -> Path:
    return mount("-t", "xfs", guest.FILE_SYSTEMS["xfs"].disk)


@pytest.fixture(scope="session")
def partition(mount: Mount) -> Path:
    """An ext4 that begins 1 MiB into its drive."""
    return mount("-t", "ext4", f"{guest.FILE_SYSTEMS['partition'].disk}p1")


@pytest.fixture(params=["ext4", "xfs", "partition"])
def file_system(request: pytest.FixtureRequest) -> Path:
    """Each that lies right on a drive."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="session")
def overlay(mount: Mount, ext4: Path) -> Path:
    """Both its layers are on the ext4."""
    layers = {name: ext4 / "layers" / name for name in ("lowerdir", "upperdir", "workdir")}
    for layer in layers.values():
        layer.mkdir(parents=True)
    options = ",".join(f"{name}={layer}" for name, layer in layers.items())
    return mount("-t", "overlay", "-o", options, "overlay")


@pytest.fixture(scope="session")
def mount_image(mount: Mount, xfs: Path) -> Mount:
    """Mounts a new ext4, in a file of the XFS of this name, with options."""
    subprocess.run(["modprobe", "loop"], check=True)  # makes /dev/loop-control, as udev would

    def mount_new(name: str, options: str) -> Path:
        image = xfs / name
        subprocess.run(["mkfs.ext4", "-q", "-b", "4096", image, "16M"], check=True)
        return mount("-t", "ext4", "-o", f"loop,{options}", image)

    return mount_new


@pytest.fixture(scope="session")
def looped(mount_image: Mount) -> Path:
    return mount_image("looped.image", "rw")


@pytest.fixture(scope="session")
def journalled(mount_image: Mount) -> Path:
    """Data goes to the journal first."""
    return mount_image("journalled.image", "data=journal")


@pytest.fixture(scope="session")
def tmpfs(mount: Mount) -> Path:
    return mount("-t", "tmpfs", "tmpfs")
