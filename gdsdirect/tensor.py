"""Tensor: part of a buffer as an array, for NumPy, torch, JAX and CuPy to see without a copy."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gdsdirect.errors import ring_module

if TYPE_CHECKING:
    from gdsdirect._uring_cmd import Memory

# By name: DLDataTypeCode of dlpack.h 1.1, bits, and kind and bytes of NumPy's array interface, None
# where it has no such type.
_TYPES: dict[str, tuple[int, int, str | None]] = {
    "bool": (6, 8, "b1"),
    "int8": (0, 8, "i1"),
    "int16": (0, 16, "i2"),
    "int32": (0, 32, "i4"),
    "int64": (0, 64, "i8"),
    "uint8": (1, 8, "u1"),
    "uint16": (1, 16, "u2"),
    "uint32": (1, 32, "u4"),
    "uint64": (1, 64, "u8"),
    "float16": (2, 16, "f2"),
    "float32": (2, 32, "f4"),
    "float64": (2, 64, "f8"),
    "complex64": (5, 64, "c8"),
    "complex128": (5, 128, "c16"),
    "bfloat16": (4, 16, None),
    "float8_e4m3fn": (10, 8, None),
    "float8_e5m2": (12, 8, None),
}
_ORDER = "<" if sys.byteorder == "little" else ">"
_MOST_DIMENSIONS = 64  # as NumPy 2 has

# kDLCPU: an address of this process, whatever is behind it. So is page-locked memory that a GPU
# sees: kDLCUDAHost would say more, but torch (DLConvertor.cpp) and CuPy (dlpack.pyx) refuse it, and
# both take it by __cuda_array_interface__.
_CPU = (1, 0)


class Tensor:
    """An array in a buffer's memory, made by `GpuMappedBuffer.tensor`. It copies nothing.

    `numpy.asarray(tensor)` and `torch.from_dlpack(tensor)` (JAX, CuPy and NumPy have the same) see
    the buffer's own bytes, in C order. As long as this object or one of theirs is alive, the buffer
    can't be closed. `dtype` is a name such as "float32", `shape` a tuple, `offset` in bytes.

    A buffer in another device's memory is told as memory of the CPU too, since it is mapped there;
    the CPU reads it slowly. One that a GPU sees (`from_host_visible(…, device=0)`) is an array of
    that GPU's as well, read across PCIe by each kernel that uses it:
    `torch.as_tensor(tensor, device="cuda")`, `cupy.asarray(tensor)`.
    """

    __slots__ = ("__weakref__", "_view", "dtype", "offset", "shape")

    def __init__(
        self, memory: Memory, dtype: object, shape: int | Sequence[int] | None, offset: int
    ) -> None:
        self.dtype = _name_of(dtype)
        itemsize = _TYPES[self.dtype][1] // 8
        if not 0 <= offset <= memory.nbytes:
            raise ValueError(f"offset is {offset}, outside 0..{memory.nbytes}")
        if (memory.address + offset) % itemsize:
            raise ValueError(
                f"offset is {offset}: {self.dtype} begins at a multiple of {itemsize} bytes"
            )
        room = memory.nbytes - offset
        self.shape = (room // itemsize,) if shape is None else _dimensions(shape)
        self.offset = offset
        if shape is None and room % itemsize:
            raise ValueError(
                f"{room} bytes from offset {offset} are no whole number of {self.dtype}, "
                f"{itemsize} bytes each: give the shape"
            )
        if self.nbytes > room:
            raise ValueError(
                f"shape {self.shape} of {self.dtype} takes {self.nbytes} bytes, and from offset "
                f"{offset} the buffer has {room}"
            )
        self._view = memoryview(memory)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * _TYPES[self.dtype][1] // 8

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """NumPy's array interface, version 3. TypeError for a dtype that it doesn't know."""
        kind = _TYPES[self.dtype][2]
        if kind is None:
            raise TypeError(
                f"NumPy has no {self.dtype}: use torch.from_dlpack, or a tensor of uint8 or uint16"
            )
        memory: Any = self._view.obj
        return self._interface(kind, memory.address)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The CUDA array interface, version 3, of a buffer that a GPU sees.

        AttributeError for other buffers, and for a dtype that NumPy doesn't know, so that hasattr
        tells. No stream: what read into the buffer has waited for its bytes.
        """
        memory: Any = self._view.obj
        kind = _TYPES[self.dtype][2]
        if memory.device_address is None:
            raise AttributeError(
                "no GPU sees this buffer: make it by from_host_visible(…, device=0)"
            )
        if kind is None:
            raise AttributeError(f"the CUDA array interface has no {self.dtype}")
        interface = self._interface(kind, memory.device_address)
        return {**interface, "strides": None, "stream": None}

    def _interface(self, kind: str, address: int) -> dict[str, Any]:
        """What both array interfaces say, of memory at `address`."""
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": ("|" if kind.endswith("1") else _ORDER) + kind,
            "data": (address + self.offset, False),
        }

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule (Python array API standard, 2023.12).

        Versioned for a consumer that knows DLPack 1. BufferError where it wants a copy or another
        device. `stream` has no meaning for memory of the CPU.
        """
        if dl_device not in (None, _CPU):
            raise BufferError(f"the tensor is on device {_CPU} (kDLCPU), not {dl_device}: copy it")
        if copy:
            raise BufferError("a buffer's tensor is never a copy: copy what is made of it")
        code, bits, _ = _TYPES[self.dtype]
        versioned = max_version is not None and max_version[0] >= 1
        return ring_module().dlpack(self._view.obj, self.offset, code, bits, self.shape, versioned)

    def __dlpack_device__(self) -> tuple[int, int]:
        """kDLCPU, whatever device the mapped memory is of."""
        return _CPU

    def __repr__(self) -> str:
        return f"<Tensor {self.dtype} {self.shape} at offset {self.offset}>"

    def __reduce__(self) -> Any:
        raise TypeError("Tensor is memory of this process and can't be pickled")


def _name_of(dtype: object) -> str:
    """The name of a data type, given so or as NumPy's, torch's or JAX's own object."""
    given = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or dtype
    name = str(given).removeprefix("torch.")
    if name not in _TYPES:
        raise ValueError(f"dtype is {dtype!r}: give one of {', '.join(_TYPES)}")
    order = getattr(dtype, "byteorder", "=")
    if order not in ("=", "|", _ORDER):
        raise ValueError(f"dtype is {dtype!r}: a tensor has this machine's byte order")
    return name


def _dimensions(shape: int | Sequence[int]) -> tuple[int, ...]:
    given = (shape,) if isinstance(shape, int) else tuple(shape)
    dimensions = tuple(map(operator.index, given))
    if len(dimensions) > _MOST_DIMENSIONS or any(length < 0 for length in dimensions):
        raise ValueError(
            f"shape is {shape}: give at most {_MOST_DIMENSIONS} lengths, each 0 or more"
        )
    return dimensions
