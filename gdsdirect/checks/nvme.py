"""NVMe: every namespace, whether this user may read it, and where its drive sits."""

from __future__ import annotations

import errno
import os
import re
import shlex
from dataclasses import dataclass

from gdsdirect.check import Check, Evidence, Status
from gdsdirect.checks.kernel import is_admin, status_line, version
from gdsdirect.host import NOT_RECORDED, UNREADABLE, Host
from gdsdirect.namespace import UDEV_RULE
from gdsdirect.sysfs import Device, NvmeNamespaceNodes

MULTIPATH_OFF = "echo 'options nvme_core multipath=N' > /etc/modprobe.d/nvme_core.conf, then reboot"
"""The remedy where NVMe multipath is in the way."""

_NO_CAPABILITY_NEEDED = (6, 2)  # Linux version from which the node's mode decides over passthrough


@dataclass(frozen=True, slots=True)
class Drive:
    """An NVMe namespace and its drive.

    `generic` and `disk` are its two nodes ("/dev/ng0n1", "/dev/nvme0n1"), `directory` the disk's
    in sysfs; None where there is none. `pci_address` is None over fabrics.
    """

    generic: str | None
    disk: str | None
    directory: str | None
    controllers: tuple[str, ...]
    model: str | None
    transport: str | None
    pci_address: str | None

    @property
    def path(self) -> str:
        """The node that a user gives."""
        return self.disk or self.generic or "?"


def find_drives(host: Host) -> tuple[Drive, ...]:
    """Every namespace of this host."""
    sysfs = host.sysfs
    found: dict[str, Drive] = {}
    for place in ("sys/class/nvme-generic", "sys/class/block"):
        for name in sysfs.entries(place):
            device = sysfs.device_at(place, name)
            nodes = sysfs.nvme_namespace(device) if device else None
            if nodes is not None:
                drive = drive_of(host, nodes)
                found.setdefault(drive.path, drive)
    return tuple(found.values())


def drive_of(host: Host, nodes: NvmeNamespaceNodes) -> Drive:
    """The namespace with these nodes."""
    sysfs = host.sysfs
    controller = nodes.controllers[0] if nodes.controllers else None
    transport = sysfs.read(controller, "transport") if controller else None
    address = sysfs.read(controller, "address") if controller and transport == "pcie" else None
    return Drive(
        generic=f"/dev/{nodes.generic}" if nodes.generic else None,
        disk=f"/dev/{os.path.basename(nodes.disk)}" if nodes.disk else None,
        directory=nodes.disk,
        controllers=nodes.controllers,
        model=sysfs.read(controller, "model") if controller else None,
        transport=transport,
        pci_address=address,
    )


def drive_at(host: Host, device: Device) -> Drive | None:
    """The namespace that a device is, or None."""
    nodes = host.sysfs.nvme_namespace(device)
    return drive_of(host, nodes) if nodes else None


def checks(host: Host, drives: tuple[Drive, ...]) -> list[Check]:
    """All about the drives."""
    found = [_drives(host, drives)]
    for drive in drives:
        found += [
            node(host, drive),
            block_format(host, drive),
            transport(drive),
            _transfer(host, drive),
            _place(host, drive),
            _poll_queues(host, drive),
        ]
    return [*found, _multipath(host, drives)]


def _drives(host: Host, drives: tuple[Drive, ...]) -> Check:
    name = "nvme.namespaces"
    controllers = " ".join(host.sysfs.entries("sys/class/nvme"))
    seen = (Evidence("/sys/class/nvme", controllers or "no controller"),)
    if drives:
        paths = ", ".join(drive.path for drive in drives)
        return Check(name, Status.OK, f"this host has {paths}", seen)
    if controllers:
        why = "there are controllers, and no namespace of theirs that this process can see"
        return Check(name, Status.MISSING, why, seen, "nvme list")
    return Check(name, Status.MISSING, "this host, as seen from here, has no NVMe drive", seen)


# ---- One namespace


def node(host: Host, drive: Drive) -> Check:
    """Whether this user may send commands to the namespace."""
    name, path = "nvme.node", drive.generic
    if path is None:
        why = "the kernel made no generic character device: NVMe passthrough needs Linux 5.19"
        return Check(name, Status.MISSING, why, (), "boot Linux 5.19 or later", drive.path)
    number = host.open_error(path)
    if number is None:
        return Check(name, Status.NOT_APPLICABLE, NOT_RECORDED, subject=path)
    text = os.strerror(number) if number else "ok"
    seen: tuple[Evidence, ...] = (Evidence(f"open({path}, O_RDONLY)", text),)
    if number in (errno.EACCES, errno.EPERM):
        mode, why, remedy = refusal(host, path, number, "r")
        why += f"; what mends it lasts until the next boot, and longer by a udev rule: {UDEV_RULE}"
        return Check(name, Status.MISSING, why, (*seen, mode), remedy, path)
    if number == errno.ENOENT:
        why = f"the kernel has the namespace, but there is no {path} here: pass it in"
        return Check(name, Status.MISSING, why, seen, f"docker run --device {path}", path)
    if number:
        return Check(name, Status.MISSING, f"{path} can't be opened: {text}", seen, None, path)
    kernel = version(host)
    if kernel is not None and kernel < _NO_CAPABILITY_NEEDED and is_admin(host) is False:
        seen += (host.look("proc/sys/kernel/osrelease"),)
        seen += (Evidence("/proc/self/status", status_line(host, "CapEff")),)
        why = "before Linux 6.2 passthrough needs CAP_SYS_ADMIN, whatever the node's mode"
        remedy = "run it as root, or boot Linux 6.2 or later"
        return Check(name, Status.MISSING, why, seen, remedy, path)
    return Check(name, Status.OK, f"this user may read {path}", seen, None, path)


def refusal(host: Host, path: str, number: int, right: str) -> tuple[Evidence, str, str]:
    """Why a file can't be opened for `right` ("r" or "rw"): its mode, the cause and the remedy."""
    info = host.stat(path)
    mode = Evidence(f"stat({path})", f"mode {info.mode:04o}, uid {info.uid}, gid {info.gid}")
    quoted = shlex.quote(path)
    if number == errno.EPERM:  # where the mode refuses, it is EACCES
        why = "a container's rules for devices, or a security module, refuse it"
        return mode, why, f"docker run --device {quoted}"
    # This user's own group, and nobody else, gets the right.
    group = re.fullmatch(r"Gid:\s+\d+\s+(\d+)\s.*", status_line(host, "Gid"), re.ASCII)
    remedy = f"chgrp {group[1] if group else '$(id -g)'} {quoted} && chmod g+{right} {quoted}"
    return mode, f"this user may not {'map' if 'w' in right else 'read'} it", remedy


def block_format(host: Host, drive: Drive) -> Check:
    """Block size and metadata, as the kernel shows them."""
    name, subject = "nvme.format", drive.path
    if drive.directory is None:
        why = "the namespace has no block device: the drive is asked when it is read"
        return Check(name, Status.NOT_APPLICABLE, why, subject=subject)
    size = host.look(drive.directory, "queue/logical_block_size")
    sectors = host.look(drive.directory, "size")
    metadata = host.look(drive.directory, "metadata_bytes")
    seen = (size, sectors, metadata)
    if metadata.number:
        why = f"its blocks carry {metadata.text} bytes of metadata, which gdsdirect doesn't read"
        remedy = "read it as a file, or format it without metadata, which erases it"
        return Check(name, Status.MISSING, why, seen, remedy, subject)
    if size.number is None or sectors.number is None:
        return Check(
            name, Status.WARN, "the kernel doesn't tell its block size", seen, None, subject
        )
    if sectors.number == 0:
        why = "the kernel shows no blocks: a format that it doesn't read, such as with metadata"
        return Check(name, Status.WARN, why, seen, None, subject)
    why = f"blocks of {size.number} bytes, {sectors.number * 512} bytes in all"
    return Check(name, Status.OK, why, seen, None, subject)


def transport(drive: Drive) -> Check:
    """Whether the drive is on PCIe, where it can write into other devices' memory."""
    name, subject = "nvme.transport", drive.path
    seen = (
        Evidence(f"{(drive.controllers or ('?',))[0]}/transport", drive.transport or "not told"),
    )
    if drive.transport == "pcie":
        return Check(name, Status.OK, f"on PCIe, at {drive.pci_address}", seen, None, subject)
    if drive.transport is None:
        return Check(
            name, Status.WARN, "the kernel doesn't tell its transport", seen, None, subject
        )
    why = (
        f"over fabrics ({drive.transport}): its bytes come by a network card, and no drive of this "
        "host writes them"
    )
    return Check(name, Status.MISSING, why, seen, "use a drive on PCIe", subject)


def _transfer(host: Host, drive: Drive) -> Check:
    name, subject = "nvme.max_transfer", drive.path
    if drive.directory is None:
        return Check(name, Status.NOT_APPLICABLE, "it has no block device", subject=subject)
    most = host.look(drive.directory, "queue/max_hw_sectors_kb")
    segments = host.look(drive.directory, "queue/max_segments")
    if most.number is None:
        return Check(name, Status.WARN, "not told: 128 KiB are assumed", (most,), None, subject)
    why = f"a command reads {most.number} KiB at most"
    if segments.number:
        why += f", and {(segments.number - 1) * 4} KiB into scattered pages"
    return Check(name, Status.OK, why, (most, segments), None, subject)


def _place(host: Host, drive: Drive) -> Check:
    name, subject = "nvme.link", drive.path
    if drive.pci_address is None:
        return Check(name, Status.NOT_APPLICABLE, "it is not on PCIe", subject=subject)
    return link(host, name, drive.pci_address, subject)


def link(host: Host, name: str, address: str, subject: str) -> Check:
    """A PCIe device's link, now and at most, and its NUMA node."""
    directory = f"sys/bus/pci/devices/{address}"
    speed, speed_most, width, width_most, numa = (
        host.look(directory, attribute)
        for attribute in (
            "current_link_speed",
            "max_link_speed",
            "current_link_width",
            "max_link_width",
            "numa_node",
        )
    )
    seen = (speed, speed_most, width, width_most, numa)
    now, most = (_gigatransfers(one.text) for one in (speed, speed_most))
    lanes, lanes_most = width.number or 0, width_most.number or 0
    where = "" if numa.text in ("-1", UNREADABLE) else f", NUMA node {numa.text}"
    if not now or not lanes:
        return Check(
            name, Status.NOT_APPLICABLE, f"its link is not told{where}", seen, None, subject
        )
    why = f"{now:g} GT/s, {lanes} lanes, of {most:g} GT/s, {lanes_most} lanes{where}"
    if now < most or lanes < lanes_most:
        why += ": slower than the device can (a slot, or power saving while idle)"
        return Check(name, Status.WARN, why, seen, None, subject)
    return Check(name, Status.OK, why, seen, None, subject)


def _gigatransfers(text: str) -> float:
    """16.0 of "16.0 GT/s PCIe"; 0 where it is not told."""
    match = re.match(r"(\d{1,4}(?:\.\d{1,3})?) GT/s", text)
    return float(match[1]) if match else 0.0


def _poll_queues(host: Host, drive: Drive) -> Check:
    name, subject = "nvme.poll_queues", drive.path
    if drive.transport != "pcie" or drive.directory is None:
        return Check(name, Status.NOT_APPLICABLE, "it is not on PCIe", subject=subject)
    seen = (
        host.look(drive.directory, "queue/io_poll"),
        host.look("sys/module/nvme/parameters/poll_queues"),
    )
    if seen[0].text == "1":
        return Check(name, Status.OK, "iopoll=True can be used", seen, None, subject)
    why = "there are no poll queues, so iopoll=True can't be used; nothing else needs them"
    remedy = "echo 'options nvme poll_queues=1' > /etc/modprobe.d/nvme.conf, then reboot"
    return Check(name, Status.NOT_APPLICABLE, why, seen, remedy, subject)


def _multipath(host: Host, drives: tuple[Drive, ...]) -> Check:
    name = "nvme.multipath"
    seen = host.look("sys/module/nvme_core/parameters/multipath")
    shared = [drive.path for drive in drives if len(drive.controllers) > 1]
    if shared:
        why = f"{', '.join(shared)} can be reached by several controllers"
        return Check(name, Status.WARN, why, (seen,))
    if seen.text == "Y":
        why = "on, without a second path: only cuFile's P2PDMA mode minds"
        return Check(name, Status.OK, why, (seen,), MULTIPATH_OFF)
    return Check(name, Status.OK, "off", (seen,))
