"""Exception types, NVMe status names, and the text of failed reads."""

from __future__ import annotations

import copy
import doctest
import errno
import pickle
import sys

import pytest

from gdsdirect import errors
from gdsdirect.errors import (
    NvmeStatusError,
    RingUnavailableError,
    ShortReadError,
    completion_error,
    ring_module,
    status_name,
)


def status_error(status: int = 0x281) -> NvmeStatusError:
    return NvmeStatusError(status, "/dev/ng0n1", namespace_id=1, starting_lba=8, blocks=8)


def test_examples() -> None:
    assert doctest.testmod(errors).failed == 0
    assert doctest.testmod(errors).attempted > 0


@pytest.mark.parametrize(
    ("sct", "sc", "name"),
    [
        (0, 0x00, "Successful Completion"),
        (0, 0x02, "Invalid Field in Command"),
        (0, 0x13, "PRP Offset Invalid"),
        (0, 0x80, "LBA Out of Range"),
        (0, 0x84, "Format In Progress"),
        (1, 0x0A, "Invalid Format"),
        (1, 0x81, "Invalid Protection Information"),
        (1, 0xB8, "Zone Boundary Error"),
        (2, 0x81, "Unrecovered Read Error"),
        (2, 0x87, "Deallocated or Unwritten Logical Block"),
        (3, 0x70, "Host Pathing Error"),
        (7, 0x00, "Vendor specific status"),
        (7, 0xFF, "Vendor specific status"),
        (0, 0xC0, "Vendor specific status"),
        (2, 0xFF, "Vendor specific status"),
        (0, 0x17, "Unknown status"),
        (2, 0x00, "Unknown status"),
        (4, 0x00, "Unknown status"),
        (5, 0xC0, "Unknown status"),
    ],
)
def test_status_name(sct: int, sc: int, name: str) -> None:
    assert status_name(sct, sc) == name


def test_status_name_takes_every_status() -> None:
    names = {status_name(sct, sc) for sct in range(8) for sc in range(256)}
    assert len(names) > 130
    assert all(name and name == name.strip() for name in names)


@pytest.mark.parametrize(
    ("status", "sct", "sc", "do_not_retry", "more"),
    [
        (0x281, 2, 0x81, False, False),
        (0x4080, 0, 0x80, True, False),
        (0x2281, 2, 0x81, False, True),
        (0x6370, 3, 0x70, True, True),
        (0x7FFF, 7, 0xFF, True, True),
        (0x0001, 0, 0x01, False, False),
        (0x1902, 1, 0x02, False, False),  # Command Retry Delay, bits 12:11, is no part of the SCT
    ],
)
def test_status_is_taken_apart(
    status: int, sct: int, sc: int, do_not_retry: bool, more: bool
) -> None:
    error = status_error(status)
    assert (error.status, error.sct, error.sc) == (status, sct, sc)
    assert (error.do_not_retry, error.more) == (do_not_retry, more)
    assert error.name == status_name(sct, sc)


def test_status_error_is_an_oserror_with_its_context() -> None:
    error = status_error()
    assert isinstance(error, OSError)
    assert (error.errno, error.filename, error.namespace) == (
        errno.EIO,
        "/dev/ng0n1",
        "/dev/ng0n1",
    )
    assert (error.namespace_id, error.starting_lba, error.blocks) == (1, 8, 8)


def test_status_message() -> None:
    assert str(status_error(0x4281)) == (
        "/dev/ng0n1: NVMe status 0x281, Unrecovered Read Error (SCT 2, SC 0x81), "
        "reading LBA 8..15 of namespace 1; the drive says do not retry"
    )
    assert "do not retry" not in str(status_error(0x281))
    assert "error log" not in str(status_error(0x4281))
    assert str(status_error(0x2281)).endswith("; the drive's error log (nvme error-log) says more")


def test_message_of_an_unknown_status_has_its_numbers() -> None:
    assert "NVMe status 0x417, Unknown status (SCT 4, SC 0x17)" in str(status_error(0x417))


def test_message_of_a_single_block() -> None:
    error = NvmeStatusError(0x281, "ng", namespace_id=3, starting_lba=2**64 - 1, blocks=1)
    assert str(error).endswith("reading LBA 18446744073709551615 of namespace 3")


@pytest.mark.parametrize("status", [0, -5, -22])
def test_an_errno_is_never_decoded_as_a_status(status: int) -> None:
    with pytest.raises(ValueError, match="not an NVMe error status"):
        status_error(status)


@pytest.mark.parametrize("error", [status_error(0x6281), ShortReadError("/data", 4096, 512, 100)])
def test_errors_survive_pickle_and_copy(error: OSError) -> None:
    error.add_note("while loading layer 3")
    copies = [
        *(pickle.loads(pickle.dumps(error, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)),
        copy.copy(error),
        copy.deepcopy(error),
    ]
    for other in copies:
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert vars(other) == vars(error)
        assert (other.errno, other.strerror, other.filename) == (
            error.errno,
            error.strerror,
            error.filename,
        )


def test_short_read() -> None:
    error = ShortReadError("/data/model", 8192, 4096, 512)
    assert (error.errno, error.filename) == (errno.EIO, "/data/model")
    assert (error.offset, error.expected, error.nbytes) == (8192, 4096, 512)
    assert str(error) == (
        "/data/model: read 512 of 4096 bytes at offset 8192; "
        "the file ends there or the device stopped early"
    )


def test_completion_of_a_command_with_a_status() -> None:
    error = completion_error(
        0x4281, 0, 4096, path="/dev/ng0n1", namespace_id=1, starting_lba=8, blocks=8
    )
    assert isinstance(error, NvmeStatusError)
    assert str(error) == str(status_error(0x4281))


@pytest.mark.parametrize("result", [0, 100])
def test_completion_of_a_file_read_that_is_short(result: int) -> None:
    error = completion_error(result, result, 512, path="/data", offset=7)
    assert isinstance(error, ShortReadError)
    assert (error.filename, error.offset, error.expected, error.nbytes) == ("/data", 7, 512, result)


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.EREMOTEIO, OSError, "do not share a PCIe switch"),
        (errno.EINVAL, OSError, "multiples of the logical block size"),
        (errno.ENODEV, OSError, "drive was removed"),
        (errno.EOPNOTSUPP, OSError, "not an NVMe generic character device"),
        (errno.EFAULT, OSError, "PFN mapping"),
        (errno.ECANCELED, OSError, "cancelled"),
        (errno.EINTR, InterruptedError, "controller was reset"),
        (errno.EAGAIN, BlockingIOError, "fewer in flight"),
        (errno.EACCES, PermissionError, "not allowed"),
        (errno.EPERM, PermissionError, "CAP_SYS_ADMIN"),
    ],
)
def test_kernel_errors_have_their_subclass_path_and_remedy(
    number: int, kind: type[OSError], remedy: str
) -> None:
    error = completion_error(
        -number, 0, 4096, path="/dev/ng0n1", namespace_id=2, starting_lba=16, blocks=8
    )
    assert type(error) is kind
    assert (error.errno, error.filename) == (number, "/dev/ng0n1")
    assert "LBA 16..23 of namespace 2" in str(error)
    assert remedy in str(error)


def test_einval_with_peer_memory_has_a_cause_of_its_own() -> None:
    host = completion_error(-errno.EINVAL, 0, 512, path="f", offset=0)
    peer = completion_error(-errno.EINVAL, 0, 512, path="f", offset=0, peer=True)
    assert "PCIe switch" in str(peer)
    assert "PCIe switch" not in str(host)
    other = completion_error(-errno.ENODEV, 0, 512, path="f", offset=0, peer=True)
    assert "PCIe switch" not in str(other)


def test_kernel_error_without_a_remedy_still_says_what_was_read() -> None:
    error = completion_error(-errno.EIO, 0, 4096, path="/data", offset=8192)
    assert str(error) == (
        "[Errno 5] Input/output error, reading 4096 bytes at offset 8192: '/data'"
    )


def test_ring_module_without_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdsdirect._uring_cmd", None)
    with pytest.raises(RingUnavailableError, match="liburing-dev") as raised:
        ring_module()
    assert isinstance(raised.value, RuntimeError)
    assert isinstance(raised.value.__cause__, ImportError)
    assert "GDSDIRECT_URING_CMD=0" in str(raised.value)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_ring_module_is_the_extension() -> None:
    assert ring_module().__name__ == "gdsdirect._uring_cmd"
