"""CUDA's driver, as much of it as reads into GPU memory need: contexts, streams, events, copies.

NVIDIA's package cuda-bindings is loaded at the first call, and nothing of CUDA before it. Whatever
context a thread has as its current one, it has again when a call returns.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from gdsdirect.errors import CudaError, CudaUnavailableError, ring_module
from gdsdirect.sysfs import Sysfs

if TYPE_CHECKING:
    from typing_extensions import Buffer, TypeIs

    from gdsdirect._uring_cmd import Memory

LEGACY = 1
"""The default stream as a handle (CU_STREAM_LEGACY), which 0 stands for too."""

_CUDA = 2  # kDLCUDA, dlpack.h

# linux/mempolicy.h, and the system call's number, for which the C library has no function.
_MPOL_PREFERRED = 1
_MBIND = {"x86_64": 237, "aarch64": 235}


# ---- The driver


def start() -> Any:
    """The module cuda.bindings.driver, ready; CudaUnavailableError says what is in the way."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise CudaUnavailableError(
            f"NVIDIA's package cuda-bindings is missing ({error}): pip install 'gdsdirect[cuda]'"
        ) from None

    try:
        _call(driver, "cuInit", 0)
    except CudaError as error:
        raise CudaUnavailableError(
            f"{error.text} ({error.name}): see whether nvidia-smi shows a GPU, and whether the "
            "driver is as new as cuda-bindings"
        ) from None
    except RuntimeError as error:  # what cuda-bindings raises where there is no library to load
        raise CudaUnavailableError(
            f"NVIDIA's driver library libcuda.so.1 can't be loaded ({error}): install the driver, "
            "or give the container the GPU"
        ) from None
    return driver


def _call(driver: Any, name: str, *arguments: object) -> Any:
    """A function of the driver's: what it returns, or CudaError for what is no success."""
    status, *values = getattr(driver, name)(*arguments)
    if int(status) != 0:
        raise CudaError(name, int(status), *_described(driver, status))
    return values[0] if len(values) == 1 else None


def _described(driver: Any, status: object) -> tuple[str, str]:
    """Name and text of a CUresult."""
    found = []
    for ask in (driver.cuGetErrorName, driver.cuGetErrorString):
        _, text = ask(status)
        found.append(text.decode() if text else "unknown")
    return found[0], found[1]


class Device:
    """A GPU, by its ordinal: that of CUDA_VISIBLE_DEVICES, as torch and CuPy have it too.

    Its primary context, which those use as well, is held from the first call on until the process
    ends. ValueError where there is no such ordinal.
    """

    def __init__(self, ordinal: int) -> None:
        self.driver = start()
        count = self.call("cuDeviceGetCount")
        if not 0 <= ordinal < count:
            raise ValueError(
                f"device is {ordinal}: CUDA shows {count} of them here, so give one below that"
            )
        self.ordinal = ordinal
        self.pid = os.getpid()
        self._handle = self.call("cuDeviceGet", ordinal)
        self._context = self.call("cuDevicePrimaryCtxRetain", self._handle)

    def call(self, name: str, *arguments: object) -> Any:
        """A function of the driver's: what it returns, or CudaError for what is no success."""
        return _call(self.driver, name, *arguments)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """This device's context as the thread's current one, for the time being."""
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    @cached_property
    def pci_address(self) -> str:
        """As sysfs spells it, such as "0000:3b:00.0"."""
        text: bytes = self.call("cuDeviceGetPCIBusId", 13, self._handle)
        return text.split(b"\0")[0].decode().strip().lower()

    @cached_property
    def numa_node(self) -> int | None:
        """The node that it is next to; None where the kernel knows none."""
        node = Sysfs().read_int("/sys/bus/pci/devices", self.pci_address, "numa_node")
        return node if node is not None and node >= 0 else None

    def forked(self) -> bool:
        """Whether this is a child of the process that CUDA was started in, which can't use it."""
        return self.pid != os.getpid()

    def __repr__(self) -> str:
        return f"<Device {self.ordinal}, {self.pci_address}>"


_devices: dict[int, Device] = {}
_devices_lock = threading.Lock()


def device(ordinal: int) -> Device:
    """The device with this ordinal; CudaUnavailableError where there is no CUDA."""
    with _devices_lock:
        found = _devices.get(ordinal)
        if found is None:
            found = _devices[ordinal] = Device(ordinal)
    if found.forked():
        raise CudaUnavailableError(
            "this process was forked from one that uses CUDA, which doesn't go through a fork: "
            "start it by multiprocessing's method spawn"
        )
    return found


def _released(device: Device, name: str, handle: object) -> None:
    """Give something of the driver's back, from wherever the collector runs."""
    if not device.forked() and not sys.is_finalizing():
        with contextlib.suppress(CudaError), device.current():
            device.call(name, handle)


# ---- Streams and events


class Event:
    """A place in a stream: done once all that was put into the stream before it is done.

    `handle` is the CUevent as an int, for cuStreamWaitEvent and the like; it is valid as long as
    this object is there.
    """

    def __init__(self, device: Device, stream: int) -> None:
        """`device` is that of the stream, and current."""
        self._device = device
        self._kept: list[object] = []
        flags = device.driver.CUevent_flags
        # Blocking: who waits for it leaves the processor to others.
        self._event = device.call(
            "cuEventCreate",
            int(flags.CU_EVENT_BLOCKING_SYNC) | int(flags.CU_EVENT_DISABLE_TIMING),
        )
        weakref.finalize(self, _released, device, "cuEventDestroy", self._event).atexit = False
        device.call("cuEventRecord", self._event, stream)

    @property
    def handle(self) -> int:
        """The CUevent."""
        return int(self._event)

    def keep(self, obj: object) -> None:
        """Hold what the work before this needs, until it was seen to be done."""
        self._kept.append(obj)

    def query(self) -> bool:
        """Whether it is done; CudaError where something before it failed."""
        try:
            with self._device.current():
                self._device.call("cuEventQuery", self._event)
        except CudaError as error:
            if error.name == "CUDA_ERROR_NOT_READY":
                return False
            raise
        self._kept.clear()
        return True

    def synchronize(self) -> None:
        """Wait until it is done; CudaError where something before it failed."""
        with self._device.current():
            self._device.call("cuEventSynchronize", self._event)
        self._kept.clear()

    def __repr__(self) -> str:
        return f"<Event {self.handle:#x} of device {self._device.ordinal}>"


class Copies:
    """Copies from page-locked memory of the host into GPU memory, one after the other on a stream.

    On `stream`, the handle of somebody else's, or else on one of its own.
    """

    def __init__(self, device: Device, stream: int | None = None) -> None:
        self._device = device
        self._own: object = None
        if stream is None:
            flags = int(device.driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            with device.current():
                self._own = device.call("cuStreamCreate", flags)
            weakref.finalize(self, _released, device, "cuStreamDestroy", self._own).atexit = False
            stream = int(self._own)  # type: ignore[call-overload]
        self.stream = stream

    def follow(self, stream: int) -> None:
        """What is copied from now on comes after all that `stream` has now."""
        if stream == self.stream:
            return
        with self._device.current():
            event = Event(self._device, stream)
            self._device.call("cuStreamWaitEvent", self.stream, event.handle, 0)

    def copy(self, source: int, target: int, nbytes: int) -> Event:
        """Start to copy from address `source` to address `target`; the event tells when it is done.

        Where this raises, the copy may be under way all the same: see `drain`.
        """
        with self._device.current():
            self._device.call("cuMemcpyHtoDAsync", target, source, nbytes, self.stream)
            return Event(self._device, self.stream)

    def mark(self) -> Event:
        """An event for all that was started so far."""
        with self._device.current():
            return Event(self._device, self.stream)

    def drain(self) -> None:
        """Wait until nothing is under way any more."""
        with self._device.current():
            self._device.call("cuStreamSynchronize", self.stream)


def stream_handle(stream: object) -> int:
    """The handle of a stream: an int, or what torch, CuPy and NVIDIA's protocol say of theirs.

    `.cuda_stream` (torch), `.ptr` (CuPy), `__cuda_stream__()`, which gives a version and the
    handle. TypeError for anything else.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        handle = stream
    elif hasattr(stream, "__cuda_stream__"):
        version, handle = stream.__cuda_stream__()
        if version != 0:
            raise TypeError(f"__cuda_stream__ of {stream!r} has version {version}: 0 is known")
    elif hasattr(stream, "cuda_stream"):
        handle = stream.cuda_stream
    elif hasattr(stream, "ptr"):
        handle = stream.ptr
    else:
        raise TypeError(
            f"stream is {stream!r}: give its handle, or an object of torch's, CuPy's or with "
            "__cuda_stream__"
        )
    if handle < 0:
        raise ValueError(f"stream is {handle}: a handle is 0 or more")
    return int(handle) or LEGACY  # as an argument of __dlpack__, 0 is forbidden


# ---- Host memory that a GPU sees


class Pinned:
    """Memory of the host, page-locked and mapped into GPUs as long as this object is there.

    `address` is where the device sees it. `memory` is what it is, and is kept.
    """

    def __init__(self, memory: Memory, ordinal: int) -> None:
        on = device(ordinal)
        driver = on.driver
        flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
        whole = -(-memory.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE  # of the mapping behind it
        if on.numa_node is not None:
            _prefer_node(on.numa_node, memory.address, whole)
        with on.current():
            on.call("cuMemHostRegister", memory.address, whole, flags)
            # From here on, so that it is undone whatever comes next. At the interpreter's end it
            # runs too, while the driver is there still.
            self._undo = weakref.finalize(self, _unregister, on, memory.address, memory)
            self.address = int(on.call("cuMemHostGetDevicePointer", memory.address, 0))


def _unregister(device: Device, address: int, memory: Memory) -> None:
    """`memory` is an argument so that it outlives its registration."""
    if not device.forked():
        with contextlib.suppress(CudaError), device.current():
            device.call("cuMemHostUnregister", address)


def _prefer_node(node: int, address: int, nbytes: int) -> None:
    """Have pages that nobody touched yet come from this NUMA node, where the kernel does that."""
    import ctypes  # which takes longer to load than all of gdsdirect's own modules

    number = _MBIND.get(os.uname().machine)
    if number is None:
        return
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (node // bits + 1))()
    mask[node // bits] = 1 << node % bits
    # One bit more than there are: the kernel counts one less (mm/mempolicy.c, get_nodes).
    ctypes.CDLL(None).syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_int(_MPOL_PREFERRED),
        mask,
        ctypes.c_ulong(bits * len(mask) + 1),
        ctypes.c_uint(0),
    )


# ---- GPU memory that somebody gave


class DeviceMemory:
    """GPU memory of an object's: contiguous, writable, and kept as long as this is there.

    `address` and `nbytes` are what it has, `device` the ordinal of its GPU. It may be written into
    once the work is done that the stream `after` has when it is asked for.
    """

    def __init__(self, owner: object, address: int, nbytes: int, after: int) -> None:
        self._owner = owner
        self.address = address
        self.nbytes = nbytes
        self.after = after
        self.device = _device_of(address)

    @classmethod
    def of(cls, obj: Any, *, stream: int = LEGACY) -> DeviceMemory:
        """The memory of a torch tensor, a CuPy array, or anything with `__cuda_array_interface__`.

        By DLPack where the object has that, which makes its work on other streams come before what
        is on `stream`. BufferError for memory that is read-only, not contiguous or not GPU memory,
        ValueError for empty memory.

        >>> DeviceMemory.of(torch.empty(1 << 20, device="cuda"))  # doctest: +SKIP
        <DeviceMemory 4194304 bytes at 0x7f2c40000000 of device 0>
        """
        refused: Exception | None = None
        if hasattr(obj, "__dlpack_device__"):
            kind = int(obj.__dlpack_device__()[0])
            if kind != _CUDA:
                raise _unfit(obj, f"on a device of DLPack's type {kind}: give memory of CUDA's, 2")
            try:
                capsule = _capsule_of(obj, stream)
            except (BufferError, RuntimeError, TypeError) as error:
                # Such as torch's for the tensor of a GPU that isn't its current one.
                refused = error
            else:
                return cls._of_capsule(obj, capsule, stream)
        try:
            interface = obj.__cuda_array_interface__
        except Exception as error:
            cause = refused or error
            raise _unfit(obj, f"not given away: {cause}") from cause
        return cls._of_interface(obj, interface, stream)

    @classmethod
    def _of_capsule(cls, obj: object, capsule: object, stream: int) -> DeviceMemory:
        keeper, address, nbytes, contiguous, readonly = ring_module().take_dlpack(capsule)
        _check_shape(obj, nbytes, contiguous=contiguous, readonly=readonly)
        return cls(keeper, address, nbytes, stream)

    @classmethod
    def _of_interface(cls, obj: object, interface: dict[str, Any], stream: int) -> DeviceMemory:
        address, readonly = interface["data"]
        itemsize = int(interface["typestr"][2:])
        contiguous, nbytes = True, itemsize
        strides = interface.get("strides")
        for dimension in reversed(range(len(interface["shape"]))):
            length = interface["shape"][dimension]
            if strides is not None and length > 1 and strides[dimension] != nbytes:
                contiguous = False
            nbytes *= length
        _check_shape(obj, nbytes, contiguous=contiguous, readonly=readonly)
        # Without a stream the producer has nothing that needs waiting for, or, as torch, doesn't
        # tell.
        return cls(obj, address, nbytes, interface.get("stream") or stream)

    def __repr__(self) -> str:
        return f"<DeviceMemory {self.nbytes} bytes at {self.address:#x} of device {self.device}>"


class OnGpu(Protocol):
    """GPU memory, as torch, CuPy and others give it; DLPack alone will do too."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


def is_on_gpu(obj: Buffer | OnGpu) -> TypeIs[OnGpu]:
    """Whether an object says that its memory is not the host's. Nothing of CUDA is loaded."""
    if hasattr(obj, "__dlpack_device__"):
        return int(obj.__dlpack_device__()[0]) not in _HOST
    return hasattr(obj, "__cuda_array_interface__")


_HOST = (1, 3, 11)  # kDLCPU, kDLCUDAHost, kDLROCMHost


def _capsule_of(obj: Any, stream: int) -> object:
    try:
        return obj.__dlpack__(stream=stream, max_version=(1, 1))
    except TypeError:  # a producer of before DLPack 1
        return obj.__dlpack__(stream=stream)


def _check_shape(obj: object, nbytes: int, *, contiguous: bool, readonly: bool) -> None:
    if readonly:
        raise _unfit(obj, "read-only: give memory that may be written")
    if nbytes == 0:
        raise ValueError(f"the memory of this {type(obj).__name__} is empty: give at least 1 byte")
    if not contiguous:
        raise _unfit(obj, "not contiguous in C order: give .contiguous(), and copy from there")


def _unfit(obj: object, what: str) -> BufferError:
    return BufferError(f"the memory of this {type(obj).__name__} is {what}")


def _device_of(address: int) -> int:
    """The ordinal of the GPU whose memory is at an address."""
    driver = start()
    attributes = driver.CUpointer_attribute
    device_memory = int(driver.CUmemorytype.CU_MEMORYTYPE_DEVICE)
    try:
        kind = _call(
            driver, "cuPointerGetAttribute", attributes.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address
        )
    except CudaError as error:
        raise BufferError(f"{address:#x} is no address of CUDA's: {error}") from None
    if int(kind) != device_memory:
        raise BufferError(
            f"{address:#x} is memory of the host's that a GPU sees: read into its GpuMappedBuffer"
        )
    name = attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(_call(driver, "cuPointerGetAttribute", name, address))
