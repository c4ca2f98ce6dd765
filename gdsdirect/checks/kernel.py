"""The kernel: io_uring, what it takes, and PCI peer-to-peer DMA."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

from gdsdirect.check import Check, Evidence, Status
from gdsdirect.errors import PROFILE
from gdsdirect.host import NOT_RECORDED, Host

_CAP_IPC_LOCK = 14  # linux/capability.h
_CAP_SYS_ADMIN = 21
_SMALL_LOCK = 64 << 20  # bytes of RLIMIT_MEMLOCK that buffers of models soon need

_NOT_BUILT = (
    "gdsdirect was installed without its io_uring part",
    "apt-get install liburing-dev pkg-config && pip install --force-reinstall gdsdirect",
)


def checks(host: Host) -> list[Check]:
    """All about the kernel."""
    answers = host.io_uring()
    found = [_release(host), _io_uring(host, answers)]
    found += [_feature(feature, answers) for feature in _FEATURES]
    return [*found, _memlock(host), p2pdma(host)]


def has_capability(host: Host, number: int) -> bool | None:
    """Whether this process has a capability, from /proc/self/status; None where it isn't told."""
    line = status_line(host, "CapEff")
    match = re.fullmatch(r"CapEff:\s*([0-9a-f]{1,16})", line)
    return bool(int(match[1], 16) >> number & 1) if match else None


def is_admin(host: Host) -> bool | None:
    """Whether this process has CAP_SYS_ADMIN."""
    return has_capability(host, _CAP_SYS_ADMIN)


def status_line(host: Host, name: str) -> str:
    """A line of /proc/self/status, or nothing."""
    return host.sysfs.line(f"{name}:", "proc/self/status")


def version(host: Host) -> tuple[int, int] | None:
    """The running kernel's version: (6, 12)."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", host.sysfs.read("proc/sys/kernel/osrelease") or "")
    return (int(match[1]), int(match[2])) if match else None


def _release(host: Host) -> Check:
    seen = host.look("proc/sys/kernel/osrelease")
    number = version(host)
    if number is None:
        return Check("kernel.release", Status.WARN, "the kernel doesn't tell its version", (seen,))
    if number < (5, 19):
        return Check(
            "kernel.release",
            Status.WARN,
            "Linux 5.19 is the first with NVMe passthrough for io_uring",
            (seen,),
            "boot Linux 5.19 or later",
        )
    return Check("kernel.release", Status.OK, f"Linux {seen.text}", (seen,))


# ---- io_uring


def _call(name: str, number: int) -> Evidence:
    what = "ok" if number == 0 else f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"
    return Evidence(name, what)


def _io_uring(host: Host, answers: dict[str, int]) -> Check:
    name = "kernel.io_uring"
    if not answers:
        if host.is_recorded:
            return Check(name, Status.NOT_APPLICABLE, NOT_RECORDED)
        why, remedy = _NOT_BUILT
        return Check(name, Status.MISSING, why, remedy=remedy)
    setup, enter = answers.get("setup", 0), answers.get("enter", 0)
    seen: tuple[Evidence, ...] = (_call("io_uring_setup", setup), _call("io_uring_enter", enter))
    if setup == 0 and enter == 0:
        return Check(name, Status.OK, "rings can be made, and take commands", seen)
    disabled = host.look("proc/sys/kernel/io_uring_disabled")
    seccomp = Evidence("/proc/self/status", status_line(host, "Seccomp") or "no Seccomp line")
    seen += (disabled, seccomp)
    why, remedy = _why_refused(host, setup or enter, disabled.text, seccomp.text)
    return Check(name, Status.MISSING, why, seen, remedy)


def _why_refused(host: Host, number: int, disabled: str, seccomp: str) -> tuple[str, str]:
    filtered = seccomp.split()[-1:] == ["2"]
    who = "a seccomp filter" if filtered else "a security module or seccomp filter"
    if number == errno.EPERM and disabled == "2":
        return "kernel.io_uring_disabled is 2: nobody may", "sysctl -w kernel.io_uring_disabled=0"
    if number == errno.EPERM and disabled == "1" and not is_admin(host):
        group = host.sysfs.read("proc/sys/kernel/io_uring_group")
        return (
            "kernel.io_uring_disabled is 1: only CAP_SYS_ADMIN and the group "
            f"kernel.io_uring_group ({group}) may",
            "sysctl -w kernel.io_uring_disabled=0",
        )
    if number in (errno.EPERM, errno.EACCES):
        return f"{who} refuses it, where the kernel itself would not", PROFILE
    if number == errno.ENOSYS and filtered:
        return "the kernel has no io_uring, or a seccomp filter hides it", PROFILE
    if number == errno.ENOSYS:
        return "the kernel was built without io_uring", "boot a kernel with CONFIG_IO_URING=y"
    if number in (errno.EMFILE, errno.ENFILE):
        return "no descriptor is free", "ulimit -n 65536"
    if number == errno.ENOMEM:
        return "RLIMIT_MEMLOCK is too small, or memory is short", "ulimit -l unlimited"
    return f"the kernel refuses it: {os.strerror(number)}", "see the kernel log"


@dataclass(frozen=True, slots=True)
class _Feature:
    """One thing that rings can do: `key` in csrc/ask.c, and its check, of `status` if refused."""

    name: str
    key: str
    what: str
    status: Status
    remedy: str


_FEATURES = (
    _Feature(
        "kernel.big_entries",
        "big_entries",
        "rings with SQE128 and CQE32",
        Status.MISSING,
        "boot Linux 5.19 or later",
    ),
    _Feature(
        "kernel.passthrough",
        "passthrough",
        "NVMe commands by IORING_OP_URING_CMD",
        Status.MISSING,
        "boot Linux 5.19 or later",
    ),
    _Feature(
        "kernel.fixed_buffers",
        "registers",
        "registered buffers (IORING_REGISTER_BUFFERS), which READ_FIXED reads into",
        Status.MISSING,
        "ulimit -l unlimited",
    ),
    _Feature(
        "kernel.passthrough_fixed",
        "passthrough_fixed",
        "NVMe commands into registered buffers (IORING_URING_CMD_FIXED)",
        Status.WARN,
        "boot Linux 6.1 or later",
    ),
    _Feature(
        "kernel.single_thread",
        "single_thread",
        "single_thread=True (SINGLE_ISSUER, DEFER_TASKRUN)",
        Status.WARN,
        "boot Linux 6.1 or later",
    ),
    _Feature(
        "kernel.iopoll",
        "iopoll",
        "iopoll=True (IORING_SETUP_IOPOLL); the drive needs poll queues too",
        Status.WARN,
        "leave iopoll out",
    ),
    _Feature(
        "kernel.sqpoll",
        "sqpoll",
        "sqpoll=True (IORING_SETUP_SQPOLL)",
        Status.WARN,
        "leave sqpoll out",
    ),
)


def _feature(feature: _Feature, answers: dict[str, int]) -> Check:
    number = answers.get(feature.key)
    if number is None or answers.get("setup"):
        why = NOT_RECORDED if number is None else "there is no io_uring at all"
        return Check(feature.name, Status.NOT_APPLICABLE, why)
    seen = (_call(f"io_uring: {feature.key}", number),)
    if number == 0:
        return Check(feature.name, Status.OK, feature.what, seen)
    if number in (errno.EPERM, errno.EACCES):
        why = f"refused by a seccomp filter or security module: {feature.what}"
        return Check(feature.name, feature.status, why, seen, PROFILE)
    return Check(feature.name, feature.status, f"not taken: {feature.what}", seen, feature.remedy)


def _memlock(host: Host) -> Check:
    name = "kernel.memlock"
    line = host.sysfs.line("Max locked memory", "proc/self/limits")
    seen = (Evidence("/proc/self/limits", " ".join(line.split()) or "no such line"),)
    match = re.match(r"Max locked memory\s+(\d{1,20}|unlimited)\s", line)
    if match is None:
        return Check(name, Status.WARN, "RLIMIT_MEMLOCK is not told", seen)
    if match[1] == "unlimited" or has_capability(host, _CAP_IPC_LOCK):
        return Check(name, Status.OK, "buffers of any size can be registered", seen)
    limit = int(match[1])
    why = f"at most {limit} bytes of buffers can be registered by this user, in all"
    if limit >= _SMALL_LOCK:
        return Check(name, Status.OK, why, seen)
    remedy = "ulimit -l unlimited"
    return Check(name, Status.WARN, f"{why}; larger ones are read into unregistered", seen, remedy)


# ---- Peer-to-peer DMA


def p2pdma(host: Host) -> Check:
    """Whether the kernel can let a drive write into another device's memory."""
    name = "kernel.p2pdma"
    option = host.sysfs.kernel_has_p2pdma()
    seen = (Evidence(option.source, option.text),)
    if option.enabled:
        return Check(name, Status.OK, "the kernel has PCI peer-to-peer DMA", seen)
    remedy = "boot a kernel with CONFIG_PCI_P2PDMA=y (Debian's have it from 7 on)"
    if option.enabled is None:
        why = "neither the kernel's configuration nor its symbols can be read"
        return Check(name, Status.WARN, why, seen)
    why = "the kernel was built without P2PDMA: no device can write into another's memory"
    return Check(name, Status.MISSING, why, seen, remedy)
