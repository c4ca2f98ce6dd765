"""NVIDIA: driver, GPUs, and both ways of GPUDirect Storage, nvidia-fs and P2PDMA.

What cuFile needs is from NVIDIA's GPUDirect Storage guides, and for the pages of BAR1 from the open
driver's uvm_devmem.c, which makes them where BAR1 is mapped statically and not write-combined.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from gdsdirect.check import Check, Evidence, Status
from gdsdirect.checks.environment import in_container
from gdsdirect.checks.kernel import version
from gdsdirect.checks.nvme import MULTIPATH_OFF, link
from gdsdirect.checks.peer import is_gpu
from gdsdirect.host import UNREADABLE, Host, texts
from gdsdirect.nvidia_fs import (
    parse_nvidia_fs_modules,
    parse_nvidia_fs_stats,
    parse_nvidia_fs_version,
)

_VENDOR = "0x10de"
_FIRST_P2PDMA_DRIVER = 565
_FIRST_P2PDMA_KERNEL = (6, 2)

# Set together at the driver's loading.
_STATIC_BAR1 = "RMForceStaticBar1"
_NO_WRITE_COMBINING = "RmForceDisableIomapWC"
_STATIC_BAR1_REMEDY = (
    "echo 'options nvidia NVreg_RegistryDwords=\"RMForceStaticBar1=1;RmForceDisableIomapWC=1\"' > "
    "/etc/modprobe.d/nvidia-p2pdma.conf, then reload the driver or reboot"
)

_NVIDIA_FS = "/proc/driver/nvidia-fs"

# What libcufile takes its settings from, unless the environment names another.
_CUFILE_JSON = "/etc/cufile.json"
_CUFILE_JSON_VARIABLE = "CUFILE_ENV_PATH_JSON"
_P2PDMA_VARIABLE = "CUFILE_USE_PCIP2PDMA"
_LIBRARY_PLACES = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/x86_64-linux/lib",
    "/usr/local/cuda/targets/sbsa-linux/lib",
    "/opt/cuda/lib64",
)


@dataclass(frozen=True, slots=True)
class Nvidia:
    """What was found, and the names of the checks that each mode of cuFile needs to be ok."""

    checks: tuple[Check, ...]

    P2PDMA = (
        "nvidia.driver",
        "nvidia.gpu",
        "nvidia.static_bar1",
        "nvidia.p2pdma_pages",
        "nvidia.kernel",
        "nvidia.multipath",
        "nvidia.libcufile",
        "nvidia.cufile_json",
        "nvidia.udev",
    )
    NVIDIA_FS = (
        "nvidia.driver",
        "nvidia.gpu",
        "nvidia.nvidia_fs",
        "nvidia.nvidia_fs_nvme",
        "nvidia.libcufile",
        "nvidia.udev",
    )

    def closed_by(self, mode: tuple[str, ...]) -> tuple[Check, ...]:
        """The checks that close a mode, in its order."""
        order = {name: index for index, name in enumerate(mode)}
        closing = [one for one in self.checks if one.name in order and one.status is Status.MISSING]
        return tuple(sorted(closing, key=lambda one: order[one.name]))


def find_nvidia(host: Host) -> Nvidia:
    """All about NVIDIA."""
    gpus = _gpus(host)
    driver = host.look("proc/driver/nvidia/version")
    found = [_driver(host, driver, gpus)]
    if not gpus and driver.text == UNREADABLE:
        return Nvidia((*found, Check("nvidia.gpu", Status.MISSING, "no GPU of NVIDIA's is here")))
    found += [_gpu(host, address) for address in gpus] or [
        Check("nvidia.gpu", Status.MISSING, "there is a driver, and no GPU that this process sees")
    ]
    found += [link(host, "nvidia.link", address, address) for address in gpus]
    found += [_static_bar1(host), *(_pages(host, address) for address in gpus)]
    found += [_kernel(host), _multipath(host), *_nvidia_fs(host), _peermem(host)]
    return Nvidia((*found, _libcufile(host), _cufile_json(host), _udev(host)))


def _gpus(host: Host) -> tuple[str, ...]:
    return tuple(
        address
        for address in host.sysfs.entries("sys/bus/pci/devices")
        if host.sysfs.read("sys/bus/pci/devices", address, "vendor") == _VENDOR
        and is_gpu(host, address)
    )


def driver_version(text: str) -> int | None:
    """The major version in /proc/driver/nvidia/version, or None."""
    match = re.search(r"\s(\d{3,4})\.\d{1,4}(?:\.\d{1,4})?\s", text)
    return int(match[1]) if match else None


def _driver(host: Host, seen: Evidence, gpus: tuple[str, ...]) -> Check:
    name = "nvidia.driver"
    if seen.text == UNREADABLE:
        remedy = "apt-get install nvidia-open" if gpus else None
        return Check(name, Status.MISSING, "NVIDIA's driver is not loaded", (seen,), remedy)
    number = driver_version(seen.text + " ")
    kind = "the open kernel module" if "Open Kernel Module" in seen.text else "the closed module"
    return Check(name, Status.OK, f"{kind}, version {number or 'unknown'}", (seen,))


def _gpu(host: Host, address: str) -> Check:
    directory = f"/sys/bus/pci/devices/{address}"
    lines = (host.sysfs.read(directory, "resource") or "").splitlines()
    bar1 = lines[1] if len(lines) > 1 else ""
    size = _resource_size(bar1)
    device = host.look(directory, "device")
    seen = (device, Evidence(f"{directory}/resource, second line (BAR1)", bar1 or UNREADABLE))
    why = f"GPU {device.text}" + (f", BAR1 of {size >> 20} MiB" if size else ", BAR1 unknown")
    return Check("nvidia.gpu", Status.OK, why, seen, None, address)


def _resource_size(line: str) -> int:
    """Bytes of a BAR, from a line of `resource`: first and last address, and flags, in hex."""
    numbers = re.fullmatch(r"0x([0-9a-f]{1,16}) 0x([0-9a-f]{1,16}) 0x[0-9a-f]{1,16}", line)
    if numbers is None or int(numbers[2], 16) == 0:
        return 0
    return int(numbers[2], 16) - int(numbers[1], 16) + 1


# ---- P2PDMA


def _registry(host: Host) -> tuple[Evidence, dict[str, str]]:
    line = host.sysfs.line("RegistryDwords:", "proc/driver/nvidia/params")
    pairs = re.findall(r"(\w+)=(\w+)", line)
    return Evidence("/proc/driver/nvidia/params", line or "no line RegistryDwords"), dict(pairs)


def _static_bar1(host: Host) -> Check:
    name = "nvidia.static_bar1"
    seen, registry = _registry(host)
    lacking = [
        key for key in (_STATIC_BAR1, _NO_WRITE_COMBINING) if registry.get(key, "0") in ("0", "0x0")
    ]
    if lacking:
        why = f"{' and '.join(lacking)} not set, so the driver makes no P2PDMA pages of BAR1"
        return Check(name, Status.MISSING, why, (seen,), _STATIC_BAR1_REMEDY)
    return Check(name, Status.OK, "BAR1 is mapped statically, and not write-combined", (seen,))


def _pages(host: Host, address: str) -> Check:
    name = "nvidia.p2pdma_pages"
    folder = f"/sys/bus/pci/devices/{address}/p2pmem"
    if not host.sysfs.exists(folder):
        why = "the driver made no P2PDMA pages of its BAR1"
        seen = (Evidence(folder, "is not there"),)
        return Check(name, Status.MISSING, why, seen, _STATIC_BAR1_REMEDY, address)
    size = host.look(folder, "size")
    if size.text == "0":
        why = (
            "the folder is there with size 0: left behind, or of a driver that hands out none; "
            "only a read shows"
        )
        return Check(name, Status.WARN, why, (size,), None, address)
    return Check(name, Status.OK, "its BAR1 has P2PDMA pages", (size,), None, address)


def _kernel(host: Host) -> Check:
    name = "nvidia.kernel"
    release = host.look("proc/sys/kernel/osrelease")
    driver = host.look("proc/driver/nvidia/version")
    option = host.sysfs.kernel_has_p2pdma()
    seen: tuple[Evidence, ...] = (release, Evidence(option.source, option.text), driver)
    kernel, number = version(host), driver_version(driver.text + " ")
    if kernel is not None and kernel < _FIRST_P2PDMA_KERNEL:
        why, remedy = "cuFile's P2PDMA mode needs Linux 6.2", "boot Linux 6.2 or later"
        return Check(name, Status.MISSING, why, seen, remedy)
    if option.enabled is False:
        why = "cuFile's P2PDMA mode needs a kernel with CONFIG_PCI_P2PDMA=y"
        return Check(name, Status.MISSING, why, seen, "boot a kernel with CONFIG_PCI_P2PDMA=y")
    if "Open Kernel Module" not in driver.text or (number or 0) < _FIRST_P2PDMA_DRIVER:
        why = f"cuFile's P2PDMA mode needs the open driver, {_FIRST_P2PDMA_DRIVER} or later"
        return Check(name, Status.MISSING, why, seen, "apt-get install nvidia-open")
    if host.sysfs.kernel_has_symbol("p2pdma_pgmap_ops") is False:
        seen += (Evidence("/proc/kallsyms", "no p2pdma_pgmap_ops"),)
        why = "the kernel lacks p2pdma_pgmap_ops, which NVIDIA's guide asks for"
        return Check(name, Status.WARN, why, seen)
    return Check(name, Status.OK, "kernel and driver are new enough for P2PDMA", seen)


def _multipath(host: Host) -> Check:
    name = "nvidia.multipath"
    seen = host.look("sys/module/nvme_core/parameters/multipath")
    if seen.text != "Y":
        return Check(name, Status.OK, "NVMe multipath is off", (seen,))
    why = "NVMe multipath is on, which cuFile's P2PDMA mode doesn't take"
    return Check(name, Status.MISSING, why, (seen,), MULTIPATH_OFF)


# ---- nvidia-fs


def _nvidia_fs(host: Host) -> list[Check]:
    name = "nvidia.nvidia_fs"
    version_file = host.look(_NVIDIA_FS, "version")
    if version_file.text == UNREADABLE:
        why = "the module nvidia-fs is not loaded; cuFile's P2PDMA mode needs none"
        return [Check(name, Status.MISSING, why, (version_file,), "modprobe nvidia_fs")]
    stats_file = host.look(_NVIDIA_FS, "stats")
    stats = parse_nvidia_fs_stats(stats_file.text)
    patch = host.look("sys/module/nvidia_fs/version")
    number = stats.driver_version or parse_nvidia_fs_version(version_file.text) or "unknown"
    gpus = ", ".join(gpu.pci_address for gpu in stats.gpus) or "none"
    why = f"nvidia-fs {number} is loaded; GPUs that it has served: {gpus}"
    found = [Check(name, Status.OK, why, (version_file, patch, stats_file))]
    # Error.dma-ref counts down, in 32 bits.
    errors = ", ".join(
        f"{key} {(1 << 32) - count if count >> 31 else count}"
        for key, count in stats.errors.items()
        if isinstance(count, int)
    )
    if errors:
        why = f"nvidia-fs has counted errors: {errors}"
        remedy = "dmesg | grep nvidia-fs"
        found.append(Check("nvidia.nvidia_fs_errors", Status.WARN, why, (stats_file,), remedy))
    return [*found, _nvidia_fs_drivers(host)]


def _nvidia_fs_drivers(host: Host) -> Check:
    name = "nvidia.nvidia_fs_nvme"
    seen = host.look(_NVIDIA_FS, "modules")
    # wekafsio is always listed, whether it is there or not, and versions mean nothing.
    modules = parse_nvidia_fs_modules("" if seen.text == UNREADABLE else seen.text)
    if "nvme" in modules:
        return Check(name, Status.OK, f"it serves {', '.join(modules)}", (seen,))
    why = (
        "the NVMe driver did not register with nvidia-fs, so that cuFile copies through RAM "
        f"(registered: {', '.join(modules) or 'none'})"
    )
    remedy = "install NVIDIA's patched NVMe driver (DOCA's mlnx-nvme), or use the P2PDMA mode"
    return Check(name, Status.MISSING, why, (seen,), remedy)


def _peermem(host: Host) -> Check:
    name = "nvidia.peermem"
    if host.sysfs.exists("sys/module/nvidia_peermem"):
        seen = Evidence("/sys/module/nvidia_peermem", "is there")
        return Check(name, Status.OK, "loaded: network cards reach GPU memory", (seen,))
    why = "not loaded: only network cards need it, local drives don't"
    return Check(name, Status.NOT_APPLICABLE, why)


# ---- libcufile


def _libcufile(host: Host) -> Check:
    name = "nvidia.libcufile"
    places = _library_places(host)
    for place in places:
        path = f"{place}/libcufile.so.0"
        if host.sysfs.exists(path):
            real = host.sysfs.resolve(path)
            number = os.path.basename(real).removeprefix("libcufile.so.")
            return Check(name, Status.OK, f"version {number}", (Evidence(path, real),))
    seen = Evidence(", ".join(places), "no libcufile.so.0")
    why = "cuFile's library is not where the loader looks"
    return Check(name, Status.MISSING, why, (seen,), "apt-get install libcufile-12-8, or later")


def _library_places(host: Host) -> tuple[str, ...]:
    """Where the loader looks, the usual places, and NVIDIA's wheel."""
    told = host.environment("LD_LIBRARY_PATH").split(":")
    for name in host.sysfs.entries("etc/ld.so.conf.d"):
        told += (host.sysfs.read("etc/ld.so.conf.d", name) or "").splitlines()
    wheel = texts(host.ask("cufile wheel", _find_wheel)).get("folder", "")
    places = (*map(str.strip, told), *_LIBRARY_PLACES, wheel)
    return tuple(dict.fromkeys(place for place in places if place.startswith("/")))


def _find_wheel() -> dict[str, str]:
    """The folder of the library in the package nvidia-cufile, where that is installed."""
    for place in sys.path:
        folder = os.path.join(place or os.getcwd(), "nvidia/cufile/lib")
        if os.path.isdir(folder):
            return {"folder": folder}
    return {}


def parse_cufile_json(text: str) -> dict[str, Any] | None:
    """The settings that choose cuFile's way, from cufile.json, which allows // comments; or None.

    >>> parse_cufile_json('{"properties": {"use_pci_p2pdma": true}} // on')
    {'properties.use_pci_p2pdma': True}
    """
    try:
        found = json.loads(_without_comments(text))
    except (ValueError, RecursionError):
        return None
    settings = {}
    for path in _SETTINGS:
        value: Any = found
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (bool, int, str)):
            settings[path] = value
    return settings


_SETTINGS = (
    "properties.use_pci_p2pdma",
    "properties.allow_compat_mode",
    "properties.force_compat_mode",
    "block.nvme.use_pci_p2pdma",
)


def _without_comments(text: str) -> str:
    # A string, which may hold //, or a comment: whichever comes first.
    return re.sub(r'("(?:[^"\\]|\\.)*")|//[^\n]*', lambda match: match[1] or "", text)


def _cufile_json(host: Host) -> Check:
    name = "nvidia.cufile_json"
    path = host.environment(_CUFILE_JSON_VARIABLE) or _CUFILE_JSON
    text = host.sysfs.read(path)
    settings = parse_cufile_json("{}" if text is None else text)
    if settings is None:
        seen: tuple[Evidence, ...] = (Evidence(path, (text or "")[:200]),)
        return Check(name, Status.MISSING, "it is not JSON", seen, f"mend {path}")
    variable = host.environment(_P2PDMA_VARIABLE)
    seen = (Evidence(path, UNREADABLE if text is None else json.dumps(settings)),)
    if variable:
        seen += (Evidence(f"environment, {_P2PDMA_VARIABLE}", variable),)
        settings["properties.use_pci_p2pdma"] = variable.lower() in ("1", "true", "yes")
    if settings.get("properties.force_compat_mode") is True:
        why = "force_compat_mode is on: cuFile copies through RAM whatever else is set"
        remedy = f'set "force_compat_mode": false in {path}'
        return Check(name, Status.MISSING, why, seen, remedy)
    used = [settings.get(key) for key in _SETTINGS if key.endswith("use_pci_p2pdma")]
    if True not in used:
        remedy = f'set "use_pci_p2pdma": true below "properties" in {path}'
        return Check(name, Status.MISSING, "cuFile's P2PDMA mode is off", seen, remedy)
    return Check(name, Status.OK, "cuFile's P2PDMA mode is on", seen)


def _udev(host: Host) -> Check:
    name = "nvidia.udev"
    if host.sysfs.exists("run/udev"):
        return Check(
            name, Status.OK, "libcufile finds the drives", (Evidence("/run/udev", "is there"),)
        )
    seen = Evidence("/run/udev", "is not there")
    why = "without /run/udev libcufile finds no drive, and fails with an internal error"
    remedy = (
        "docker run --volume /run/udev:/run/udev:ro"
        if in_container(host)
        else "systemctl start systemd-udevd"
    )
    return Check(name, Status.MISSING, why, (seen,), remedy)
