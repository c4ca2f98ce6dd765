"""Frameworks: memory that tensors are read into, and NumPy, torch or CuPy's arrays in it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, Protocol

from gdsdirect import cuda
from gdsdirect.memory import GpuMappedBuffer

_NUMPY = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

# Of torch; of the package ml_dtypes too, which has them for NumPy, but for the one in pairs.
_SMALL_FLOATS = {
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "BF16": "bfloat16",
}
_PAIRS = {"F4": "float4_e2m1fn_x2"}

# Of each kind of device the framework, where none is asked for.
_DEFAULTS = {"cpu": "numpy", "cuda": "torch"}


class Framework(Protocol):
    """Makes memory on its device, and arrays in it."""

    def type_of(self, dtype: str) -> Any:
        """The framework's own object for a dtype; TypeError where it has none."""

    def memory(self, nbytes: int) -> Any:
        """So many bytes to read into; what `File.read_into` takes."""

    def array(self, memory: Any, place: int, dtype: str, shape: tuple[int, ...]) -> Any:
        """The tensor at byte `place` of the memory. It copies only what isn't aligned there."""


class _Arrays:
    """What frameworks have in common: names of data types."""

    name: str
    _package: Any
    _types: Mapping[str, str]

    def type_of(self, dtype: str) -> Any:
        found = getattr(self._package, self._types.get(dtype, ""), None)
        if found is None:
            raise TypeError(f"{self.name} has no {dtype}: read the tensor with another framework")
        return found


class _NumPy(_Arrays):
    name = "NumPy"
    _types = _NUMPY

    def __init__(self, device: str) -> None:
        if device != "cpu":
            raise ValueError(f"device is {device!r}: NumPy's arrays are on the cpu")
        self._package = _imported("numpy", "NumPy")

    def type_of(self, dtype: str) -> Any:
        if dtype not in _SMALL_FLOATS:
            return super().type_of(dtype)
        try:
            return getattr(importlib.import_module("ml_dtypes"), _SMALL_FLOATS[dtype])
        except ImportError:
            text = f"NumPy alone has no {dtype}: pip install ml_dtypes, or read it with torch"
            raise TypeError(text) from None

    def memory(self, nbytes: int) -> GpuMappedBuffer:
        return GpuMappedBuffer.from_host_visible(nbytes)

    def array(self, memory: Any, place: int, dtype: str, shape: tuple[int, ...]) -> Any:
        count = math.prod(shape)
        if count == 0:
            return self._package.empty(shape, self.type_of(dtype))
        array = self._package.frombuffer(memory, self.type_of(dtype), count, place).reshape(shape)
        return array if array.flags.aligned else array.copy()


class _Torch(_Arrays):
    name = "torch"
    _types = _NUMPY | _SMALL_FLOATS | _PAIRS

    def __init__(self, device: str) -> None:
        self._package = _imported("torch", "torch")
        self._device = self._package.device(device)
        if self._device.type == "cuda":
            cuda.start()  # says what is missing, where something is

    def _shape(self, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if dtype not in _PAIRS:
            return shape
        if not shape or shape[-1] % 2:
            raise TypeError(f"torch has {dtype} in pairs, and the shape is {shape}")
        return (*shape[:-1], shape[-1] // 2)

    def memory(self, nbytes: int) -> Any:
        if self._device.type == "cpu":
            return GpuMappedBuffer.from_host_visible(nbytes)
        return self._package.empty(nbytes, dtype=self._package.uint8, device=self._device)

    def array(self, memory: Any, place: int, dtype: str, shape: tuple[int, ...]) -> Any:
        torch, kind, shape = self._package, self.type_of(dtype), self._shape(dtype, shape)
        nbytes = math.prod(shape) * kind.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=kind, device=self._device)
        if self._device.type == "cpu":
            whole = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=place)
        else:
            whole = memory[place : place + nbytes]
        aligned = whole if whole.data_ptr() % kind.itemsize == 0 else whole.clone()
        return aligned.view(kind).reshape(shape)


class _CuPy(_Arrays):
    name = "CuPy"
    _types = _NUMPY

    def __init__(self, device: str) -> None:
        kind, _, number = device.partition(":")
        if kind != "cuda" or not (number or "0").isdecimal():
            raise ValueError(f"device is {device!r}: CuPy's arrays are on cuda:0, cuda:1, …")
        self._package = _imported("cupy", "CuPy")
        cuda.start()
        self._device = self._package.cuda.Device(int(number or 0))

    def memory(self, nbytes: int) -> Any:
        with self._device:
            return self._package.empty(nbytes, self._package.uint8)

    def array(self, memory: Any, place: int, dtype: str, shape: tuple[int, ...]) -> Any:
        kind = self._package.dtype(self.type_of(dtype))
        nbytes = math.prod(shape) * kind.itemsize
        with self._device:
            if nbytes == 0:
                return self._package.empty(shape, kind)
            whole = memory[place : place + nbytes]
            aligned = whole if whole.data.ptr % kind.itemsize == 0 else whole.copy()
            return aligned.view(kind).reshape(shape)


_FRAMEWORKS: Mapping[str, type[_NumPy | _Torch | _CuPy]] = {
    "numpy": _NumPy,
    "np": _NumPy,
    "torch": _Torch,
    "pt": _Torch,
    "cupy": _CuPy,
}


def framework_of(name: str | None, device: object) -> Framework:
    """The framework of this name, or the device's own, for tensors on the device."""
    place = f"cuda:{device}" if isinstance(device, int) else str(device)
    wanted = _DEFAULTS.get(place.partition(":")[0]) if name is None else name
    if wanted is None:
        raise ValueError(f"device is {device!r}: give 'cpu', or 'cuda:0' and so on")
    if wanted not in _FRAMEWORKS:
        raise ValueError(f"framework is {name!r}: give one of {', '.join(_FRAMEWORKS)}")
    return _FRAMEWORKS[wanted](place)


def _imported(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        text = f"{name} is not installed: pip install {package}, or give another framework="
        raise ImportError(text, name=package) from error
