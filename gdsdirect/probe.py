"""What nvidia-fs, the kernel module of NVIDIA GPUDirect Storage, says about this host.

`probe` answers from one file and never raises. The module's presence is one fact among several
(peer memory works without it), and no answer here promises that a given read will go direct.

    >>> match probe(stats_path="/proc/no-such-module/stats"):
    ...     case Available(stats):
    ...         print(stats.splitlines()[0])
    ...     case Unavailable(reason, errno):
    ...         print(reason.name, errno)
    ...     case FeatureDisabled():
    ...         print("gdsdirect was installed without its io_uring part")
    NOT_INSTALLED 2
"""

from __future__ import annotations

import errno as errno_codes
import os
import stat
import sys
from dataclasses import dataclass
from enum import Enum

_STATS_PATH = "/proc/driver/nvidia-fs/stats"
_STATS_LIMIT = 1 << 20  # bytes; the real file has about 2,000
_PIECE = 1 << 16  # bytes asked of one read()


class UnavailableReason(Enum):
    """Why `probe` has no statistics to show; `str()` gives the cause and what to do about it."""

    NOT_INSTALLED = (
        "There is no statistics file, so the nvidia-fs kernel module is not loaded: install it "
        "(package nvidia-fs-dkms) and run `modprobe nvidia_fs`, or use peer memory, which works "
        "without it."
    )
    PERMISSION_DENIED = (
        "The statistics file may not be read by this process: nvidia-fs makes it readable by "
        "everyone, so look for a container or security policy that hides /proc/driver, or run as "
        "a user who may read it."
    )
    EMPTY = (
        "The statistics file has no text, as when nvidia-fs is half loaded or something else was "
        "mounted over it: reload the module (`modprobe -r nvidia_fs`, `modprobe nvidia_fs`) and "
        "look for its messages in the kernel log."
    )
    TOO_LARGE = (
        "The statistics file is larger than 1 MiB, which nvidia-fs never writes: check that "
        "stats_path names the module's own file."
    )
    NOT_TEXT = (
        "The statistics file is not UTF-8 text, which nvidia-fs always writes: check that "
        "stats_path names the module's own file."
    )
    READ_FAILED = (
        "The statistics file could not be read: check that stats_path names a regular file, and "
        "see errno for the system's reason."
    )

    def __str__(self) -> str:
        return self.value


class GpuDirectCapability:
    """What the host offers: `Available`, `Unavailable` or `FeatureDisabled`."""

    __slots__ = ()

    def is_available(self) -> bool:
        """True for `Available` only."""
        return isinstance(self, Available)

    @staticmethod
    def probe(
        *, stats_path: str | bytes | os.PathLike[str] | os.PathLike[bytes] = _STATS_PATH
    ) -> Available | Unavailable | FeatureDisabled:
        """Ask nvidia-fs, by the text of `stats_path`. Never raises, whatever `stats_path` is.

        At most 1 MiB + 1 byte is read, however large the file is or says it is. What is not a
        regular file is never read, nor waited for: READ_FAILED, with EISDIR for a directory and
        EINVAL for a FIFO, socket or device, whose bytes belong to someone else.
        """
        if sys.platform != "linux" or not _ring_is_built():
            return FeatureDisabled()
        try:
            text = read_bounded(os.fspath(stats_path), _STATS_LIMIT + 1)
            if len(text) > _STATS_LIMIT:
                return Unavailable(UnavailableReason.TOO_LARGE)
            stats = text.decode("utf-8")
        except FileNotFoundError as error:
            return Unavailable(UnavailableReason.NOT_INSTALLED, error.errno)
        except PermissionError as error:
            return Unavailable(UnavailableReason.PERMISSION_DENIED, error.errno)
        except OSError as error:
            return Unavailable(UnavailableReason.READ_FAILED, error.errno)
        except UnicodeDecodeError:
            return Unavailable(UnavailableReason.NOT_TEXT)
        except Exception:  # an unusable stats_path can raise anything, and a probe nothing
            return Unavailable(UnavailableReason.READ_FAILED)
        if not stats.strip():
            return Unavailable(UnavailableReason.EMPTY)
        return Available(stats)


@dataclass(frozen=True, slots=True)
class Available(GpuDirectCapability):
    """nvidia-fs is loaded; `stats` is its statistics file, as read."""

    stats: str


@dataclass(frozen=True, slots=True)
class Unavailable(GpuDirectCapability):
    """nvidia-fs gave no statistics, for `reason`; `errno` is the system's, where it gave one."""

    reason: UnavailableReason
    errno: int | None = None


@dataclass(frozen=True, slots=True)
class FeatureDisabled(GpuDirectCapability):
    """This is not Linux, or gdsdirect was built without its io_uring part."""


probe = GpuDirectCapability.probe


def read_bounded(path: str | bytes, limit: int) -> bytes:
    """The first `limit` bytes of the regular file `path`, or all of them if there are fewer.

    st_size is not asked: it is 0 for files in /proc. OSError, with EISDIR or EINVAL for what is not
    a regular file, which is neither read nor waited for.
    """
    # Asked before the open as well as after it: opening a device can do things (a watchdog starts),
    # and what the name stands for can change in between, for which O_NONBLOCK keeps the open short.
    _require_regular(os.stat(path).st_mode, path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(os.fstat(fd).st_mode, path)
        content = bytearray()
        while piece := os.read(fd, min(_PIECE, limit - len(content))):
            content += piece
    finally:
        os.close(fd)
    return bytes(content)


def _require_regular(mode: int, path: str | bytes) -> None:
    if not stat.S_ISREG(mode):
        number = errno_codes.EISDIR if stat.S_ISDIR(mode) else errno_codes.EINVAL
        raise OSError(number, os.strerror(number), path)


def _ring_is_built() -> bool:
    # Found, not imported: loading the extension to answer a question would cost more than the
    # answer, and fail where liburing is missing, which is another error (errors.ring_module).
    import importlib.util

    try:
        return importlib.util.find_spec("gdsdirect._uring_cmd") is not None
    except (ImportError, ValueError):  # ValueError: a module put into sys.modules without a spec
        return False
