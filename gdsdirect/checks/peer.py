"""Peer memory: which devices lend theirs, and which drives can reach it."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

from gdsdirect.check import Check, Evidence, Status
from gdsdirect.checks.nvme import Drive, refusal
from gdsdirect.host import Host
from gdsdirect.sysfs import PciDevice

_DISPLAY = "0x03"  # the PCI class of GPUs
_ZEN = 0x17  # the family of AMD's first processors that pass peer traffic on

# Intel's host bridges that the kernel trusts to pass peer traffic on, by device id: the table
# pci_p2pdma_whitelist in drivers/pci/p2pdma.c. It grows: one that is not here may be trusted too.
_TRUSTED_INTEL = frozenset(
    {"0x3c00", "0x3c01", "0x2f00", "0x2f01", "0x2030", "0x2031", "0x2032", "0x2033"}
    | {"0x2020", "0x09a2"}
)


@dataclass(frozen=True, slots=True)
class Provider:
    """A device that lends memory; `is_gpu` if a driver of a GPU's owns it."""

    address: str
    size: int
    available: int
    is_gpu: bool

    @property
    def allocate(self) -> str:
        """The file that maps to its memory."""
        return f"/sys/bus/pci/devices/{self.address}/p2pmem/allocate"


def find_providers(host: Host) -> tuple[Provider, ...]:
    """Every device that lends memory, or did."""
    return tuple(
        Provider(found.address, found.size, found.available, is_gpu(host, found.address))
        for found in host.sysfs.peer_memory_providers()
    )


def is_gpu(host: Host, address: str) -> bool:
    """Whether a PCI device is a display or 3D controller."""
    code = host.sysfs.read("sys/bus/pci/devices", address, "class") or ""
    return code.startswith(_DISPLAY)


def checks(host: Host, drives: tuple[Drive, ...], providers: tuple[Provider, ...]) -> list[Check]:
    """All about peer memory."""
    found = [_providers(host, providers)]
    found += [memory(host, provider) for provider in providers]
    addresses = dict.fromkeys(drive.pci_address for drive in drives if drive.pci_address)
    found += [route(host, address, provider) for address in addresses for provider in providers]
    return [*found, _iommu(host)]


def _providers(host: Host, providers: tuple[Provider, ...]) -> Check:
    name = "peer.providers"
    seen = Evidence(
        "/sys/bus/pci/devices/*/p2pmem",
        " ".join(provider.address for provider in providers) or "none",
    )
    if any(provider.size for provider in providers):
        return Check(name, Status.OK, "there is memory to read into", (seen,))
    why = "no device lends memory" + (" any more: each has size 0" if providers else "")
    remedy = (
        "use a drive with a controller memory buffer of 2 MiB or more, or a GPU whose driver makes "
        "P2PDMA pages of its BAR1 (see nvidia.static_bar1)"
    )
    return Check(name, Status.MISSING, why, (seen,), remedy)


def memory(host: Host, provider: Provider) -> Check:
    """Whether a provider has memory to give, and this user may map it."""
    name, subject = "peer.memory", provider.address
    directory = f"sys/bus/pci/devices/{provider.address}/p2pmem"
    seen = tuple(host.look(directory, what) for what in ("size", "available", "published"))
    if provider.size == 0:
        why = "its driver let go of the memory and left the folder behind"
        return Check(name, Status.MISSING, why, seen, "reload the device's driver", subject)
    if provider.is_gpu:
        why = (
            "a GPU's memory, of which its driver decides: CUDA may hold what `allocate` would "
            "give. Map it through the driver (from_bar1_peer_address)"
        )
        return Check(name, Status.OK, why, seen, None, subject)
    if provider.available == 0:
        why = f"all of its {provider.size} bytes are taken"
        return Check(name, Status.MISSING, why, seen, "end the programs that hold it", subject)
    path = provider.allocate
    number = host.open_error(path, os.O_RDWR)
    if number:
        seen += (Evidence(f"open({path}, O_RDWR)", os.strerror(number)),)
        if number in (errno.EACCES, errno.EPERM):
            mode, why, remedy = refusal(host, path, number, "rw")
            return Check(name, Status.MISSING, why, (*seen, mode), remedy, subject)
        why = "it can't be mapped by programs: that needs Linux 6.2"
        return Check(name, Status.MISSING, why, seen, "boot Linux 6.2 or later", subject)
    why = f"{provider.available} of {provider.size} bytes are free"
    return Check(name, Status.OK, why, seen, None, subject)


# ---- From drive to provider


def route(host: Host, address: str, provider: Provider) -> Check:
    """Whether the drive's writes can reach the provider: what the kernel's p2pdma.c looks at."""
    name, subject = "peer.route", f"{address} to {provider.address}"
    if address == provider.address:
        return Check(name, Status.OK, "the drive's own memory", subject=subject)
    drive, other = (host.sysfs.pci_device(one) for one in (address, provider.address))
    if drive is None or other is None:
        why = "the kernel doesn't tell where they sit"
        return Check(name, Status.WARN, why, subject=subject)
    seen: tuple[Evidence, ...] = tuple(
        Evidence(
            f"/sys/bus/pci/devices/{one.address}",
            " / ".join((one.host_bridge, *one.bridges, one.address)),
        )
        for one in (drive, other)
    )
    shared = [bridge for bridge in drive.bridges if bridge in other.bridges]
    if shared:
        redirecting = _redirecting(host, drive, other, shared)
        if not redirecting:
            why = f"both sit below the switch at {shared[-1]}"
            return Check(name, Status.OK, why, seen, None, subject)
        trusted, evidence = _trusted(host, drive, other)
        seen += (Evidence(f"ACS control of {' '.join(redirecting)}", "redirects"), *evidence)
        why = (
            f"both sit below the switch at {shared[-1]}, but access control (ACS) sends their "
            "traffic up to the host bridge"
        )
        remedy = "boot with pci=disable_acs_redir=" + ";".join(redirecting)
    else:
        trusted, evidence = _trusted(host, drive, other)
        seen += evidence
        why = "they share no switch"
        remedy = "move one of the two below the other's PCIe switch, or read into host memory"
    if trusted:
        why += f", and the kernel trusts {trusted} to pass the traffic on, more slowly"
        return Check(name, Status.WARN, why, seen, None, subject)
    why += ", and the host bridge is none that the kernel is known to trust with peer traffic"
    return Check(name, Status.MISSING, why, seen, remedy, subject)


def _redirecting(host: Host, drive: PciDevice, other: PciDevice, shared: list[str]) -> list[str]:
    """The bridges between the two, below the one that they share, that redirect."""
    between = [bridge for bridge in (*drive.bridges, *other.bridges) if bridge not in shared]
    return [bridge for bridge in between if host.sysfs.redirects_peer_traffic(bridge)]


def _trusted(
    host: Host, drive: PciDevice, other: PciDevice
) -> tuple[str | None, tuple[Evidence, ...]]:
    """Who passes peer traffic on with the kernel's trust, and what tells that."""
    cpuinfo = host.sysfs.read("proc/cpuinfo") or ""
    vendor = _field(cpuinfo, "vendor_id")
    family = _field(cpuinfo, "cpu family")
    kind = Evidence("/proc/cpuinfo", f"vendor_id {vendor or '?'}, cpu family {family or '?'}")
    seen: tuple[Evidence, ...] = (kind,)
    if vendor == "AuthenticAMD" and (Evidence("", family).number or 0) >= _ZEN:
        return "this AMD processor", seen
    roots = []
    for device in (drive, other):
        root = f"{device.host_bridge.removeprefix('pci')}:00.0"
        maker = host.look("sys/bus/pci/devices", root, "vendor")
        model = host.look("sys/bus/pci/devices", root, "device")
        seen += (maker, model)
        roots.append(maker.text == "0x8086" and model.text in _TRUSTED_INTEL)
    return ("this Intel host bridge" if all(roots) else None), seen


def _field(cpuinfo: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(\S+)", cpuinfo, re.MULTILINE)
    return match[1] if match else ""


def _iommu(host: Host) -> Check:
    name = "peer.iommu"
    groups = host.sysfs.entries("sys/kernel/iommu_groups")
    seen: tuple[Evidence, ...] = (
        Evidence("/sys/kernel/iommu_groups", f"{len(groups)} groups" if groups else "empty"),
    )
    if not groups:
        return Check(name, Status.OK, "the IOMMU is off", seen)
    kinds = [host.look("sys/kernel/iommu_groups", group, "type") for group in groups]
    translating = [kind for kind in kinds if kind.text.startswith("DMA")]
    if not translating:
        return Check(name, Status.OK, "the IOMMU passes addresses through", (*seen, *kinds[:1]))
    why = (
        "the IOMMU translates addresses: transfers below one switch pass it by, others are slower "
        "or fail, and NVIDIA asks for it to be off for GPUDirect"
    )
    remedy = "boot with iommu=pt"
    return Check(name, Status.WARN, why, (*seen, translating[0]), remedy)
