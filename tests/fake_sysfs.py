"""A sysfs tree of files, for the devices that a test machine does not have.

Laid out as Linux 6.12 lays out /sys for NVMe drives (drivers/nvme/host/core.c and multipath.c); the
real thing is tested in the virtual machine, in tests/lab.
"""

from __future__ import annotations

import os
from pathlib import Path

from gdsdirect.sysfs import Sysfs


class FakeSysfs:
    """Builds the tree below `root`; `sysfs` reads it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sysfs = Sysfs(str(root))

    def write(self, path: str, text: str | bytes) -> None:
        """A file of the tree, `path` relative to its root."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    def link(self, path: str, target: str) -> None:
        """A link of the tree to another place in it; relative, as sysfs makes them."""
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(self.root / target, place.parent))

    def device(
        self, directory: str, subsystem: str, number: str | None = None, **attributes: str
    ) -> str:
        """A device with its attributes ("__" stands for "/"), and its entry in /sys/dev."""
        (self.root / directory).mkdir(parents=True, exist_ok=True)
        self.link(f"{directory}/subsystem", f"sys/class/{subsystem}")
        if number is not None:
            self.write(f"{directory}/dev", f"{number}\n")
            kind = "block" if subsystem == "block" else "char"
            self.link(f"sys/dev/{kind}/{number}", directory)
        for name, text in attributes.items():
            self.write(f"{directory}/{name.replace('__', '/')}", f"{text}\n")
        return directory

    def controller(self, index: int, address: str) -> str:
        """A PCIe drive's controller, with the node 242:`index`."""
        return self.device(
            f"sys/devices/pci0000:00/{address}/nvme/nvme{index}",
            "nvme",
            f"242:{index}",
            address=address,
            model="QEMU NVMe Ctrl                          ",
            serial="data                ",
            transport="pcie",
        )

    def namespace(
        self,
        parent: str,
        disk: str,
        generic: str | None,
        minor: int,
        *,
        generic_number: str | None = None,
        **attributes: str,
    ) -> str:
        """A namespace of `parent`: the disk 259:`minor`, and its generic device 241:`minor`."""
        shown = {
            "size": "131072",
            "queue__logical_block_size": "512",
            "queue__max_hw_sectors_kb": "512",
            "metadata_bytes": "0",
        }
        directory = self.device(
            f"{parent}/{disk}", "block", f"259:{minor}", **{**shown, **attributes}
        )
        if generic is not None:
            self.device(f"{parent}/{generic}", "nvme-generic", generic_number or f"241:{minor}")
        return directory
