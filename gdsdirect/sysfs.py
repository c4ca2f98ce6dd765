"""What /sys and /proc say: the only reader of both, with a root that can be set to a copy of them.

Every method is tolerant: what is missing, refused or unreadable is None or an empty tuple, never an
exception, for a container may hide any of it. Every read is bounded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

from gdsdirect.probe import read_bounded

_ATTRIBUTE_LIMIT = 1 << 16  # bytes; the kernel gives at most a page for a sysfs attribute
_MOST_LINKS = 40  # that one path may lead through, as in the kernel (MAXSYMLINKS)
_CONFIG_LIMIT = 1 << 22  # bytes; a distribution's kernel configuration has about 300,000
_SYMBOLS_LIMIT = 1 << 25  # bytes; /proc/kallsyms has about 10 MiB with many modules loaded

# The kernel's peer-to-peer DMA: what it is built with, and what that brings with it.
_P2PDMA_OPTION, _P2PDMA_SYMBOL = "CONFIG_PCI_P2PDMA", "pci_p2pdma_add_resource"

# Kernel names: nvme_init_ctrl, nvme_alloc_ns and nvme_add_ns_cdev in drivers/nvme/host/core.c. A
# multipath namespace's hidden paths, nvmeXcYnZ, are not matched.
# Compiled when they are first needed, and not at import.
_CONTROLLER = r"nvme\d+"
_DISK = r"nvme\d+n(\d+)"
_GENERIC = r"ng\d+n(\d+)"
_PCI_ADDRESS = r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]"

# PCI Express Base Specification 5.0, 7.7.8, "Access Control Services Extended Capability".
_EXTENDED_CAPABILITIES = 0x100  # where they begin in the configuration space
_ACS_CAPABILITY = 0x000D
_ACS_CONTROL = 6  # offset of the control register
_ACS_REDIRECTS = 0x04 | 0x08 | 0x20  # P2P request and completion redirect, egress control


class Device(NamedTuple):
    """A device node's place in sysfs.

    `directory` is its sysfs directory, `name` the kernel's name for it ("nvme0n1"), `subsystem` the
    class or bus it belongs to ("block", "nvme", "nvme-generic", ...; None if that is not told) and
    `parent` the directory of the device it belongs to.
    """

    directory: str
    subsystem: str | None

    @property
    def name(self) -> str:
        return os.path.basename(self.directory)

    @property
    def parent(self) -> str:
        return os.path.dirname(self.directory)


class NvmeNamespaceNodes(NamedTuple):
    """The two faces of one NVMe namespace, and the controllers that reach it.

    `generic` is the name of its generic character device ("ng0n1"; None before Linux 5.13, or
    where the kernel made none), `generic_number` that device's number, `disk` the sysfs directory
    of its block device (None where it has none), `controllers` those of its controllers: one, or
    each path of a multipath namespace, in the order of their numbers.
    """

    generic: str | None
    generic_number: int | None
    disk: str | None
    controllers: tuple[str, ...]


class PeerMemoryProvider(NamedTuple):
    """A PCI device that lends memory to other devices (P2PDMA).

    `address` is its PCI address ("0000:03:00.0"), `size` what it lends in all and `available` what
    is free now, in bytes; `published` tells whether other drivers may take from it unasked.
    """

    address: str
    size: int
    available: int
    published: bool


class PciDevice(NamedTuple):
    """A PCI device's place in the tree.

    `bridges` are the addresses of the bridges above it, the root port first, and `host_bridge` is
    the kernel's name for what is above them all ("pci0000:00").
    """

    address: str
    host_bridge: str
    bridges: tuple[str, ...]


class KernelOption(NamedTuple):
    """What tells whether the kernel was built with an option: a file, and its line as read.

    `enabled` is None where nothing tells.
    """

    enabled: bool | None
    source: str
    text: str


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo (proc(5)), as read in `line`."""

    number: str
    """Of the device, "259:1"; those of major 0 have none below."""
    point: str
    kind: str
    source: str
    options: str
    line: str

    def holds(self, path: str) -> bool:
        """Whether a path without links is below the mount point."""
        return (path + "/").startswith(self.point.rstrip("/") + "/")

    def option(self, name: str) -> str:
        """The value of an option "name=value", or nothing."""
        found = [o for o in self.options.split(",") if o.startswith(f"{name}=")]
        return found[0].partition("=")[2] if found else ""


@dataclass(frozen=True, slots=True)
class Sysfs:
    """The files of the host, or of a copy of them below `root`.

    Paths given to methods and returned by them are those of the host ("/sys/class/nvme"), whatever
    the root. Links are followed as if the root were "/".

    >>> Sysfs().device("char", os.stat("/dev/null").st_rdev).name
    'null'
    """

    root: str = "/"

    # ---- Files

    def read_bytes(self, path: str, limit: int = _ATTRIBUTE_LIMIT) -> bytes | None:
        """The first `limit` bytes of a file, or None if it cannot be read."""
        try:
            return read_bounded(self._real(path), limit)
        except (OSError, ValueError):  # ValueError: a NUL in the path
            return None

    def read(self, *parts: str) -> str | None:
        """A small file's text without surrounding blanks, or None if it cannot be read."""
        content = self.read_bytes(os.path.join("/", *parts))
        return None if content is None else content.decode("utf-8", "replace").strip()

    def line(self, start: str, *parts: str) -> str:
        """The first line of a small file that starts so, or nothing."""
        lines = (self.read(*parts) or "").splitlines()
        return next((line for line in lines if line.startswith(start)), "")

    def read_int(self, *parts: str) -> int | None:
        """A small file's text as a decimal number, or None if it is none."""
        try:
            return int(self.read(*parts) or "")
        except ValueError:
            return None

    def entries(self, *parts: str) -> tuple[str, ...]:
        """The names in a directory, sorted so that nvme2 comes before nvme10."""
        try:
            names = os.listdir(self._real(os.path.join("/", *parts)))
        except (OSError, ValueError):
            return ()
        return tuple(sorted(names, key=lambda name: (len(name), name)))

    def exists(self, *parts: str) -> bool:
        """Whether there is a file, directory or device of this name."""
        return os.path.exists(self._real(os.path.join("/", *parts)))

    def resolve(self, *parts: str) -> str:
        """The path with all links followed."""
        path = os.path.join("/", *parts)
        return os.path.realpath(path) if self.root == "/" else self._follow(path)

    def _real(self, path: str) -> str:
        """Where a path of the host's is."""
        return path if self.root == "/" else self.root + self._follow(path)

    def _follow(self, path: str) -> str:
        """The path with all links followed, none of which leads out of the root."""
        parts = path.split("/")[::-1]
        followed: list[str] = []
        links = 0
        while parts:
            part = parts.pop()
            if part == "..":
                del followed[-1:]
            elif part not in ("", "."):
                place = "/".join(["", *followed, part])
                target = self._link(place) if links < _MOST_LINKS else None
                if target is None:
                    followed.append(part)
                    continue
                links += 1
                parts += target.split("/")[::-1]
                if target.startswith("/"):
                    followed.clear()
        return "/" + "/".join(followed)

    def _link(self, place: str) -> str | None:
        """What the link `place` holds, whose directory has no links in it; None: it is no link."""
        try:
            return os.readlink(self.root.rstrip("/") + place)
        except (OSError, ValueError):
            return None

    # ---- Devices

    def device(self, kind: str, number: int) -> Device | None:
        """The device whose node has st_rdev `number`; `kind` is "char" or "block"."""
        return self.device_at("/sys/dev", kind, f"{os.major(number)}:{os.minor(number)}")

    def device_at(self, *parts: str) -> Device | None:
        """The device with this sysfs directory, or a link to it; None where there is none."""
        directory = self.resolve(*parts)
        if not self.exists(directory):
            return None
        subsystem = self.resolve(directory, "subsystem")
        known = subsystem != os.path.join(directory, "subsystem")
        return Device(directory, os.path.basename(subsystem) if known else None)

    def nvme_namespace(self, device: Device) -> NvmeNamespaceNodes | None:
        """Both nodes of the NVMe namespace that `device`, either of them, stands for.

        None if `device` is something else. The numbers in ngXnY and nvmeXnY can differ in X (one
        can count controllers and the other subsystems), so a namespace's two nodes are known by
        their common parent and their Y.
        """
        match = re.fullmatch(_GENERIC, device.name) or re.fullmatch(_DISK, device.name)
        parent = self.device_at(device.parent)
        if match is None or parent is None:
            return None
        if parent.subsystem == "nvme":
            controllers: tuple[str, ...] = (parent.directory,)
        elif parent.subsystem == "nvme-subsystem":
            # A shared namespace belongs to the subsystem, which links to each of its controllers.
            controllers = tuple(
                self.resolve(parent.directory, name)
                for name in self.entries(parent.directory)
                if re.fullmatch(_CONTROLLER, name)
            )
        else:
            return None

        generic = self._sibling(parent, _GENERIC, match[1])
        disk = self._sibling(parent, _DISK, match[1])
        return NvmeNamespaceNodes(
            generic=generic,
            generic_number=self._device_number(parent.directory, generic) if generic else None,
            disk=os.path.join(parent.directory, disk) if disk else None,
            controllers=controllers,
        )

    def nvme_generic_names(self, controller: Device) -> tuple[str, ...]:
        """Names of the generic character devices of a controller's own namespaces ("ng0n1")."""
        return tuple(n for n in self.entries(controller.directory) if re.fullmatch(_GENERIC, n))

    def pci_device(self, address: str) -> PciDevice | None:
        """The PCI device with this address, or None where there is none."""
        directory = f"/sys/bus/pci/devices/{address}"
        place = self.resolve(directory)
        if re.fullmatch(_PCI_ADDRESS, address) is None or place == directory:
            return None
        # /sys/devices/pci0000:00/<root port>/<switch's ports>/<device>. A device can have a host
        # bridge of its own below it (Intel VMD), so the last one counts.
        above = place.split("/")[:-1]
        hosts = [index for index, name in enumerate(above) if name.startswith("pci")]
        if not hosts:
            return PciDevice(address, "", ())
        return PciDevice(address, above[hosts[-1]], tuple(above[hosts[-1] + 1 :]))

    def redirects_peer_traffic(self, bridge: str) -> bool | None:
        """Whether a bridge sends transfers between devices below it up to the host bridge (ACS).

        None where that can't be told: only root may read so far into the configuration space.
        """
        config = self.read_bytes(f"/sys/bus/pci/devices/{bridge}/config", 4096) or b""
        if len(config) <= _EXTENDED_CAPABILITIES:
            return None
        place = find_extended_capability(config, _ACS_CAPABILITY)
        if place is None or place + _ACS_CONTROL >= len(config):
            return False
        return bool(config[place + _ACS_CONTROL] & _ACS_REDIRECTS)

    # ---- The kernel

    def kernel_has_p2pdma(self) -> KernelOption:
        """Whether the running kernel has PCI peer-to-peer DMA (CONFIG_PCI_P2PDMA).

        Asked of the kernel's configuration, else of its symbols: versions do not tell, as
        distributions choose.
        """
        release = self.read("proc/sys/kernel/osrelease")
        files = ["/proc/config.gz"]
        if release:
            files += [f"/boot/config-{release}", f"/lib/modules/{release}/config"]
        for path in files:
            config = self.read_bytes(path, _CONFIG_LIMIT)
            if config is not None and path.endswith(".gz"):
                config = _gunzip_or_none(config, _CONFIG_LIMIT)
            if config is not None and b"CONFIG_" in config:
                # An option whose own conditions are not met is not listed at all.
                enabled = f"\n{_P2PDMA_OPTION}=y\n".encode() in config
                text = f"{_P2PDMA_OPTION}=y" if enabled else f"# {_P2PDMA_OPTION} is not set"
                return KernelOption(enabled, path, text)

        # Last, because the kernel takes tens of milliseconds to write its symbols out.
        found = self.kernel_has_symbol(_P2PDMA_SYMBOL)
        told = _P2PDMA_SYMBOL if found else f"no {_P2PDMA_SYMBOL}"
        text = "cannot be read" if found is None else told
        return KernelOption(found, "/proc/kallsyms", text)

    def kernel_has_symbol(self, symbol: str) -> bool | None:
        """Whether the running kernel has this symbol; None where it doesn't show its symbols."""
        symbols = self.read_bytes("/proc/kallsyms", _SYMBOLS_LIMIT)
        # In a module's line, the module's name follows.
        if symbols is not None and re.search(rb" %s[\t\n]" % re.escape(symbol.encode()), symbols):
            return True
        # Absent from a list that is empty (hidden) or was cut short says nothing.
        return False if symbols and len(symbols) < _SYMBOLS_LIMIT else None

    def mounts(self) -> list[Mount]:
        """What is mounted, as this process sees it; the last one on a place is on top."""
        return parse_mounts(self.read_bytes("/proc/self/mountinfo", 1 << 22) or b"")

    def huge_page_size(self) -> int:
        """Bytes of the default huge page (/proc/meminfo), 2 MiB where that doesn't say."""
        line = self.line("Hugepagesize:", "proc/meminfo")
        return int(line.split()[1]) << 10 if line else 2 << 20

    def peer_memory_providers(self) -> tuple[PeerMemoryProvider, ...]:
        """Each PCI device with a p2pmem directory, in the order of their addresses.

        A driver that has let go of its memory can leave the directory behind, with size 0.
        """
        providers = []
        for address in self.entries("sys/bus/pci/devices"):
            p2pmem = f"sys/bus/pci/devices/{address}/p2pmem"
            size = self.read_int(p2pmem, "size")
            available = self.read_int(p2pmem, "available")
            if size is not None and available is not None:
                published = self.read(p2pmem, "published") == "1"
                providers.append(PeerMemoryProvider(address, size, available, published))
        return tuple(providers)

    def _sibling(self, parent: Device, pattern: str, instance: str) -> str | None:
        for name in self.entries(parent.directory):
            match = re.fullmatch(pattern, name)
            if match and match[1] == instance:
                return name
        return None

    def _device_number(self, *directory: str) -> int | None:
        match = re.fullmatch("([0-9]{1,4}):([0-9]{1,7})", self.read(*directory, "dev") or "")
        return os.makedev(int(match[1]), int(match[2])) if match else None


def find_extended_capability(config: bytes, identifier: int) -> int | None:
    """Where an extended capability begins in a PCI Express configuration space, or None."""
    place = _EXTENDED_CAPABILITIES
    for _ in range(len(config) // 8):  # a loop of pointers ends too
        header = int.from_bytes(config[place : place + 4], "little")
        if header & 0xFFFF == identifier:
            return place
        place = header >> 20
        if place < _EXTENDED_CAPABILITIES:
            return None
    return None


def _gunzip_or_none(packed: bytes, limit: int) -> bytes | None:
    import zlib

    try:
        # 16: a gzip header is expected, as kernel/configs.c writes one.
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(packed, limit)
    except zlib.error:
        return None


def parse_mounts(mountinfo: bytes) -> list[Mount]:
    """The mounts that /proc/self/mountinfo tells of."""
    found = []
    for line in mountinfo.decode("utf-8", "replace").splitlines():
        # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        first, _, second = line.partition(" - ")
        before, after = first.split(" "), second.split(" ")
        if len(before) >= 6 and len(after) >= 3:
            point, source = _unescape(before[4]), _unescape(after[1])
            found.append(Mount(before[2], point, after[0], source, _unescape(after[2]), line))
    return found


def _unescape(text: str) -> str:
    """Blanks are written as \\040."""
    return re.sub(r"\\([0-3][0-7]{2})", lambda match: chr(int(match[1], 8)), text)
