"""The machine that the tests run in, as tests/test_in_lab.py made it, and reads that are recorded.

What was read into which memory is written to the shared folder, where test_in_lab.py compares it
with what the drives themselves were told.
"""

import contextlib
import json
import os
import select
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from gdsdirect import (
    AsyncUringStream,
    Completion,
    GpuMappedBuffer,
    MemoryKind,
    Namespace,
    encode_nvme_read_sqe,
)

# Below 4 GiB, where an address is its own alias (csrc/alias.h), also where much else is below it.
MAP_32BIT = 0x40

KIB = 1 << 10
MIB = 1 << 20
FOLDER = Path(
    os.environ.get("GDSDIRECT_LAB")
    or pytest.exit("tests/lab runs inside the virtual machine: run tests/test_in_lab.py", 4)
)

Extent = tuple[int, int]
"""First block, number of blocks."""


@dataclass(frozen=True)
class Drive:
    """A drive of the machine: what it was made with, and where the kernel has put it."""

    serial: str
    nsid: int
    block_size: int
    blocks: int
    metadata: int
    extended_metadata: bool
    mdts: int
    read_errors: Sequence[int]

    @cached_property
    def controller(self) -> Path:
        """The folder of the controller in /sys."""
        for folder in Path("/sys/class/nvme").iterdir():
            if (folder / "serial").read_text().strip() == self.serial:
                return folder.resolve()
        raise LookupError(f"no drive has the serial {self.serial}")

    @property
    def pci_address(self) -> str:
        return (self.controller / "device").resolve().name

    @property
    def generic(self) -> Path:
        """/dev/ngXnY."""
        (node,) = self.controller.glob("ng*n*")
        return Path("/dev", node.name)

    @property
    def disk(self) -> Path:
        """/dev/nvmeXnY."""
        (node,) = self.controller.glob("nvme*n*")
        return Path("/dev", node.name)

    def queue(self, attribute: str) -> int:
        """An attribute of the block device's queue."""
        return int(Path("/sys/block", self.disk.name, "queue", attribute).read_text())

    @cached_property
    def image(self) -> bytes:
        """All that is on the drive."""
        return (FOLDER / f"{self.serial}.image").read_bytes()

    def contents(self, extents: Iterable[Extent]) -> bytes:
        """What the drive has in `extents`, one after the other."""
        size = self.block_size
        return b"".join(self.image[lba * size : (lba + n) * size] for lba, n in extents)


@dataclass(frozen=True)
class Expected:
    """What test_in_lab.py knows of the kernel."""

    peer_memory: bool
    """It has PCI P2PDMA."""
    commands_for_everyone: bool
    """Who may open a namespace may ask what it is and read it; before Linux 6.2, CAP_SYS_ADMIN."""
    maps_to_the_end: bool
    """A command into a registered buffer has all of it mapped, from its target to the end."""


def _load(which: str) -> dict[str, Drive]:
    return {drive["serial"]: Drive(**drive) for drive in _TOLD[which]}


_TOLD: dict[str, Any] = json.loads((FOLDER / "machine.json").read_text())
EXPECTED = Expected(**_TOLD["expected"])
DRIVES = _load("drives")
VICTIMS = _load("victims")
"""Drives that test_faults.py does something to; they may not be there any more."""
FILE_SYSTEMS = _load("file_systems")
"""Drives to mount and write to: their images are what they began with."""
READABLE = [name for name, it in DRIVES.items() if not it.metadata and not it.read_errors]

# ---- Reads


def pieces(first: int, blocks: int, most: int) -> list[Extent]:
    """`blocks` blocks from `first` on, in pieces of `most`."""
    end = first + blocks
    return [(lba, min(most, end - lba)) for lba in range(first, end, most)]


def packed(namespace: Namespace, extents: Iterable[Extent], address: int) -> bytes:
    """Commands that read `extents` to `address` on, one after the other."""
    made = bytearray()
    for lba, blocks in extents:
        made += encode_nvme_read_sqe(namespace.nsid, lba, blocks, address)
        address += blocks * namespace.lba_size
    return bytes(made)


def submit(
    stream: AsyncUringStream, namespace: Namespace, extents: Sequence[Extent], offset: int = 0
) -> range:
    """Submit reads of `extents`, one after the other into the buffer from `offset` on."""
    record(stream.buffer, namespace.nsid, extents)
    commands = packed(namespace, extents, stream.buffer.address + offset)
    return stream.submit_nvme_passthrough(namespace, commands)


def read(
    stream: AsyncUringStream, namespace: Namespace, extents: Sequence[Extent], offset: int = 0
) -> list[Completion]:
    """The same, and wait; every byte must have been delivered."""
    tokens = submit(stream, namespace, extents, offset)
    done = sorted(stream.wait(len(tokens)), key=lambda completion: completion.user_data)
    assert [completion.user_data for completion in done] == list(tokens)
    sizes = [blocks * namespace.lba_size for _, blocks in extents]
    assert [completion.result() for completion in done] == sizes
    return done


def record(buffer: GpuMappedBuffer, nsid: int, extents: Sequence[Extent]) -> None:
    """Note commands that a drive gets, each an extent, with the kind of memory they go into."""
    target = "peer" if buffer.kind is MemoryKind.BAR1_PEER else "host"
    note(target=target, nsid=nsid, extents=list(extents))


def record_frames(
    buffer: GpuMappedBuffer, nsid: int, extents: Iterable[Extent], block_size: int, offset: int
) -> None:
    """Note the page frames that commands, which no other test sends, are to be written into."""
    start = buffer.address + offset
    for lba, blocks in extents:
        end = start + blocks * block_size
        first, count = start // 4096, -(-end // 4096) - start // 4096
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(8 * first)
            entries = struct.unpack(f"{count}Q", pagemap.read(8 * count))
        frames = [entry & (1 << 55) - 1 for entry in entries]
        note(nsid=nsid, lba=lba, blocks=blocks, frames=frames)
        start = end


def note(**what: object) -> None:
    """A line for test_in_lab.py."""
    with (FOLDER / "notes").open("a") as lines:
        print(json.dumps(what), file=lines)


def check(buffer: GpuMappedBuffer, expected: bytes, offset: int = 0) -> None:
    """Fail, with the first wrong byte, unless `expected` is in the buffer at `offset`."""
    with buffer.view() as view:
        found = bytes(view[offset : offset + len(expected)])
    if found != expected:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
        pytest.fail(f"{len(found)} bytes, of {len(expected)}; byte {at} is the first wrong one")


def fill(buffer: GpuMappedBuffer, byte: int) -> bytes:
    """Set every byte of the buffer; returns them all."""
    with buffer.view() as view:
        view[:] = pattern = bytes([byte]) * len(view)
    return pattern


# ---- The machine


def wait_until(condition: Callable[[], object], what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.01)


def answer_to(request: str) -> str:
    """What the lab says to a request, which lab/control.py describes."""
    answer = b""
    with open("/dev/lab", "r+b", buffering=0) as port:
        port.write(request.encode() + b"\n")
        while not answer.endswith(b"\n"):
            assert select.select([port], [], [], 10)[0], f"no answer to {request!r}"
            answer += port.read(4096)
    return answer.decode().strip()


def is_there(drive: Drive) -> bool:
    """Whether the kernel has a drive of this serial, with its namespace."""
    with contextlib.suppress(LookupError, OSError):
        return bool(list(replace(drive).controller.glob("ng*n*")))
    return False


_CAPABILITIES = 0x34  # linux/pci_regs.h
_EXPRESS = 0x10
_SLOT_CONTROL = 0x18
_POWER_OFF = 0x0700  # PCI_EXP_SLTCTL_PCC and PCI_EXP_SLTCTL_PWR_IND_OFF


def pull(drive: Drive) -> None:
    """Take a drive, on a root port of its own, out at once, and then have the kernel find it gone.

    QEMU's slots take the drive away when their power is switched off; this machine's kernel, which
    has ACPI look after the slots, isn't told, as it would be by hardware.
    """
    device = Path("/sys/bus/pci/devices", drive.pci_address)
    with open(device.resolve().parent / "config", "r+b", buffering=0) as port:
        config = port.read(256)
        at = config[_CAPABILITIES]
        while config[at] != _EXPRESS:
            at = config[at + 1]
        (before,) = struct.unpack_from("<H", config, at + _SLOT_CONTROL)
        port.seek(at + _SLOT_CONTROL)
        port.write(struct.pack("<H", before | _POWER_OFF))
    assert (device / "config").read_bytes()[:2] == b"\xff\xff", "it is still there"
    (device / "remove").write_text("1")


def interrupts(drive: Drive) -> int:
    """Interrupts that the drive's I/O queues have raised since the machine started."""
    return sum(_interrupts_of(drive.controller.name))


def _interrupts_of(controller: str) -> Iterator[int]:
    cpus, *lines = Path("/proc/interrupts").read_text().splitlines()
    count = len(cpus.split())
    for line in lines:
        words = line.split()
        if words[-1].startswith(f"{controller}q") and words[-1] != f"{controller}q0":
            yield from map(int, words[1 : 1 + count])
