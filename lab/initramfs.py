"""What the guest boots into: a static busybox, a handful of modules, and init.sh."""

import os
import shlex
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lab import cache, cpio
from lab.errors import LabError
from lab.image import decompressed
from lab.kernels import Kernel
from lab.tools import tool

_INIT = Path(__file__).with_name("init.sh")
_APPLETS = "cat chroot env ip ln ls mkdir mkfifo modprobe mount reboot sh sleep sync wc"

# Loaded at boot, where the kernel has them as modules. All others are left to modprobe, which finds
# the kernel's whole modules folder in the guest.
_AT_BOOT = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "nvme")

# The kernel calls this when something needs a module (mount -t xfs), outside the command's root.
_MODPROBE = b'#!/bin/sh\nexec chroot /root /sbin/modprobe "$@"\n'


def build(
    kernel: Kernel,
    command: Sequence[str],
    *,
    cwd: Path = Path("/"),
    env: Mapping[str, str],
    share: Path | None = None,
    drives: int = 0,
) -> bytes:
    """An initramfs that runs `command` in `cwd` as soon as `drives` drives have appeared.

    Two archives, one after the other: what all runs of a kernel share comes from the cache.
    """
    code = [_INIT, Path(__file__), Path(cpio.__file__)]
    sources = [*code, Path(tool("busybox")), kernel.modules / "modules.dep"]
    shared = cache.derived(
        f"initramfs-{kernel.release}", sources, lambda: cpio.archive(_entries(kernel))
    )
    entries = [
        cpio.file("etc/command", os.fsencode(_script(command, cwd, env))),
        cpio.file("etc/drives", b"%d" % drives),
    ]
    if share is not None:
        entries.append(cpio.file("etc/share", os.fsencode(share)))
    return shared.read_bytes() + cpio.archive(entries)


def _script(command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> str:
    assignments = [f"{name}={value}" for name, value in env.items()]
    enter = ["/bin/chroot", "/root", "/bin/sh", "-c", 'cd "$0" && exec "$@"', str(cwd)]
    return shlex.join(["exec", "env", "-i", *assignments, *enter, *command])


def _entries(kernel: Kernel) -> Iterator[cpio.Entry]:
    yield cpio.file("init", _INIT.read_bytes(), 0o755)
    yield cpio.file("bin/busybox", _busybox(), 0o755)
    for applet in _APPLETS.split():
        yield cpio.link(f"bin/{applet}", "busybox")
    yield cpio.file("sbin/modprobe", _MODPROBE, 0o755)
    for name in ("dev", "proc", "root", "sys"):
        yield cpio.folder(name)
    yield from _modules(kernel)


def _modules(kernel: Kernel) -> Iterator[cpio.Entry]:
    needs = _dependencies(kernel)
    by_name = {_module_name(path): path for path in needs}
    at_boot = [name for name in _AT_BOOT if name in by_name]
    paths = dict.fromkeys(
        part for name in at_boot for part in (by_name[name], *needs[by_name[name]])
    )
    home = f"lib/modules/{kernel.release}"
    index = ""
    for path in paths:
        data = decompressed((kernel.modules / path).read_bytes())
        yield cpio.file(f"{home}/{_plain(path)}", data)
        index += f"{_plain(path)}: {' '.join(_plain(part) for part in needs[path])}\n"
    yield cpio.file(f"{home}/modules.dep", index.encode())
    yield cpio.file("etc/modules", " ".join(at_boot).encode())


def _dependencies(kernel: Kernel) -> dict[str, list[str]]:
    """What each module needs; both as paths below the modules folder."""
    lines = (kernel.modules / "modules.dep").read_text().splitlines()
    split = (line.partition(":") for line in lines)
    return {path: needs.split() for path, _, needs in split}


def _module_name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


def _plain(path: str) -> str:
    return path.removesuffix(".xz").removesuffix(".zst")


def _busybox() -> bytes:
    path = tool("busybox")
    data = Path(path).read_bytes()
    if _needs_loader(data):
        raise LabError(f"{path} needs shared libraries; run: apt install busybox-static")
    return data


def _needs_loader(elf: bytes) -> bool:
    """Whether a 64-bit ELF file has a PT_INTERP header, that is, is not static."""
    (start,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    types = (struct.unpack_from("<I", elf, start + i * size)[0] for i in range(count))
    return 3 in types
