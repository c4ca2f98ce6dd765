"""Hosts that a test machine is not: trees of files as `gdsdirect check --record` writes them.

Each is written from the descriptions in the kernel's and NVIDIA's documents and from public reports
of such machines, not recorded on one.
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fake_sysfs import FakeSysfs

from gdsdirect.host import Stat

FILE = "/data/model.safetensors"
DRIVE, GPU = "0000:19:00.0", "0000:1a:00.0"
_SWITCH = "0000:15:01.0/0000:16:00.0"
_IO_URING = ("setup", "enter", "registers", "big_entries", "passthrough")
_OPTIONS = ("passthrough_fixed", "single_thread", "sqpoll", "iopoll")
_OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  "
    "(dvs-builder@U22-I3-B11)  Thu Jan 23 22:50:36 UTC 2025\n"
)
_CLOSED_DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
)
_MOUNT = "30 1 259:1 / /data rw,relatime shared:1 - ext4 /dev/nvme0n1p1 rw,data=ordered\n"
_CUFILE = '// NVIDIA\'s own file has comments\n{"properties": {"use_pci_p2pdma": %s}}\n'


class FakeHost(FakeSysfs):
    """A recording that is made up."""

    def __init__(self, root: Path, kernel: str, p2pdma: bool) -> None:
        super().__init__(root)
        self.answers: dict[str, Any] = {"io_uring": dict.fromkeys((*_IO_URING, *_OPTIONS), 0)}
        self.write("proc/sys/kernel/osrelease", f"{kernel}\n")
        option = "CONFIG_PCI_P2PDMA=y" if p2pdma else "# CONFIG_PCI_P2PDMA is not set"
        self.write(f"boot/config-{kernel}", f"#\nCONFIG_PCI=y\n{option}\n")
        self.write("proc/self/limits", "Max locked memory  unlimited  unlimited  bytes\n")
        self.write("proc/self/status", "Uid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\nSeccomp:\t0\n")
        self.write("proc/cpuinfo", "vendor_id\t: GenuineIntel\ncpu family\t: 6\n")

    def pci(self, place: str, **attributes: str) -> str:
        """A PCI device at this place below the first host bridge; returns its folder."""
        directory = f"sys/devices/pci0000:15/{place}"
        for name, text in attributes.items():
            self.write(f"{directory}/{name.replace('__', '/')}", f"{text}\n")
        self.link(f"sys/bus/pci/devices/{place.rpartition('/')[2]}", directory)
        return directory

    def drive(self, place: str) -> None:
        """A drive with a file system on its only partition, mounted at /data."""
        address = place.rpartition("/")[2]
        parent = self.pci(place, **{"class": "0x010802"}, vendor="0x144d", numa_node="0")
        controller = self.device(
            f"{parent}/nvme/nvme0",
            "nvme",
            "242:0",
            address=address,
            model="SAMSUNG MZQL23T8HCLS-00A07",
            transport="pcie",
        )
        disk = self.namespace(controller, "nvme0n1", "ng0n1", 0)
        self.device(f"{disk}/nvme0n1p1", "block", "259:1", partition="1")
        self.link("sys/class/nvme/nvme0", controller)
        self.link("sys/class/block/nvme0n1", disk)
        self.link("sys/class/nvme-generic/ng0n1", f"{controller}/ng0n1")
        self.write("sys/module/nvme_core/parameters/multipath", "N\n")
        self.write("proc/self/mountinfo", _MOUNT)
        for path in ("/dev/ng0n1", "/dev/nvme0n1", FILE):
            self.answers[f"open {path} r"] = {"errno": 0}
            self.answers[f"open {path} r O_DIRECT"] = {"errno": 0}
        for path, stat in (
            (FILE, Stat(0, "file", 1 << 30, "259:1", "0:0", 0o644, 0, 0, FILE)),
            ("/dev/nvme0n1", Stat(0, "block", 0, "0:5", "259:0", 0o660, 0, 6, "/dev/nvme0n1")),
            ("/dev/ng0n1", Stat(0, "char", 0, "0:5", "241:0", 0o600, 0, 0, "/dev/ng0n1")),
        ):
            self.answers[f"stat {path}"] = asdict(stat)
        for way in ("file_direct", "file_fixed", "buffered"):
            answer = {"ok": True, "nbytes": 16384, "compared_with": f"pread of {FILE}"}
            self.answers[f"read {FILE} {way} host memory"] = answer

    def gpu(self, place: str, pages: bool) -> None:
        """An H100, whose BAR1 has P2PDMA pages or not."""
        bar1 = "0x0000220000000000 0x0000221fffffffff 0x000000000014220c"
        parent = self.pci(
            place,
            **{"class": "0x030200"},
            vendor="0x10de",
            device="0x2330",
            resource=f"0x0 0x0 0x0\n{bar1}",
        )
        if pages:
            for name, text in (("size", "85899345920"), ("available", "0"), ("published", "0")):
                self.write(f"{parent}/p2pmem/{name}", f"{text}\n")

    def nvidia(self, version: str, registry: str) -> None:
        self.write("proc/driver/nvidia/version", version)
        self.write("proc/driver/nvidia/params", f'EnableMSI: 1\nRegistryDwords: "{registry}"\n')

    def cufile(self, p2pdma: bool, udev: bool) -> None:
        folder = "usr/local/cuda-12.8/targets/x86_64-linux/lib"
        self.write(f"{folder}/libcufile.so.1.13.1", "")
        self.link(f"{folder}/libcufile.so.0", f"{folder}/libcufile.so.1.13.1")
        (self.root / "usr/local/cuda").symlink_to("/usr/local/cuda-12.8")  # absolute, as it is
        self.write("etc/cufile.json", _CUFILE % str(p2pdma).lower())
        if udev:
            self.write("run/udev/control", "")

    def done(self) -> Path:
        self.write("answers.json", json.dumps(self.answers))
        return self.root


def h100_in_p2pdma_mode(root: Path, *, container: bool = False) -> Path:
    """Drive and GPU below one switch, the open driver with both settings; cuFile set up.

    As a container: without /run/udev, and without the drive's nodes.
    """
    host = FakeHost(root, "6.8.0-60-generic", p2pdma=True)
    host.drive(f"{_SWITCH}/0000:17:00.0/{DRIVE}")
    host.gpu(f"{_SWITCH}/0000:17:01.0/{GPU}", pages=True)
    host.nvidia(_OPEN_DRIVER, "RMForceStaticBar1=1;RmForceDisableIomapWC=1;ForceP2P=0")
    host.cufile(p2pdma=True, udev=not container)
    if container:
        host.write(".dockerenv", "")
        for path in ("/dev/ng0n1", "/dev/nvme0n1"):
            host.answers[f"open {path} r"] = {"errno": errno.ENOENT}
            host.answers[f"open {path} r O_DIRECT"] = {"errno": errno.ENOENT}
            host.answers[f"stat {path}"] = {"errno": errno.ENOENT}
    return host.done()


def nvidia_fs_without_nvme(root: Path) -> Path:
    """nvidia-fs is loaded, and the NVMe driver is not one that registers with it."""
    host = FakeHost(root, "5.15.0-113-generic", p2pdma=False)
    host.drive(f"0000:15:01.0/{DRIVE}")
    host.gpu(f"0000:15:02.0/{GPU}", pages=False)
    host.nvidia(_CLOSED_DRIVER, "")
    host.cufile(p2pdma=False, udev=True)
    stats = Path(__file__).parent / "samples/nvidia-fs-stats-2.25.7.txt"
    host.write("proc/driver/nvidia-fs/version", "version: 2.25\n")
    host.write("proc/driver/nvidia-fs/stats", stats.read_bytes())
    host.write("proc/driver/nvidia-fs/modules", "wekafsio: 1\n")
    host.write("sys/module/nvidia_fs/version", "2.25.7\n")
    return host.done()


def laptop(root: Path) -> Path:
    """One drive, the processor's own graphics, a distribution's kernel."""
    host = FakeHost(root, "6.12.43+deb13-amd64", p2pdma=False)
    host.drive(f"0000:15:1d.0/{DRIVE}")
    host.pci("0000:15:02.0", **{"class": "0x030000"}, vendor="0x8086", device="0x46a6")
    host.write("proc/self/status", "Gid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\n")
    for path in ("/dev/ng0n1", "/dev/nvme0n1"):
        host.answers[f"open {path} r"] = {"errno": errno.EACCES}
        host.answers[f"open {path} r O_DIRECT"] = {"errno": errno.EACCES}
    return host.done()
