"""Where this runs: in a container, WSL, a virtual machine."""

from __future__ import annotations

import re

from gdsdirect.check import Check, Evidence, Status
from gdsdirect.host import Host

# Files that container engines put into a container: Docker, Podman, systemd-nspawn and LXC.
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")


def checks(host: Host) -> list[Check]:
    """All about the environment."""
    return [_container(host), _wsl(host), _virtual_machine(host)]


def in_container(host: Host) -> bool:
    """Whether this is a container."""
    return bool(_marks(host))


def _marks(host: Host) -> list[str]:
    return [mark for mark in _CONTAINER_MARKS if host.sysfs.exists(mark)]


def _container(host: Host) -> Check:
    name = "environment.container"
    marks = _marks(host)
    if not marks:
        seen = Evidence(" ".join(_CONTAINER_MARKS), "none is there")
        return Check(name, Status.NOT_APPLICABLE, "no mark of a container", (seen,))
    why = "a container: it has the devices, files and system calls that it was given"
    return Check(name, Status.WARN, why, (Evidence(marks[0], "is there"),))


def _wsl(host: Host) -> Check:
    name = "environment.wsl"
    seen = host.look("proc/sys/kernel/osrelease")
    if "microsoft" not in seen.text.lower():
        return Check(name, Status.NOT_APPLICABLE, "not WSL", (seen,))
    why = "WSL: its drives are virtual disks of Windows, so no NVMe drive can be read past it"
    return Check(name, Status.WARN, why, (seen,), "run on Linux itself")


def _virtual_machine(host: Host) -> Check:
    name = "environment.virtual_machine"
    cpuinfo = host.sysfs.read("proc/cpuinfo") or ""
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE)
    vendor, product = (
        host.look("sys/class/dmi/id", what) for what in ("sys_vendor", "product_name")
    )
    if flags is None:
        return Check(name, Status.NOT_APPLICABLE, "no sign of one", (vendor, product))
    why = (
        "a virtual machine: peer memory needs the drive and the GPU passed through to it below one "
        "switch"
    )
    seen = (Evidence("/proc/cpuinfo", "flags: … hypervisor …"), vendor, product)
    return Check(name, Status.WARN, why, seen)
