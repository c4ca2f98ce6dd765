"""Exception types, and the text of everything that can go wrong with a read.

Nothing here touches a device. `completion_error` turns what the kernel reported for one read into
the exception that a caller sees, so that each cause and its remedy is worded in one place.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
from collections.abc import Mapping
from types import ModuleType

# Completion Queue Entry status field as io_uring hands it on in cqe->res (Linux uapi, enum
# nvme_status_field): status code, status code type, then the two flags.
_SC_MASK = 0xFF
_SCT_SHIFT, _SCT_MASK = 8, 0x7
_MORE = 0x2000
_DO_NOT_RETRY = 0x4000

_VENDOR_SCT = 7
_FIRST_VENDOR_SC = 0xC0  # in every status code type, C0h to FFh belong to the vendor

# NVM Express Base Specification 2.0, 3.3.3.2.1 "Status Code Type", and the figures of status values
# that follow it, with the additions of 2.1; NVM, Zoned Namespace and Key Value Command Set
# Specifications for 80h to BFh.
_STATUS_NAMES: dict[int, dict[int, str]] = {
    # Generic Command Status
    0: {
        0x00: "Successful Completion",
        0x01: "Invalid Command Opcode",
        0x02: "Invalid Field in Command",
        0x03: "Command ID Conflict",
        0x04: "Data Transfer Error",
        0x05: "Commands Aborted due to Power Loss Notification",
        0x06: "Internal Error",
        0x07: "Command Abort Requested",
        0x08: "Command Aborted due to SQ Deletion",
        0x09: "Command Aborted due to Failed Fused Command",
        0x0A: "Command Aborted due to Missing Fused Command",
        0x0B: "Invalid Namespace or Format",
        0x0C: "Command Sequence Error",
        0x0D: "Invalid SGL Segment Descriptor",
        0x0E: "Invalid Number of SGL Descriptors",
        0x0F: "Data SGL Length Invalid",
        0x10: "Metadata SGL Length Invalid",
        0x11: "SGL Descriptor Type Invalid",
        0x12: "Invalid Use of Controller Memory Buffer",
        0x13: "PRP Offset Invalid",
        0x14: "Atomic Write Unit Exceeded",
        0x15: "Operation Denied",
        0x16: "SGL Offset Invalid",
        0x18: "Host Identifier Inconsistent Format",
        0x19: "Keep Alive Timer Expired",
        0x1A: "Keep Alive Timeout Invalid",
        0x1B: "Command Aborted due to Preempt and Abort",
        0x1C: "Sanitize Failed",
        0x1D: "Sanitize In Progress",
        0x1E: "SGL Data Block Granularity Invalid",
        0x1F: "Command Not Supported for Queue in CMB",
        0x20: "Namespace is Write Protected",
        0x21: "Command Interrupted",
        0x22: "Transient Transport Error",
        0x23: "Command Prohibited by Command and Feature Lockdown",
        0x24: "Admin Command Media Not Ready",
        0x25: "Invalid Key Tag",
        0x26: "Host Dispersed Namespace Support Not Enabled",
        0x27: "Host Identifier Not Initialized",
        0x28: "Incorrect Key",
        0x29: "FDP Disabled",
        0x2A: "Invalid Placement Handle List",
        0x80: "LBA Out of Range",
        0x81: "Capacity Exceeded",
        0x82: "Namespace Not Ready",
        0x83: "Reservation Conflict",
        0x84: "Format In Progress",
        0x85: "Invalid Value Size",
        0x86: "Invalid Key Size",
        0x87: "KV Key Does Not Exist",
        0x88: "Unrecovered Error",
        0x89: "Key Exists",
    },
    # Command Specific Status
    1: {
        0x00: "Completion Queue Invalid",
        0x01: "Invalid Queue Identifier",
        0x02: "Invalid Queue Size",
        0x03: "Abort Command Limit Exceeded",
        0x05: "Asynchronous Event Request Limit Exceeded",
        0x06: "Invalid Firmware Slot",
        0x07: "Invalid Firmware Image",
        0x08: "Invalid Interrupt Vector",
        0x09: "Invalid Log Page",
        0x0A: "Invalid Format",
        0x0B: "Firmware Activation Requires Conventional Reset",
        0x0C: "Invalid Queue Deletion",
        0x0D: "Feature Identifier Not Saveable",
        0x0E: "Feature Not Changeable",
        0x0F: "Feature Not Namespace Specific",
        0x10: "Firmware Activation Requires NVM Subsystem Reset",
        0x11: "Firmware Activation Requires Controller Level Reset",
        0x12: "Firmware Activation Requires Maximum Time Violation",
        0x13: "Firmware Activation Prohibited",
        0x14: "Overlapping Range",
        0x15: "Namespace Insufficient Capacity",
        0x16: "Namespace Identifier Unavailable",
        0x18: "Namespace Already Attached",
        0x19: "Namespace Is Private",
        0x1A: "Namespace Not Attached",
        0x1B: "Thin Provisioning Not Supported",
        0x1C: "Controller List Invalid",
        0x1D: "Device Self-test In Progress",
        0x1E: "Boot Partition Write Prohibited",
        0x1F: "Invalid Controller Identifier",
        0x20: "Invalid Secondary Controller State",
        0x21: "Invalid Number of Controller Resources",
        0x22: "Invalid Resource Identifier",
        0x23: "Sanitize Prohibited While Persistent Memory Region is Enabled",
        0x24: "ANA Group Identifier Invalid",
        0x25: "ANA Attach Failed",
        0x26: "Insufficient Capacity",
        0x27: "Namespace Attachment Limit Exceeded",
        0x28: "Prohibition of Command Execution Not Supported",
        0x29: "I/O Command Set Not Supported",
        0x2A: "I/O Command Set Not Enabled",
        0x2B: "I/O Command Set Combination Rejected",
        0x2C: "Invalid I/O Command Set",
        0x2D: "Identifier Unavailable",
        0x2E: "Namespace Is Dispersed",
        0x2F: "Invalid Discovery Information",
        0x30: "Zoning Data Structure Locked",
        0x31: "Zoning Data Structure Not Found",
        0x32: "Insufficient Discovery Resources",
        0x33: "Requested Function Disabled",
        0x34: "ZoneGroup Originator Invalid",
        0x35: "Invalid Host",
        0x36: "Invalid NVM Subsystem",
        0x37: "Invalid Controller Data Queue",
        0x38: "Not Enough Resources",
        0x39: "Controller Suspended",
        0x3A: "Controller Not Suspended",
        0x3B: "Controller Data Queue Full",
        0x80: "Conflicting Attributes",
        0x81: "Invalid Protection Information",
        0x82: "Attempted Write to Read Only Range",
        0x83: "Command Size Limit Exceeded",
        0x85: "Incompatible Namespace or Format",
        0x86: "Fast Copy Not Possible",
        0x87: "Overlapping I/O Range",
        0x88: "Namespace Not Reachable",
        0x89: "Insufficient Resources",
        0xB6: "Invalid Zone Operation Request",
        0xB7: "ZRWA Resources Unavailable",
        0xB8: "Zone Boundary Error",
        0xB9: "Zone Is Full",
        0xBA: "Zone Is Read Only",
        0xBB: "Zone Is Offline",
        0xBC: "Zone Invalid Write",
        0xBD: "Too Many Active Zones",
        0xBE: "Too Many Open Zones",
        0xBF: "Invalid Zone State Transition",
    },
    # Media and Data Integrity Errors
    2: {
        0x80: "Write Fault",
        0x81: "Unrecovered Read Error",
        0x82: "End-to-end Guard Check Error",
        0x83: "End-to-end Application Tag Check Error",
        0x84: "End-to-end Reference Tag Check Error",
        0x85: "Compare Failure",
        0x86: "Access Denied",
        0x87: "Deallocated or Unwritten Logical Block",
        0x88: "End-to-End Storage Tag Check Error",
    },
    # Path Related Status
    3: {
        0x00: "Internal Path Error",
        0x01: "Asymmetric Access Persistent Loss",
        0x02: "Asymmetric Access Inaccessible",
        0x03: "Asymmetric Access Transition",
        0x60: "Controller Pathing Error",
        0x70: "Host Pathing Error",
        0x71: "Command Aborted By Host",
    },
}


def status_name(sct: int, sc: int) -> str:
    """Name of an NVMe status as the specification spells it.

    `sct` is the status code type (0..7), `sc` the status code (0..255). "Vendor specific status"
    and "Unknown status" are returned for what no specification names; nothing is raised.

    >>> status_name(2, 0x81)
    'Unrecovered Read Error'
    """
    if sct == _VENDOR_SCT or (sct in _STATUS_NAMES and sc >= _FIRST_VENDOR_SC):
        return "Vendor specific status"
    return _STATUS_NAMES.get(sct, {}).get(sc, "Unknown status")


def _block_range(namespace_id: int, starting_lba: int, blocks: int) -> str:
    last = f"..{starting_lba + blocks - 1}" if blocks > 1 else ""
    return f"LBA {starting_lba}{last} of namespace {namespace_id}"


class NvmeStatusError(OSError):
    """The drive completed a read with an error status (`errno` is EIO).

    `status` is the completion's result as io_uring gives it (cqe->res), which for NVMe passthrough
    is the status field of the Completion Queue Entry. ValueError if it is not positive: a negative
    result is an errno of the kernel's and 0 is success.

    Attributes: `status`; `sct` and `sc`, the status code type and code; `name` (`status_name`);
    `do_not_retry`, True where the drive says that the same command would fail again; `more`, True
    where the drive's Error Information log page says more; `namespace` (and `filename`), the
    device's path; `namespace_id`, `starting_lba` and `blocks`, what was being read.

    >>> print(NvmeStatusError(0x4281, "/dev/ng0n1", namespace_id=1, starting_lba=8, blocks=8))
    ... # doctest: +NORMALIZE_WHITESPACE
    /dev/ng0n1: NVMe status 0x281, Unrecovered Read Error (SCT 2, SC 0x81), reading LBA 8..15 of
    namespace 1; the drive says do not retry
    """

    def __init__(
        self, status: int, path: str, *, namespace_id: int, starting_lba: int, blocks: int
    ) -> None:
        if status <= 0:
            raise ValueError(f"status {status} is not an NVMe error status: it must be above 0")
        self.status = status
        self.sct = status >> _SCT_SHIFT & _SCT_MASK
        self.sc = status & _SC_MASK
        self.name = status_name(self.sct, self.sc)
        self.do_not_retry = bool(status & _DO_NOT_RETRY)
        self.more = bool(status & _MORE)
        self.namespace = path
        self.namespace_id = namespace_id
        self.starting_lba = starting_lba
        self.blocks = blocks
        # The flags are spelled out in words, so the number shows what the specification tabulates.
        number = self.sct << _SCT_SHIFT | self.sc
        text = (
            f"NVMe status {number:#x}, {self.name} (SCT {self.sct}, SC {self.sc:#04x}), "
            f"reading {_block_range(namespace_id, starting_lba, blocks)}"
        )
        if self.do_not_retry:
            text += "; the drive says do not retry"
        if self.more:
            text += "; the drive's error log (nvme error-log) says more"
        super().__init__(errno.EIO, text, path)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"

    def __reduce__(self) -> tuple[object, ...]:
        # OSError would call the constructor with (errno, text, path).
        rebuild = functools.partial(
            type(self),
            namespace_id=self.namespace_id,
            starting_lba=self.starting_lba,
            blocks=self.blocks,
        )
        return rebuild, (self.status, self.namespace), self.__dict__


class ShortReadError(OSError):
    """A read of a file ended before all of it was read (`errno` is EIO).

    Attributes, all in bytes: `offset` in the file, `expected` as asked for, `nbytes` as read. The
    first `nbytes` of the target hold the file's bytes; the rest is as it was.
    """

    def __init__(self, path: str, offset: int, expected: int, nbytes: int) -> None:
        self.offset = offset
        self.expected = expected
        self.nbytes = nbytes
        text = (
            f"read {nbytes} of {expected} bytes at offset {offset}; "
            "the file ends there or the device stopped early"
        )
        super().__init__(errno.EIO, text, path)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"

    def __reduce__(self) -> tuple[object, ...]:
        arguments = (self.filename, self.offset, self.expected, self.nbytes)
        return type(self), arguments, self.__dict__


class RingUnavailableError(RuntimeError):
    """A ring, a namespace or a mapping was asked of a gdsdirect that has no io_uring part."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)

    def __str__(self) -> str:
        return (
            f"gdsdirect's io_uring part cannot be loaded ({self.args[0]}): it needs Linux and "
            "liburing; there, run `apt-get install liburing-dev` and reinstall gdsdirect without "
            "GDSDIRECT_URING_CMD=0"
        )


class CudaUnavailableError(RuntimeError):
    """GPU memory was asked for where there is no CUDA: the text says what is missing, and the
    remedy."""


class CudaError(RuntimeError):
    """A call of CUDA's driver failed.

    Attributes: `function`, the driver's name of it; `code`, the CUresult as a number; `name` and
    `text`, what cuGetErrorName and cuGetErrorString say of it.

    >>> print(CudaError("cuMemHostRegister", 2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"))
    cuMemHostRegister: out of memory (CUDA_ERROR_OUT_OF_MEMORY, 2)
    """

    def __init__(self, function: str, code: int, name: str, text: str) -> None:
        super().__init__(function, code, name, text)
        self.function = function
        self.code = code
        self.name = name
        self.text = text

    def __str__(self) -> str:
        return f"{self.function}: {self.text} ({self.name}, {self.code})"


class WayClosedError(OSError):
    """None of the ways that `require=` allows is open. `obstacles` has what stands in each's.

    >>> WayClosedError("weights", {"FILE_FIXED": "its file system takes no O_DIRECT"}).strerror
    'no way that may be taken is open: FILE_FIXED, its file system takes no O_DIRECT'
    """

    def __init__(self, path: str, obstacles: Mapping[str, str]) -> None:
        listed = "; ".join(f"{way}, {why}" for way, why in obstacles.items())
        super().__init__(errno.EOPNOTSUPP, f"no way that may be taken is open: {listed}", path)
        self.obstacles = dict(obstacles)

    def __reduce__(self) -> tuple[type[WayClosedError], tuple[str, dict[str, str]]]:
        return type(self), (self.filename, self.obstacles)


def ring_module() -> ModuleType:
    """The extension module `gdsdirect._uring_cmd`; RingUnavailableError where it is not built.

    Loaded at the first call, so that `import gdsdirect` works everywhere and costs nothing.
    """
    try:
        return importlib.import_module("gdsdirect._uring_cmd")
    except ImportError as error:
        raise RingUnavailableError(str(error)) from error


class _NoRing:
    """Stands in for a base class of the io_uring part's where that is not built."""

    __slots__ = ()

    def __new__(cls, *args: object, **kwargs: object) -> _NoRing:
        ring_module()
        return super().__new__(cls)


def ring_type(name: str) -> type:
    """The class `name` of the io_uring part, to inherit from.

    Where there is none, a class that can be inherited from and not instantiated: trying to raises
    RingUnavailableError.
    """
    try:
        found: type = getattr(ring_module(), name)
    except RingUnavailableError:
        return _NoRing
    return found


_NO_PEER_ROUTE = (
    "the drive and the provider of the peer memory do not share a PCIe switch (or a whitelisted "
    "host bridge); see the kernel log for the two devices, and move one of them or read into host "
    "memory"
)
_DENIED = (
    "the command is not allowed: check the device node's permissions; before Linux 6.2 passthrough "
    "needs CAP_SYS_ADMIN whatever they are"
)
_NO_PASSTHROUGH = (
    "this is not an NVMe generic character device (/dev/ngXnY), or the kernel is older than 5.19 "
    "and has no NVMe passthrough for io_uring"
)

# Keyed by name because other systems than Linux, where this module must import, lack some of them.
_REMEDIES = {
    getattr(errno, name): text
    for name, text in {
        "EREMOTEIO": _NO_PEER_ROUTE,
        "EINVAL": (
            "the kernel refused the request: with O_DIRECT, offset, size and address must be "
            "multiples of the logical block size; an NVMe command must fit the queue's "
            "max_hw_sectors_kb and, where its memory is scattered pages, max_segments"
        ),
        "ENODEV": "the drive was removed or has failed; open it again once it is back",
        "EOPNOTSUPP": _NO_PASSTHROUGH,
        "EFAULT": (
            "the memory cannot be pinned for the drive: it is not mapped, not writable, or a PFN "
            "mapping such as a dma-buf's mmap; use peer memory with struct pages (P2PDMA) or host "
            "memory"
        ),
        "ECANCELED": "the read was cancelled before the drive took it; submit it again",
        # nvme_uring_task_cb: a request that the driver itself gave up on.
        "EINTR": (
            "the driver gave up on the command: the controller was reset or did not answer in "
            "time; see the kernel log, then submit it again"
        ),
        "EAGAIN": "the kernel was short of requests or memory; submit again, with fewer in flight",
        "EACCES": _DENIED,
        "EPERM": _DENIED,
    }.items()
    if hasattr(errno, name)
}
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)

PROFILE = "allow io_uring_setup, io_uring_enter and io_uring_register in the container's profile"
"""The remedy where a seccomp filter refuses one of them."""


def no_descriptor() -> str:
    """The limit that EMFILE and ENFILE speak of, and what to do."""
    limit = limit_text("RLIMIT_NOFILE")
    return f"no descriptor is free (RLIMIT_NOFILE is {limit}): close some, or raise `ulimit -n`"


def limit_text(name: str) -> str:
    """The soft limit of a resource, by its name in the module `resource`."""
    import resource  # not on every system

    soft, _ = resource.getrlimit(getattr(resource, name))
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def call_error(number: int, call: str, path: str | None = None) -> OSError:
    """The exception for a system call that failed; the ring's C code asks for it."""
    if number in _NO_DESCRIPTOR:
        remedy: str | None = no_descriptor()
    elif number in (errno.EPERM, errno.EACCES):
        remedy = f"a seccomp filter or security module refuses it: {PROFILE}"
    else:
        remedy = _REMEDIES.get(number)
    text = f"{os.strerror(number)}, in {call}"
    if remedy:
        text += f": {remedy}"
    return OSError(number, text) if path is None else OSError(number, text, path)


def completion_error(
    result: int,
    nbytes: int,
    expected: int,
    *,
    path: str,
    offset: int = 0,
    namespace_id: int | None = None,
    starting_lba: int = 0,
    blocks: int = 0,
    peer: bool = False,
) -> OSError:
    """The exception for one read that did not bring every byte asked for.

    `result` is the kernel's cqe->res: a negative errno, else an NVMe status where the read was a
    passthrough command, else a count of bytes. `nbytes` of `expected` bytes were read from `path`.
    A passthrough command gives `namespace_id`, `starting_lba` and `blocks`; a read of a file gives
    `offset` (bytes). `peer` says that the target was peer memory, where EINVAL has a cause of its
    own.

    Returns, never raises: an OSError of Python's own subclass for the errno, with the path; an
    `NvmeStatusError`; or a `ShortReadError`. Not for reads that succeeded: ValueError for a
    passthrough result of 0.

    >>> type(completion_error(-13, 0, 512, path="/dev/ng0n1", namespace_id=1, blocks=1))
    <class 'PermissionError'>
    """
    if result >= 0 and namespace_id is not None:
        return NvmeStatusError(
            result, path, namespace_id=namespace_id, starting_lba=starting_lba, blocks=blocks
        )
    if result >= 0:
        return ShortReadError(path, offset, expected, nbytes)

    number = -result
    if namespace_id is None:
        what = f"{expected} bytes at offset {offset}"
    else:
        what = _block_range(namespace_id, starting_lba, blocks)
    text = f"{os.strerror(number)}, reading {what}"
    remedy = _NO_PEER_ROUTE if peer and number == errno.EINVAL else _REMEDIES.get(number)
    return OSError(number, f"{text}: {remedy}" if remedy else text, path)
