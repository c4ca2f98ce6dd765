"""cuFile: NVIDIA's library that has a drive write into GPU memory, where it does so without a copy.

It copies through RAM where it can't, and says nothing. That is switched off before its driver is
opened, so that it refuses such files, and the refusal is told.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import threading
from typing import TYPE_CHECKING, Any

from gdsdirect.checks.nvidia import Nvidia, find_nvidia
from gdsdirect.host import Host
from gdsdirect.sysfs import Sysfs

if TYPE_CHECKING:
    from gdsdirect._uring_cmd import Source
    from gdsdirect.cuda import Device, DeviceMemory
    from gdsdirect.plan import Range

# Each is a way of cuFile's through RAM. Not every version knows all.
_COPYING = (
    "PROPERTIES_ALLOW_COMPAT_MODE",
    "FORCE_COMPAT_MODE",
    "PROPERTIES_POSIX_IO_MODE",
    "GDS_FALLBACK_IO",
)


class RefusedError(Exception):
    """cuFile doesn't do it, and why."""


def _module() -> Any:
    try:
        return importlib.import_module("cuda.bindings.cufile")
    except ImportError as error:  # of NumPy too, which it needs
        raise RefusedError(f"cuda.bindings.cufile can't be loaded ({error})") from None


class Library:
    """cuFile in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = False
        self._obstacle: str | None = None

    def obstacle(self) -> str | None:
        """What stands in its way on this host; None: its driver is open, and makes no copies.

        Opened at the first call, once a process, and only where the facts allow it: that takes a
        tenth of a second. It stays open until the process ends.
        """
        with self._lock:
            if not self._asked:
                self._obstacle = _obstacle()
                self._asked = True
            return self._obstacle


library = Library()


def _obstacle() -> str | None:
    nvidia = find_nvidia(Host(Sysfs()))
    closing = {mode: nvidia.closed_by(mode) for mode in (Nvidia.P2PDMA, Nvidia.NVIDIA_FS)}
    if all(closing.values()):
        fewest = min(closing.values(), key=len)
        return "; ".join(dict.fromkeys(check.why for check in fewest))
    try:
        _open()
    except RefusedError as error:
        return str(error)
    return None


def _open() -> None:
    """Open the driver, or RefusedError. Everything that the library raises is a refusal: it is no
    error where a read can go another way."""
    module = _module()
    try:
        for name in _COPYING:
            parameter = getattr(module.BoolConfigParameter, name, None)
            if parameter is not None:
                _switch_off(module, parameter)
        module.driver_open()
        # Only now are the settings read that are in files: the library may tell another value.
        for name in _COPYING[:2]:
            if module.get_parameter_bool(getattr(module.BoolConfigParameter, name)):
                raise RefusedError(f"cuFile's mode that copies can't be switched off ({name})")
    except (module.cuFileError, RuntimeError) as error:
        raise RefusedError(f"cuFile's driver can't be opened without copies: {error}") from None


def _switch_off(module: Any, parameter: int) -> None:
    """Set a parameter, whatever it is told to be: before the driver is open, all seem to be off."""
    try:
        module.set_parameter_bool(parameter, False)
    except module.cuFileError:
        # The library doesn't know it, or somebody else has opened the driver. In both cases what
        # counts is what it is then.
        if module.get_parameter_bool(parameter):
            raise


class Handle:
    """A file as cuFile knows it, from its first read by cuFile until the file is closed."""

    def __init__(self, source: Source) -> None:
        """`source` is open with O_DIRECT. RefusedError where cuFile doesn't take it."""
        module = _module()
        self._path = source.path
        self._lock = threading.Lock()
        self._readers = 0
        self._closed = False
        description = module.Descr()
        # The whole struct: NumPy gave it memory as it was.
        description.type = int(module.FileHandleType.OPAQUE_FD)
        description.fs_ops = 0
        description.handle = 0
        # A descriptor of its own: the file may be closed while another thread's read is under way.
        self._fd = os.dup(source.fileno())
        description.handle.fd = self._fd
        try:
            self._handle: int | None = module.handle_register(int(description))
        except module.cuFileError as error:
            os.close(self._fd)
            raise RefusedError(f"cuFile doesn't take this file without a copy: {error}") from None

    def read(self, memory: DeviceMemory, wanted: Range, device: Device) -> int:
        """Read into GPU memory, and wait; the bytes that came, fewer only at the file's end.

        RefusedError where cuFile can't, an OSError where the drive or the kernel fails.
        """
        with self._lock:
            if self._closed:
                raise ValueError(f"{self._path} is closed")
            self._readers += 1
        try:
            with device.current():
                return self._read(memory, wanted)
        finally:
            with self._lock:
                self._readers -= 1
            self._give_back()

    def _read(self, memory: DeviceMemory, wanted: Range) -> int:
        offset, size, target = wanted
        done = 0
        while done < size:
            came = self._read_some(memory.address, size - done, offset + done, target + done)
            if came == 0:
                break
            done += came
        return done

    def _read_some(self, address: int, size: int, offset: int, target: int) -> int:
        module = _module()
        try:
            came: int = module.read(self._handle, address, size, offset, target)
        except module.cuFileError as error:
            raise RefusedError(f"cuFile refused to read: {error}") from None
        except ValueError as error:
            # The binding has an errno, and looks for it among cuFile's own numbers in vain.
            raise self._error(str(error), offset, size) from None
        if came < 0:  # CUfileOpError, negated
            raise RefusedError(f"cuFile refused to read: {module.OpError(-came)!r}")
        return came

    def _error(self, text: str, offset: int, size: int) -> OSError:
        first = text.split()[0]
        number = int(first) if first.isdigit() else errno.EIO
        what = f"{os.strerror(number)}, reading {size} bytes at offset {offset} by cuFile"
        return OSError(number, what, self._path)

    def close(self) -> None:
        """Take the file from cuFile, once nobody reads it."""
        self._closed = True
        self._give_back()

    def _give_back(self) -> None:
        with self._lock:
            if not self._closed or self._readers or self._handle is None:
                return
            handle, self._handle = self._handle, None
        with contextlib.suppress(Exception):  # nothing that a caller could do about it
            _module().handle_deregister(handle)
        os.close(self._fd)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()
