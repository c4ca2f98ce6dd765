"""One path: its file system, the drives below it, and whether O_DIRECT reads it."""

from __future__ import annotations

import errno
import functools
import operator
import os
from dataclasses import dataclass
from typing import Any

from gdsdirect.check import Check, Evidence, Status
from gdsdirect.checks.nvme import Drive, drive_at, refusal
from gdsdirect.fiemap import WHOLE, flag_names, map_extents
from gdsdirect.host import NOT_RECORDED, Host, Stat, numbers, opened
from gdsdirect.sysfs import Device, Mount

_DEEPEST = 8  # devices or file systems on top of each other that are followed

_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})

# Without a device of their own below.
_NO_DEVICE = (
    _IN_MEMORY
    | {"proc", "sysfs"}
    | {"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "fuse", "ceph", "lustre"}
)

_MOST_EXTENTS = 256  # that are counted


@dataclass(frozen=True, slots=True)
class PathFacts:
    """A path, what it is in a few words, its facts, and the namespaces that its bytes are on.

    `namespace` is set where the path is a namespace itself. `drives` are those below, and empty
    where they can't be told.
    """

    path: str
    what: str
    kind: str
    size: int
    checks: tuple[Check, ...]
    namespace: Drive | None = None
    drives: tuple[Drive, ...] = ()

    def named(self, *names: str) -> list[Check]:
        """The checks with these names."""
        return [check for check in self.checks if check.name in names]


def describe(host: Host, path: str) -> PathFacts:
    """All about a path."""
    info = host.stat(path)
    if info.errno is None:
        missing = Check("path.open", Status.MISSING, NOT_RECORDED, subject=path)
        return PathFacts(path, NOT_RECORDED, "", 0, (missing,))
    if info.errno:
        return _nothing(path, info.errno)
    if info.kind in ("block", "char"):
        return _device(host, path, info)
    if info.kind == "other":
        why = "it is a FIFO or a socket: give a file, a block device or an NVMe namespace"
        missing = Check("path.open", Status.MISSING, why, subject=path)
        return PathFacts(path, "neither a file nor a device", info.kind, 0, (missing,))
    return _file(host, path, info)


def _nothing(path: str, number: int) -> PathFacts:
    text = os.strerror(number)
    seen = (Evidence(f"stat({path})", text),)
    closed = number in (errno.EACCES, errno.EPERM)
    remedy = "give the folders on the way x for this user" if closed else None
    check = Check("path.open", Status.MISSING, f"it can't be found: {text}", seen, remedy, path)
    return PathFacts(path, text, "", 0, (check,))


# ---- Devices


def _device(host: Host, path: str, info: Stat) -> PathFacts:
    device = host.sysfs.device_at("sys/dev", info.kind, info.rdev)
    namespace = drive_at(host, device) if device else None
    if info.kind == "char":
        return _generic(path, device, namespace)
    drives, chain = _below(host, device, _DEEPEST) if device else ((), path)
    what = _namespace_text(namespace) if namespace else f"block device {chain}"
    checks = [_open(host, path), _direct(host, path), _drives_below(path, chain, drives)]
    if namespace is None:
        checks.append(_no_namespace(path, drives))
    return PathFacts(path, what, "block", 0, tuple(checks), namespace, drives)


def _generic(path: str, device: Device | None, namespace: Drive | None) -> PathFacts:
    if namespace is None:
        # Not opened: that can do things, such as start a watchdog.
        name = device.name if device else "unknown"
        why = f"it is the character device {name}: give an NVMe namespace, /dev/ngXnY"
        check = Check("path.open", Status.MISSING, why, subject=path)
        return PathFacts(path, f"character device {name}", "char", 0, (check,))
    why = "a generic character device takes commands, and can't be read as a file"
    remedy = f"give {namespace.disk}" if namespace.disk else None
    check = Check("path.direct", Status.MISSING, why, (), remedy, path)
    drives = (namespace,)
    return PathFacts(path, _namespace_text(namespace), "char", 0, (check,), namespace, drives)


def _namespace_text(drive: Drive) -> str:
    where = f"at {drive.pci_address}" if drive.pci_address else f"over {drive.transport or '?'}"
    return f"NVMe namespace, {drive.model or 'unknown model'}, {where}"


def _no_namespace(path: str, drives: tuple[Drive, ...]) -> Check:
    why = "passthrough reads whole namespaces by their blocks, past partitions and file systems"
    remedy = f"give {drives[0].generic}, for its raw blocks" if len(drives) == 1 else None
    return Check("path.namespace", Status.MISSING, why, (), remedy, path)


def _below(host: Host, device: Device, depth: int) -> tuple[tuple[Drive, ...], str]:
    """The namespaces below a block device, and the way there: "dm-0 on nvme0n1p2"."""
    drive = drive_at(host, device)
    if drive is not None:
        return (drive,), device.name
    sysfs = host.sysfs
    if depth and sysfs.read(device.directory, "partition") is not None:
        parent = sysfs.device_at(device.parent)
        if parent is not None:
            drives, _ = _below(host, parent, depth - 1)
            return drives, device.name
    slaves = sysfs.entries(device.directory, "slaves") if depth else ()
    found: list[Drive] = []
    names: list[str] = []
    for name in slaves:
        slave = sysfs.device_at(device.directory, "slaves", name)
        drives, chain = _below(host, slave, depth - 1) if slave else ((), name)
        found += drives
        names.append(chain)
        if not drives:  # one that is no NVMe drive, and so not all of the bytes are on NVMe
            return (), f"{device.name} on {chain}"
    backing = sysfs.read(device.directory, "loop/backing_file") if depth else None
    if backing:
        return (), f"{device.name}, a loop device on {backing}"
    return tuple(dict.fromkeys(found)), (
        f"{device.name} on {' + '.join(names)}" if names else device.name
    )


def _drives_below(path: str, chain: str, drives: tuple[Drive, ...]) -> Check:
    name = "path.drives"
    seen = (Evidence("/sys/dev/block, slaves", chain),)
    if drives:
        stacked = " on " in chain
        why = "its bytes are on " + ", ".join(drive.path for drive in drives)
        if stacked:
            why += ", through a device mapper or RAID, which may not pass peer memory on"
        return Check(name, Status.WARN if stacked else Status.OK, why, seen, None, path)
    why = f"its bytes are not, or not all, on NVMe drives of this host ({chain})"
    return Check(name, Status.MISSING, why, seen, "use a path on an NVMe drive", path)


# ---- Files


def _file(host: Host, path: str, info: Stat) -> PathFacts:
    real = info.real or path
    mount = find_mount(host, real)
    drives, chain = _devices_of(host, real, info, mount, _DEEPEST)
    kind = mount.kind if mount else "an unknown file system"
    what = f"{kind} on {chain}" if chain else kind
    checks = [_file_system(path, mount), _drives_below(path, chain or kind, drives)]
    if info.kind == "folder":
        why = "a folder: whether its files can be read past the page cache is known of a file"
        checks.append(Check("path.direct", Status.WARN, why, (), "give one of its files", path))
    else:
        checks += [_open(host, path), _direct(host, path, mount), _extents(host, path)]
    checks += [_cufile(path, mount), _no_namespace(path, drives)]
    return PathFacts(path, what, info.kind, info.size, tuple(checks), None, drives)


def find_mount(host: Host, path: str) -> Mount | None:
    """The mount that a path without links is on: the last one of those nearest to it."""
    found = None
    for mount in host.sysfs.mounts():
        if mount.holds(path) and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def _file_system(path: str, mount: Mount | None) -> Check:
    name = "path.file_system"
    if mount is None:
        why = "the file system is not told"
        return Check(
            name, Status.WARN, why, (Evidence("/proc/self/mountinfo", "no mount"),), None, path
        )
    seen = (Evidence("/proc/self/mountinfo", mount.line),)
    return Check(name, Status.OK, f"{mount.kind}, mounted at {mount.point}", seen, None, path)


def _cufile(path: str, mount: Mount | None) -> Check:
    name = "path.cufile"
    kind = mount.kind if mount else "not told"
    seen = (Evidence("/proc/self/mountinfo", kind),)
    if kind in ("ext4", "xfs"):
        return Check(name, Status.OK, f"cuFile reads {kind} directly", seen, None, path)
    why = f"of file systems on local drives cuFile reads ext4 and XFS directly, not {kind}"
    return Check(name, Status.MISSING, why, seen, "use ext4 or XFS", path)


def _devices_of(
    host: Host, real: str, info: Stat, mount: Mount | None, depth: int
) -> tuple[tuple[Drive, ...], str]:
    """The namespaces below a file, and the way there."""
    device = host.sysfs.device_at("sys/dev/block", info.dev) if info.dev else None
    if device is not None:
        return _below(host, device, depth)
    if mount is None or depth == 0:
        return (), ""
    if mount.kind == "overlay":
        return _overlay(host, real, mount, depth)
    if mount.kind.partition(".")[0] in _NO_DEVICE:
        return (), ""
    # Of btrfs and the like, stat tells no device; the mount's source does.
    source = host.stat(mount.source) if mount.source.startswith("/dev/") else Stat()
    device = host.sysfs.device_at("sys/dev/block", source.rdev) if source.kind == "block" else None
    return _below(host, device, depth) if device else ((), mount.source)


def _overlay(host: Host, real: str, mount: Mount, depth: int) -> tuple[tuple[Drive, ...], str]:
    """Which layer of an overlay file system has the file, and what is below it."""
    rest = os.path.relpath(real, mount.point)
    layers = [mount.option("upperdir"), *mount.option("lowerdir").split(":")]
    for layer in filter(None, layers):
        path = os.path.normpath(os.path.join(layer, rest))
        info = host.stat(path)
        if info.errno == 0 and info.dev:
            drives, chain = _devices_of(host, path, info, find_mount(host, path), depth - 1)
            return drives, f"the layer {layer}" + (f" on {chain}" if chain else "")
    return (), "a layer that can't be seen from here"


def _open(host: Host, path: str) -> Check:
    name = "path.open"
    number = host.open_error(path)
    if number is None:
        return Check(name, Status.NOT_APPLICABLE, NOT_RECORDED, subject=path)
    text = os.strerror(number) if number else "ok"
    seen: tuple[Evidence, ...] = (Evidence(f"open({path}, O_RDONLY)", text),)
    if number == 0:
        return Check(name, Status.OK, "this user may read it", seen, None, path)
    if number in (errno.EACCES, errno.EPERM):
        mode, why, remedy = refusal(host, path, number, "r")
        return Check(name, Status.MISSING, why, (*seen, mode), remedy, path)
    return Check(name, Status.MISSING, f"it can't be opened: {text}", seen, None, path)


def _direct(host: Host, path: str, mount: Mount | None = None) -> Check:
    name = "path.direct"
    number = host.open_error(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    if number is None:
        return Check(name, Status.NOT_APPLICABLE, NOT_RECORDED, subject=path)
    text = os.strerror(number) if number else "ok"
    seen: tuple[Evidence, ...] = (Evidence(f"open({path}, O_RDONLY | O_DIRECT)", text),)
    if number:
        why = "its file system takes no O_DIRECT, so every read goes through the page cache"
        remedy = "use a file system that does, such as ext4 or XFS"
        if number in (errno.EACCES, errno.EPERM):
            why = "this user may not read it at all"
            return Check(name, Status.NOT_APPLICABLE, why, seen, None, path)
        return Check(name, Status.MISSING, why, seen, remedy, path)
    if mount is not None and mount.kind in _IN_MEMORY:
        why = f"{mount.kind} accepts O_DIRECT, and its files are in memory all the same"
        return Check(name, Status.MISSING, why, seen, "use a file system on an NVMe drive", path)
    alignment = host.direct_alignment(path)
    if alignment is None:
        why = "O_DIRECT is accepted; the kernel doesn't tell what it must be aligned to"
        return Check(name, Status.OK, why, seen, None, path)
    memory, offset = alignment
    seen += (Evidence(f"statx({path}, STATX_DIOALIGN)", f"memory {memory}, offset {offset}"),)
    if offset == 0:
        why = "the file is opened with O_DIRECT, and its file system says it takes none"
        return Check(name, Status.WARN, why, seen, None, path)
    why = f"O_DIRECT wants memory at multiples of {memory} bytes, offset and size of {offset}"
    return Check(name, Status.OK, why, seen, None, path)


def _extents(host: Host, path: str) -> Check:
    name = "path.extents"
    answer: Any = host.ask(f"extents {path}", lambda: read_extents(path))
    found = numbers(answer)
    count, flags = found.get("count"), answer.get("flags") if isinstance(answer, dict) else None
    if count is None or not isinstance(flags, list):
        text = os.strerror(found["errno"]) if "errno" in found else "not recorded"
        seen = (Evidence(f"FS_IOC_FIEMAP of {path}", text),)
        return Check(name, Status.NOT_APPLICABLE, "its extents are not told", seen, None, path)
    words = ", ".join(map(str, flags))
    more = " or more" if count == _MOST_EXTENTS else ""
    why = (
        f"{count}{more} extent" + ("" if count == 1 else "s") + (f", some {words}" if words else "")
    )
    seen = (Evidence(f"FS_IOC_FIEMAP of {path}", why),)
    return Check(name, Status.OK, why, seen, None, path)


def read_extents(path: str) -> dict[str, Any]:
    """How many extents a file has (at most 256 are counted), and which flags any of them has."""
    with opened(path) as fd:
        found = map_extents(fd, 0, WHOLE, most=_MOST_EXTENTS)
    flags = functools.reduce(operator.or_, (extent.flags for extent in found), 0)
    return {"count": len(found), "flags": flag_names(flags)}
