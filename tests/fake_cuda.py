"""A stand-in for CUDA's driver and cuFile, which can't exist without a GPU, and nothing more.

It has the functions of cuda.bindings.driver and cuda.bindings.cufile that gdsdirect calls. Device
memory is memory of this process that gdsdirect never learns the place of: addresses of it begin at
`FIRST_ADDRESS`, where nothing is mapped. A thread for each stream does what was put into it, in
order, after a delay. What it shows is that gdsdirect calls the driver in a right order and with
right arguments; not that the real one does what its manual says. tests/gpu does that.

It is strict: an address that isn't registered or allocated, a call without a current context, a
handle that is unknown or was destroyed is an error of the driver's, as the manual has it, or where
that leaves it undefined an AssertionError, which `check` raises again at the end.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

FIRST_ADDRESS = 0x7000_0000_0000_0000  # no address of a process on any machine that runs this
PCI_ADDRESSES = ("0000:3B:00.0", "0000:AF:00.0")


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713


class Failure(Exception):
    """A CUresult on its way to whoever called."""

    def __init__(self, result: CUresult) -> None:
        self.result = result


class Handle:
    """As the binding's CUstream, CUevent and CUcontext: an object that int() takes."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


class Stream:
    """Work in order, done by a thread of its own."""

    def __init__(self, driver: FakeDriver, number: int, context: int) -> None:
        self.number, self.context = number, context
        self._driver = driver
        self._work: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self.put, self.done = 0, 0
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, work: Callable[[], None]) -> None:
        with self._changed:
            self._work.append(work)
            self.put += 1
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work or self._ended)
                if not self._work:
                    return
                work = self._work.pop(0)
            try:
                work()
            except BaseException as error:
                self._driver.wrong.append(error)
            with self._changed:
                self.done += 1
                self._changed.notify_all()

    def wait(self, count: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.done >= count, timeout=60):
                raise AssertionError(f"{count - self.done} works of a stream don't come to an end")

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class FakeDriver:
    """The state of it all. `module` is what takes the place of cuda.bindings.driver.

    `delay` is the seconds that a copy takes. `gate`, when it is closed by `hold`, lets no copy
    through. `fail` maps a function's name to how many calls of it go well, and the CUresult of the
    next ones.
    """

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices
        self.delay = 0.0005
        self.fail: dict[str, tuple[int, CUresult]] = {}
        self.calls: dict[str, int] = {}
        self.wrong: list[BaseException] = []
        self.registered: dict[int, int] = {}
        self.allocated: dict[int, tuple[int, Any]] = {}
        self.events: dict[int, tuple[int, Stream | None, int]] = {}
        self.streams: dict[int, Stream] = {}
        self.waits: list[tuple[int, int]] = []
        self.copies = 0
        self.pending = 0
        self.most_pending = 0
        self._contexts: dict[int, list[int]] = {}
        self._gate = threading.Event()
        self._gate.set()
        self._lock = threading.RLock()
        self._numbers = itertools.count(0x1000, 0x10)
        self._next_address = FIRST_ADDRESS
        self._ready = False
        self.module = self._make_module()
        self.legacy = Stream(self, 1, 0)
        self.streams[1] = self.legacy

    # ---- What tests do

    def allocate(self, nbytes: int, device: int = 0) -> int:
        """Device memory; its address."""
        with self._lock:
            address = self._next_address | 256
            self._next_address += (nbytes // 4096 + 3) * 4096
            # A byte beside it on both sides shows what is written out of bounds.
            self.allocated[address] = (device, bytearray(b"\xa5" * nbytes))
            return address

    def free(self, address: int) -> None:
        del self.allocated[address]

    def contents(self, address: int) -> bytes:
        return bytes(self.allocated[address][1])

    @contextmanager
    def hold(self) -> Iterator[None]:
        """No copy gets through meanwhile."""
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def release(self) -> None:
        """Let all copies through, and wait for them."""
        self._gate.set()
        for stream in list(self.streams.values()):
            stream.wait(stream.put)

    def close_gate(self) -> None:
        self._gate.clear()

    def check(self) -> None:
        """Nothing went wrong in a stream, and no thread was left with another current context.
        Asked once nothing is under way."""
        for error in self.wrong:
            raise error
        left = {thread: stack for thread, stack in self._contexts.items() if stack}
        assert left == {}, "a context was left current"

    # ---- The module

    def _make_module(self) -> ModuleType:
        module: Any = ModuleType("cuda.bindings.driver")
        module.CUresult = CUresult
        module.CUevent_flags = SimpleNamespace(CU_EVENT_BLOCKING_SYNC=1, CU_EVENT_DISABLE_TIMING=2)
        module.CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
        module.CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_HOST=1, CU_MEMORYTYPE_DEVICE=2)
        module.CUpointer_attribute = SimpleNamespace(
            CU_POINTER_ATTRIBUTE_MEMORY_TYPE="type", CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL="ordinal"
        )
        module.CU_MEMHOSTREGISTER_PORTABLE = 1
        module.CU_MEMHOSTREGISTER_DEVICEMAP = 2
        module.cuGetErrorName = lambda status: (CUresult(0), CUresult(status).name.encode())
        module.cuGetErrorString = lambda status: (
            CUresult(0),
            CUresult(status).name.removeprefix("CUDA_ERROR_").lower().replace("_", " ").encode(),
        )
        for name in dir(self):
            if name.startswith("_cu"):
                setattr(module, name[1:], self._guarded(name[1:], getattr(self, name)))
        return module

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        def guarded(*arguments: Any) -> tuple[Any, ...]:
            with self._lock:
                count = self.calls[name] = self.calls.get(name, 0) + 1
                good, result = self.fail.get(name, (count, CUresult(0)))
                if count > good:
                    return (result, None) if name in _RETURNING else (result,)
                assert self._ready or name == "cuInit", f"{name} before cuInit"
            try:
                value = function(*arguments)
            except Failure as failure:
                return (failure.result, None) if name in _RETURNING else (failure.result,)
            return (CUresult(0), value) if name in _RETURNING else (CUresult(0),)

        return guarded

    def fail_after(self, name: str, more: int, result: CUresult) -> None:
        """Let `more` further calls go well, and no others."""
        self.fail[name] = (self.calls.get(name, 0) + more, result)

    # ---- Devices and contexts

    def _cuInit(self, flags: int) -> None:
        assert flags == 0
        if not self.devices:
            raise Failure(CUresult.CUDA_ERROR_NO_DEVICE)
        self._ready = True

    def _cuDeviceGetCount(self) -> int:
        return self.devices

    def _cuDeviceGet(self, ordinal: int) -> int:
        assert 0 <= ordinal < self.devices
        return ordinal

    def _cuDevicePrimaryCtxRetain(self, device: int) -> Handle:
        return Handle(0xC0 + device)

    def _cuDeviceGetPCIBusId(self, length: int, device: int) -> bytes:
        assert length >= 13
        return PCI_ADDRESSES[device].encode() + b"\0"

    def _stack(self) -> list[int]:
        return self._contexts.setdefault(threading.get_ident(), [])

    def _cuCtxPushCurrent(self, context: Handle) -> None:
        self._stack().append(int(context))

    def _cuCtxPopCurrent(self) -> Handle:
        return Handle(self._stack().pop())

    def _current(self) -> int:
        if not self._stack():
            raise Failure(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        return self._stack()[-1]

    # ---- Memory

    def _cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> None:
        self._current()
        assert flags == 3
        assert address % 4096 == nbytes % 4096 == 0
        ctypes.memmove(ctypes.create_string_buffer(1), address, 1)  # it is mapped, or this crashes
        with self._lock:
            for start, size in self.registered.items():
                if address < start + size and start < address + nbytes:
                    raise Failure(CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)
            self.registered[address] = nbytes

    def _cuMemHostUnregister(self, address: int) -> None:
        self._current()
        with self._lock:
            if address not in self.registered:
                raise Failure(CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)
            if self.pending:
                self.wrong.append(AssertionError("memory was unregistered with copies under way"))
            ctypes.memmove(ctypes.create_string_buffer(1), address, 1)  # it is mapped still
            del self.registered[address]

    def _cuMemHostGetDevicePointer(self, address: int, flags: int) -> Handle:
        self._current()
        assert flags == 0
        if not self._is_registered(address, 1):
            raise Failure(CUresult.CUDA_ERROR_INVALID_VALUE)
        return Handle(address + (1 << 60))

    def _is_registered(self, address: int, nbytes: int) -> bool:
        with self._lock:
            return any(
                start <= address and address + nbytes <= start + size
                for start, size in self.registered.items()
            )

    def _place(self, address: int, nbytes: int) -> tuple[int, Any, int]:
        """Device, memory and offset of a range of device memory."""
        with self._lock:
            for start, (device, memory) in self.allocated.items():
                if start <= address and address + nbytes <= start + len(memory):
                    return device, memory, address - start
        raise Failure(CUresult.CUDA_ERROR_INVALID_VALUE)

    def _cuPointerGetAttribute(self, attribute: str, address: int) -> int:
        if self._is_registered(address - (1 << 60), 1) or self._is_registered(address, 1):
            return 1 if attribute == "type" else 0
        device = self._place(address, 1)[0]
        return 2 if attribute == "type" else device

    # ---- Streams, events, copies

    def _stream(self, stream: object) -> Stream:
        found = self.streams.get(int(stream))  # type: ignore[call-overload]
        if found is None:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        return found

    def _cuStreamCreate(self, flags: int) -> Handle:
        assert flags == 1
        stream = Stream(self, next(self._numbers), self._current())
        self.streams[stream.number] = stream
        return Handle(stream.number)

    def _cuStreamDestroy(self, stream: object) -> None:
        self._current()
        found = self._stream(stream)
        del self.streams[found.number]
        found.end()

    def _cuStreamSynchronize(self, stream: object) -> None:
        self._current()
        found = self._stream(stream)
        found.wait(found.put)

    def _cuStreamWaitEvent(self, stream: object, event: int, flags: int) -> None:
        assert flags == 0
        number, behind, count = self._event(event)
        found = self._stream(stream)
        assert behind is not None
        self.waits.append((found.number, behind.number))
        found.add(lambda: behind.wait(count))
        assert number

    def _event(self, event: object) -> tuple[int, Stream | None, int]:
        found = self.events.get(int(event))  # type: ignore[call-overload]
        if found is None:
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        return found

    def _cuEventCreate(self, flags: int) -> Handle:
        self._current()
        assert flags == 3
        number = next(self._numbers)
        self.events[number] = (number, None, 0)
        return Handle(number)

    def _cuEventDestroy(self, event: object) -> None:
        self._current()
        del self.events[self._event(event)[0]]

    def _cuEventRecord(self, event: object, stream: object) -> None:
        number, _, _ = self._event(event)
        found = self._stream(stream)
        if found.context not in (0, self._current()):
            raise Failure(CUresult.CUDA_ERROR_INVALID_HANDLE)
        self.events[number] = (number, found, found.put)

    def _cuEventQuery(self, event: object) -> None:
        _, stream, count = self._event(event)
        if stream is not None and stream.done < count:
            raise Failure(CUresult.CUDA_ERROR_NOT_READY)

    def _cuEventSynchronize(self, event: object) -> None:
        _, stream, count = self._event(event)
        if stream is not None:
            stream.wait(count)

    def _cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: object) -> None:
        self._current()
        found = self._stream(stream)
        assert self._is_registered(source, nbytes), "a copy from memory that is not registered"
        assert nbytes > 0
        self._place(target, nbytes)
        with self._lock:
            self.copies += 1
            self.pending += 1
            self.most_pending = max(self.most_pending, self.pending)
        found.add(lambda: self._copy(target, source, nbytes))

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        try:
            assert self._gate.wait(60), "a copy was never let through"
            time.sleep(self.delay)
            # As late as this, so that a slot that was read into again meanwhile shows.
            assert self._is_registered(source, nbytes), "the source was unregistered before a copy"
            try:
                _, memory, offset = self._place(target, nbytes)
            except Failure:
                raise AssertionError("the target was freed before a copy") from None
            memory[offset : offset + nbytes] = ctypes.string_at(source, nbytes)
        finally:
            with self._lock:
                self.pending -= 1


_RETURNING = frozenset(
    (
        *("cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuDeviceGetPCIBusId"),
        *("cuCtxPopCurrent", "cuMemHostGetDevicePointer", "cuPointerGetAttribute"),
        *("cuStreamCreate", "cuEventCreate"),
    )
)


class Array:
    """Device memory of bytes, as CuPy gives it: by the CUDA array interface."""

    def __init__(self, driver: FakeDriver, nbytes: int, device: int = 0, **said: Any) -> None:
        self._driver = driver
        self.address = driver.allocate(nbytes, device)
        self.said = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            **said,
        }

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.said

    def contents(self) -> bytes:
        return self._driver.contents(self.address)

    def __del__(self) -> None:
        self._driver.free(self.address)


# ---- cuFile


class FakeCuFile:
    """cuda.bindings.cufile, which reads the descriptor that it is given into a FakeDriver's memory.

    `parameters` are as its settings have them. Before its driver is open it tells all of them to be
    off, as the real one does. `foreign` says that somebody else has opened it. `refuse_open` and
    `refuse` are what opening its driver and registering a file fail with, `result` is what `read`
    returns or raises instead of reading, `piece` the most bytes that it reads, and where it is
    `stubborn`, no parameter changes.
    """

    def __init__(self, driver: FakeDriver) -> None:
        self._driver = driver
        self.parameters = {1: True, 2: False, 12: True, 13: False}
        self.foreign = False
        self.opened = 0
        self.files: dict[int, int] = {}
        self.registered = 0
        self.refuse_open: int | None = None
        self.refuse: int | None = None
        self.stubborn = False
        self.result: int | Exception | None = None
        self.piece: int | None = None
        self.module = self._make_module()

    def _make_module(self) -> ModuleType:
        module: Any = ModuleType("cuda.bindings.cufile")
        module.BoolConfigParameter = SimpleNamespace(
            PROPERTIES_ALLOW_COMPAT_MODE=1,
            FORCE_COMPAT_MODE=2,
            PROPERTIES_POSIX_IO_MODE=12,
            GDS_FALLBACK_IO=13,
        )
        module.FileHandleType = SimpleNamespace(OPAQUE_FD=1)
        module.OpError = OpError
        module.cuFileError = CuFileError
        module.Descr = Descr
        module.get_parameter_bool = self._get
        module.set_parameter_bool = self._set
        module.driver_open = self._open
        module.handle_register = self._register
        module.handle_deregister = self._deregister
        module.read = self._read
        return module

    def _get(self, parameter: int) -> bool:
        return self.parameters[parameter] and bool(self.opened or self.foreign)

    def _set(self, parameter: int, value: bool) -> None:
        assert not self.opened, "a parameter was set after the driver was opened"
        if self.foreign:
            raise CuFileError(5026)
        if not self.stubborn:
            self.parameters[parameter] = value

    def _open(self) -> None:
        if not self.stubborn:
            assert not any(self.parameters.values()), "opened with a mode that copies"
        if self.refuse_open is not None:
            raise CuFileError(self.refuse_open)
        self.opened += 1

    def _register(self, description: int) -> int:
        if self.refuse is not None:
            raise CuFileError(self.refuse)
        found = ctypes.cast(description, ctypes.POINTER(_Descr)).contents
        assert (found.type, found.fs_ops) == (1, None)
        self.registered += 1
        handle = 0xF0 + self.registered
        assert found.handle.handle == found.handle.fd  # nothing left of what was there before
        self.files[handle] = found.handle.fd
        return handle

    def _deregister(self, handle: int) -> None:
        os.fstat(self.files.pop(handle))  # it is open still

    def _read(self, handle: int, base: int, size: int, offset: int, place: int) -> int:
        self._driver._current()
        if isinstance(self.result, Exception):
            raise self.result
        if self.result is not None:
            return self.result
        _, memory, start = self._driver._place(base + place, size)
        # Not by the descriptor itself, which wants aligned addresses.
        with open(f"/proc/self/fd/{self.files[handle]}", "rb") as file:
            file.seek(offset)
            data = file.read(min(size, self.piece or size))
        memory[start : start + len(data)] = data
        return len(data)


class _Union(ctypes.Union):
    _fields_ = [("fd", ctypes.c_int), ("handle", ctypes.c_void_p)]


class _Descr(ctypes.Structure):
    """CUfileDescr_t."""

    _fields_ = [("type", ctypes.c_int), ("handle", _Union), ("fs_ops", ctypes.c_void_p)]


class Descr:
    """As the binding's, whose memory has what was there before."""

    def __init__(self) -> None:
        self._raw = _Descr()
        ctypes.memset(ctypes.addressof(self._raw), 0xFF, ctypes.sizeof(self._raw))

    def __int__(self) -> int:
        return ctypes.addressof(self._raw)

    def _set_type(self, value: int) -> None:
        self._raw.type = value

    def _set_fs_ops(self, value: int) -> None:
        self._raw.fs_ops = value

    def _set_handle(self, value: int) -> None:
        self._raw.handle.handle = value

    type = property(None, _set_type)
    fs_ops = property(None, _set_fs_ops)
    handle = property(lambda self: self._raw.handle, _set_handle)


class OpError(IntEnum):
    SUCCESS = 0
    DRIVER_NOT_INITIALIZED = 5001
    IO_NOT_SUPPORTED = 5008
    INVALID_MAPPING_RANGE = 5017
    DRIVER_ALREADY_OPEN = 5026


class CuFileError(Exception):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{OpError(status).name} ({status})")
