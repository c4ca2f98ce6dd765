"""What /sys and /proc say: the only reader of both, with a root that tests can set.

Every method is tolerant: what is missing, refused or unreadable is None or an empty tuple, never an
exception, for a container may hide any of it. Every read is bounded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from gdsdirect.probe import read_bounded

_ATTRIBUTE_LIMIT = 1 << 16  # bytes; the kernel gives at most a page for a sysfs attribute
_CONFIG_LIMIT = 1 << 22  # bytes; a distribution's kernel configuration has about 300,000
_SYMBOLS_LIMIT = 1 << 25  # bytes; /proc/kallsyms has about 10 MiB with many modules loaded

# Kernel names: nvme_init_ctrl, nvme_alloc_ns and nvme_add_ns_cdev in drivers/nvme/host/core.c. A
# multipath namespace's hidden paths, nvmeXcYnZ, are not matched.
_CONTROLLER = re.compile(r"nvme\d+")
_DISK = re.compile(r"nvme\d+n(\d+)")
_GENERIC = re.compile(r"ng\d+n(\d+)")


@dataclass(frozen=True, slots=True)
class Device:
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


@dataclass(frozen=True, slots=True)
class NvmeNamespaceNodes:
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


@dataclass(frozen=True, slots=True)
class PeerMemoryProvider:
    """A PCI device that lends memory to other devices (P2PDMA).

    `address` is its PCI address ("0000:03:00.0"), `size` what it lends in all and `available` what
    is free now, in bytes; `published` tells whether other drivers may take from it unasked.
    """

    address: str
    size: int
    available: int
    published: bool


@dataclass(frozen=True, slots=True)
class Sysfs:
    """/sys and /proc below `root`; paths given to and returned by methods are real paths.

    >>> Sysfs().device("char", os.stat("/dev/null").st_rdev).name
    'null'
    """

    root: str = "/"

    def path(self, *parts: str) -> str:
        """`parts` joined below the root."""
        return os.path.join(self.root, *parts)

    def read(self, *parts: str) -> str | None:
        """A small file's text without surrounding blanks, or None if it cannot be read."""
        content = _read_or_none(self.path(*parts), _ATTRIBUTE_LIMIT)
        return None if content is None else content.decode("utf-8", "replace").strip()

    def read_int(self, *parts: str) -> int | None:
        """A small file's text as a decimal number, or None if it is none."""
        try:
            return int(self.read(*parts) or "")
        except ValueError:
            return None

    def entries(self, *parts: str) -> tuple[str, ...]:
        """The names in a directory, sorted so that nvme2 comes before nvme10."""
        try:
            names = os.listdir(self.path(*parts))
        except OSError:
            return ()
        return tuple(sorted(names, key=lambda name: (len(name), name)))

    def device(self, kind: str, number: int) -> Device | None:
        """The device whose node has st_rdev `number`; `kind` is "char" or "block"."""
        link = self.path("sys/dev", kind, f"{os.major(number)}:{os.minor(number)}")
        return self.device_at(os.path.realpath(link))

    def device_at(self, directory: str) -> Device | None:
        """The device with this sysfs directory, or None where there is none."""
        if not os.path.isdir(directory):
            return None
        subsystem = os.path.join(directory, "subsystem")
        name = os.path.basename(os.path.realpath(subsystem)) if os.path.lexists(subsystem) else None
        return Device(directory, name)

    def nvme_namespace(self, device: Device) -> NvmeNamespaceNodes | None:
        """Both nodes of the NVMe namespace that `device`, either of them, stands for.

        None if `device` is something else. The numbers in ngXnY and nvmeXnY can differ in X (one
        can count controllers and the other subsystems), so a namespace's two nodes are known by
        their common parent and their Y.
        """
        match = _GENERIC.fullmatch(device.name) or _DISK.fullmatch(device.name)
        parent = self.device_at(device.parent)
        if match is None or parent is None:
            return None
        if parent.subsystem == "nvme":
            controllers: tuple[str, ...] = (parent.directory,)
        elif parent.subsystem == "nvme-subsystem":
            # A shared namespace belongs to the subsystem, which links to each of its controllers.
            controllers = tuple(
                os.path.realpath(os.path.join(parent.directory, name))
                for name in self.entries(parent.directory)
                if _CONTROLLER.fullmatch(name)
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
        return tuple(n for n in self.entries(controller.directory) if _GENERIC.fullmatch(n))

    def kernel_has_p2pdma(self) -> bool | None:
        """Whether the running kernel has PCI peer-to-peer DMA; None when it can't be told.

        Asked of the kernel's configuration (CONFIG_PCI_P2PDMA), else of its symbols: versions do
        not tell, as distributions choose.
        """
        release = self.read("proc/sys/kernel/osrelease")
        files = ["proc/config.gz"]
        if release:
            files += [f"boot/config-{release}", f"lib/modules/{release}/config"]
        for name in files:
            config = _read_or_none(self.path(name), _CONFIG_LIMIT)
            if config is not None and name.endswith(".gz"):
                config = _gunzip_or_none(config, _CONFIG_LIMIT)
            if config is not None and b"CONFIG_" in config:
                # An option whose own conditions are not met is not listed at all.
                return b"\nCONFIG_PCI_P2PDMA=y\n" in config

        # Last, because the kernel takes tens of milliseconds to write its symbols out.
        symbols = _read_or_none(self.path("proc/kallsyms"), _SYMBOLS_LIMIT)
        if symbols is not None and b" pci_p2pdma_add_resource\n" in symbols:
            return True
        # Absent from a list that is empty (hidden) or was cut short says nothing.
        return False if symbols and len(symbols) < _SYMBOLS_LIMIT else None

    def huge_page_size(self) -> int:
        """Bytes of the default huge page (/proc/meminfo), 2 MiB where that doesn't say."""
        for line in (self.read("proc/meminfo") or "").splitlines():
            if line.startswith("Hugepagesize:"):
                return int(line.split()[1]) << 10
        return 2 << 20

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

    def _sibling(self, parent: Device, pattern: re.Pattern[str], instance: str) -> str | None:
        for name in self.entries(parent.directory):
            match = pattern.fullmatch(name)
            if match and match[1] == instance:
                return name
        return None

    def _device_number(self, *directory: str) -> int | None:
        major, _, minor = (self.read(*directory, "dev") or "").partition(":")
        return os.makedev(int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def _read_or_none(path: str, limit: int) -> bytes | None:
    try:
        return read_bounded(path, limit)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None


def _gunzip_or_none(packed: bytes, limit: int) -> bytes | None:
    import zlib

    try:
        # 16: a gzip header is expected, as kernel/configs.c writes one.
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(packed, limit)
    except zlib.error:
        return None
