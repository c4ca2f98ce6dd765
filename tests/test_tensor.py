"""Buffers as arrays, seen by NumPy without a copy: gdsdirect/tensor.py and csrc/dlpack.c."""

import gc
import pickle
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import needs_torch, run_python

from gdsdirect import GpuMappedBuffer, Tensor, _uring_cmd
from gdsdirect.tensor import _TYPES

KNOWN_TO_NUMPY = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
CODES = {"bfloat16": (4, 16), "float8_e4m3fn": (10, 8), "float8_e5m2": (12, 8)}
SEEN_BY = {"array interface": np.asarray, "dlpack": np.from_dlpack}


@pytest.fixture
def buffer() -> Iterator[GpuMappedBuffer]:
    with GpuMappedBuffer.from_host_visible(8192) as made:
        with made.view() as view:
            view[:] = bytes(i * i % 251 & 1 for i in range(8192))  # bools too
        yield made


def contents(buffer: GpuMappedBuffer) -> bytes:
    with buffer.view() as view:
        return bytes(view)


# ---- The same bytes


@pytest.mark.parametrize("see", SEEN_BY.values(), ids=SEEN_BY)
@pytest.mark.parametrize("dtype", KNOWN_TO_NUMPY)
def test_numpy_sees_the_buffer_itself(
    dtype: str, see: Callable[[Tensor], Any], buffer: GpuMappedBuffer
) -> None:
    tensor = buffer.tensor(dtype, (3, 1, 5), offset=64)
    array = see(tensor)
    assert (array.dtype, array.shape) == (np.dtype(dtype), (3, 1, 5))
    assert array.ctypes.data == buffer.address + 64
    assert array.tobytes() == contents(buffer)[64 : 64 + tensor.nbytes]
    np.asarray(tensor)[2, 0, 4] = 1  # NumPy before 2.1 takes DLPack's arrays for read-only
    last = np.frombuffer(contents(buffer), dtype, 15, 64)[14]
    assert last == array[2, 0, 4] == 1


@given(st.data())
def test_any_place_and_shape(data: st.DataObject) -> None:
    with GpuMappedBuffer.from_host_visible(4096) as buffer:
        dtype = data.draw(st.sampled_from(KNOWN_TO_NUMPY))
        itemsize = np.dtype(dtype).itemsize
        shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=5)))
        offset = data.draw(st.integers(0, 4096))
        fits = offset + int(np.prod(shape, dtype=int)) * itemsize <= 4096
        if not fits or offset % itemsize:
            with pytest.raises(ValueError, match=f"offset (is )?{offset}"):
                buffer.tensor(dtype, shape, offset=offset)
            return
        for see in SEEN_BY.values():
            array = see(buffer.tensor(dtype, shape, offset=offset))
            assert array.shape == shape
            assert array.size == 0 or array.ctypes.data == buffer.address + offset
            assert array.flags.c_contiguous
            del array


def test_all_of_a_buffer(buffer: GpuMappedBuffer) -> None:
    tensor = buffer.tensor("int32", offset=4)
    assert (tensor.shape, tensor.nbytes, tensor.offset) == ((2047,), 8188, 4)
    assert np.asarray(tensor).tobytes() == contents(buffer)[4:]
    assert buffer.tensor("int32", 7).shape == (7,)
    assert np.asarray(buffer.tensor("int32", ())).shape == ()
    assert repr(buffer.tensor("uint8", (2, 2))) == "<Tensor uint8 (2, 2) at offset 0>"


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("float32"), np.dtype("=f4")])
def test_dtypes_of_other_packages(dtype: object, buffer: GpuMappedBuffer) -> None:
    assert buffer.tensor(dtype).dtype == "float32"


def test_the_name_that_torch_prints(buffer: GpuMappedBuffer) -> None:
    class TorchType:
        """As torch.bfloat16, which has neither a name nor a __name__."""

        def __str__(self) -> str:
            return "torch.bfloat16"

    assert buffer.tensor(TorchType()).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", CODES)
def test_types_that_numpy_does_not_know(dtype: str, buffer: GpuMappedBuffer) -> None:
    tensor = buffer.tensor(dtype, (4, 4))
    with pytest.raises(TypeError, match=f"NumPy has no {dtype}: use torch"):
        np.asarray(tensor)
    managed = struct.unpack("=QiiiBBHQQQ", capsule_bytes(tensor.__dlpack__(), "dltensor", 48))
    address, device, _, ndim, code, bits, lanes, *_ = managed
    assert (address, device, ndim) == (buffer.address, 1, 2)
    assert (code, bits, lanes) == (*CODES[dtype], 1)


def capsule_bytes(capsule: object, name: str, nbytes: int) -> bytes:
    """What a DLPack capsule points to."""
    import ctypes

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer(capsule, name.encode())
    assert address is not None
    return ctypes.string_at(address, nbytes)


def test_the_version_that_a_consumer_knows(buffer: GpuMappedBuffer) -> None:
    tensor = buffer.tensor("float64", (2, 3))
    for known in (None, (0, 8)):
        assert '"dltensor"' in repr(tensor.__dlpack__(max_version=known))
    capsule = tensor.__dlpack__(max_version=(1, 0))
    versioned = struct.unpack("=IIQQQ", capsule_bytes(capsule, "dltensor_versioned", 32))
    assert versioned[:2] == (1, 1)
    assert versioned[4] == 0  # flags: neither read-only nor a copy
    assert tensor.__dlpack_device__() == (1, 0)


# ---- torch


TAKEN_BY_TORCH = {
    "the object": lambda torch, tensor: torch.from_dlpack(tensor),
    "a capsule without a version": lambda torch, tensor: torch.from_dlpack(tensor.__dlpack__()),
    "a versioned capsule": lambda torch, tensor: torch.from_dlpack(
        tensor.__dlpack__(max_version=(1, 0))
    ),
}


@needs_torch
@pytest.mark.parametrize("take", TAKEN_BY_TORCH.values(), ids=TAKEN_BY_TORCH)
@pytest.mark.parametrize("dtype", _TYPES)
def test_torch_sees_the_buffer_itself(
    dtype: str, take: Callable[[Any, Tensor], Any], buffer: GpuMappedBuffer
) -> None:
    import torch

    known = getattr(torch, dtype, None)
    if known is None:
        pytest.skip(f"torch {torch.__version__} has no {dtype}")
    array = take(torch, buffer.tensor(known, (3, 1, 5), offset=64))
    assert (array.dtype, tuple(array.shape), array.device.type) == (known, (3, 1, 5), "cpu")
    assert array.data_ptr() == buffer.address + 64
    assert array.is_contiguous()
    itself = array.view(torch.uint8) if known is not torch.bool else array
    assert bytes(itself.flatten().tolist()) == contents(buffer)[64 : 64 + array.nbytes]
    array[2, 0, 4] = 1
    one = torch.ones((), dtype=known).reshape(1).view(torch.uint8).tolist()
    assert contents(buffer)[64 + array.nbytes - len(one) :][: len(one)] == bytes(one)


@needs_torch
@pytest.mark.parametrize("take", TAKEN_BY_TORCH.values(), ids=TAKEN_BY_TORCH)
def test_a_buffer_that_torch_sees_is_not_closed(take: Callable[[Any, Tensor], Any]) -> None:
    import torch

    buffer = GpuMappedBuffer.from_host_visible(4096)
    array = take(torch, buffer.tensor("bfloat16"))
    part = array.reshape(2, -1)[1:]
    del array
    with pytest.raises(BufferError, match="in use"):
        buffer.close()
    del part
    buffer.close()


# ---- Lifetimes


@pytest.mark.parametrize("see", SEEN_BY.values(), ids=SEEN_BY)
def test_a_buffer_that_is_seen_is_not_closed(see: Callable[[Tensor], Any]) -> None:
    buffer = GpuMappedBuffer.from_host_visible(4096)
    array = see(buffer.tensor("uint8"))
    with pytest.raises(BufferError, match="in use"):
        buffer.close()
    part = array[100:]
    del array
    with pytest.raises(BufferError, match="in use"):
        buffer.close()
    del part
    buffer.close()


def test_a_buffer_that_was_dropped_lives_with_its_array() -> None:
    memory = bytearray(b"abcd" * 1024)
    array = np.from_dlpack(GpuMappedBuffer.from_object(memory).tensor("uint8"))
    gc.collect()
    assert bytes(array[:4]) == b"abcd"
    with pytest.raises(BufferError):
        memory.append(0)
    del array
    memory.append(0)


def test_a_capsule_that_nobody_takes_holds_nothing_once_it_is_gone() -> None:
    buffer = GpuMappedBuffer.from_host_visible(4096)
    for version in (None, (1, 0)):
        capsule = buffer.tensor("uint8").__dlpack__(max_version=version)
        with pytest.raises(BufferError, match="in use by 1"):
            buffer.close()
        del capsule
    buffer.close()


def test_an_array_that_another_thread_lets_go() -> None:
    buffer = GpuMappedBuffer.from_host_visible(4096)
    arrays = [np.from_dlpack(buffer.tensor("uint8"))]
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    buffer.close()


def test_an_array_that_outlives_the_interpreter() -> None:
    run_python(
        "import numpy, gdsdirect, builtins\n"
        "buffer = gdsdirect.GpuMappedBuffer.from_host_visible(4096)\n"
        "builtins.kept = numpy.from_dlpack(buffer.tensor('uint8'))\n"
    )


def test_garbage_cycles_are_collected() -> None:
    memory = bytearray(4096)
    cycle = [GpuMappedBuffer.from_object(memory).tensor("uint8")]
    cycle.append(cycle)  # type: ignore[arg-type]
    del cycle
    gc.collect()
    memory.append(0)


# ---- Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float31", None, 0), "dtype is 'float31': give one of bool, int8"),
        ((np.dtype(">f4"), None, 0), "this machine's byte order"),
        (("int32", None, 8193), r"offset is 8193, outside 0\.\.8192"),
        (("int32", None, -4), "offset is -4, outside"),
        (("int32", 1, 2), "offset is 2: int32 begins at a multiple of 4 bytes"),
        (("complex128", None, 8192 - 8), "begins at a multiple of 16"),
        (("int32", (-1, 4), 0), r"shape is \(-1, 4\)"),
        (("int8", (1,) * 65, 0), "at most 64 lengths"),
        (("int32", (2048, 2), 0), r"takes 16384 bytes, and from offset 0 the buffer has 8192"),
        (("int8", (1 << 62, 1 << 62), 0), "the buffer has 8192"),
    ],
)
def test_what_can_not_be(arguments: tuple[Any, ...], message: str, buffer: GpuMappedBuffer) -> None:
    dtype, shape, offset = arguments
    with pytest.raises(ValueError, match=message):
        buffer.tensor(dtype, shape, offset=offset)


def test_a_rest_that_is_no_element() -> None:
    with GpuMappedBuffer.from_object(bytearray(4094)) as odd:
        with pytest.raises(ValueError, match="no whole number of int32, 4 bytes each"):
            odd.tensor("int32")
        assert odd.tensor("int32", 1023).nbytes == 4092


def test_a_shape_of_no_integers(buffer: GpuMappedBuffer) -> None:
    with pytest.raises(TypeError):
        buffer.tensor("int8", (1.5,))  # type: ignore[arg-type]


def test_copies_and_other_devices_are_refused(buffer: GpuMappedBuffer) -> None:
    tensor = buffer.tensor("int8")
    with pytest.raises(BufferError, match="never a copy"):
        tensor.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="not \\(2, 0\\)"):
        tensor.__dlpack__(dl_device=(2, 0))
    tensor.__dlpack__(copy=False, dl_device=(1, 0))


def test_a_closed_buffer_and_pickling(buffer: GpuMappedBuffer) -> None:
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(buffer.tensor("int8"))
    gc.collect()
    buffer.close()
    with pytest.raises(ValueError, match="closed"):
        buffer.tensor("int8")


def test_what_the_capsule_is_made_of_is_checked_again(buffer: GpuMappedBuffer) -> None:
    """It is the last one to look before an address goes out."""
    for arguments in (
        (buffer, 8193, 1, 8, (1,), False),
        (buffer, -1, 1, 8, (1,), False),
        (buffer, 0, 1, 8, (8193,), False),
        (buffer, 0, 1, 64, (1025,), True),
        (buffer, 0, 1, 8, (0, 1 << 62, 1 << 62), False),
        (buffer, 0, 1, 8, (-1,), False),
        (buffer, 0, 1, 4, (1,), False),
        (buffer, 0, 1, 8, (1,) * 65, False),
    ):
        with pytest.raises(ValueError, match=r"shape|offset|dimensions"):
            _uring_cmd.dlpack(*arguments)
    with pytest.raises(OverflowError):
        _uring_cmd.dlpack(buffer, 0, 1, 8, (1 << 70,), False)


# ---- Taken from others: what gdsdirect does with a tensor on a GPU, here with NumPy's


needs_numpy_2_1 = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy before 2.1 has no DLPack 1"
)


@pytest.mark.parametrize(
    "version", [{}, pytest.param({"max_version": (1, 0)}, marks=needs_numpy_2_1)]
)
def test_a_capsule_that_is_taken(version: dict[str, Any]) -> None:
    array = np.arange(24, dtype="int16").reshape(2, 3, 4)[1:]
    before = sys.getrefcount(array)
    capsule = array.__dlpack__(**version)
    keeper, address, nbytes, contiguous, readonly = _uring_cmd.take_dlpack(capsule)
    assert (address, nbytes, contiguous, readonly) == (array.ctypes.data, 24, True, False)
    assert '"used_dltensor' in repr(capsule)
    with pytest.raises(TypeError, match="taken already"):
        _uring_cmd.take_dlpack(capsule)
    del capsule
    assert sys.getrefcount(array) == before + 1
    del keeper
    assert sys.getrefcount(array) == before


@pytest.mark.parametrize(
    ("array", "nbytes", "contiguous"),
    [
        (np.zeros((4, 4)), 128, True),
        (np.zeros((4, 4)).T, 128, False),
        (np.zeros((4, 6)).T, 192, False),
        (np.zeros((4, 4))[:, :2], 64, False),
        (np.zeros((4, 1, 4))[:, ::1], 128, True),
        (np.zeros((1, 9))[:, ::3], 24, False),
        (np.zeros(0), 0, True),
        (np.zeros(()), 8, True),
    ],
)
def test_what_is_told_of_an_array(array: Any, nbytes: int, contiguous: bool) -> None:
    _, _, told, side_by_side, _ = _uring_cmd.take_dlpack(array.__dlpack__())
    assert (told, side_by_side) == (nbytes, contiguous)


@needs_numpy_2_1
def test_a_capsule_of_memory_that_may_not_be_written() -> None:
    array = np.zeros(4)
    array.flags.writeable = False
    _, _, _, _, readonly = _uring_cmd.take_dlpack(array.__dlpack__(max_version=(1, 0)))
    assert readonly
    # What is written to a copy, nobody sees.
    copied = np.zeros(4).__dlpack__(max_version=(1, 0), copy=True)
    assert _uring_cmd.take_dlpack(copied)[4]


def test_what_is_no_capsule(buffer: GpuMappedBuffer) -> None:
    for wrong in (3, object(), np.zeros(3)):
        with pytest.raises(TypeError, match="no DLPack capsule"):
            _uring_cmd.take_dlpack(wrong)
    keeper, address, *_ = _uring_cmd.take_dlpack(buffer.tensor("int8").__dlpack__())
    assert address == buffer.address
    with pytest.raises(TypeError, match="no DLPack capsule"):
        _uring_cmd.take_dlpack(keeper)
    del keeper


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ((0, "I", 2), "DLPack 2"),
        ((32 + 21, "B", 4), "no whole number of bytes"),
    ],
)
def test_capsules_that_are_refused_are_given_back(
    patch: tuple[int, str, int], message: str, buffer: GpuMappedBuffer
) -> None:
    """Those of a later version of DLPack, and what is smaller than a byte."""
    import ctypes

    place, code, value = patch
    capsule = buffer.tensor("uint8", 3).__dlpack__(max_version=(1, 0))
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer(capsule, b"dltensor_versioned")
    assert address is not None
    ctypes.memmove(address + place, struct.pack(code, value), struct.calcsize(code))
    with pytest.raises(BufferError, match=message):
        _uring_cmd.take_dlpack(capsule)
    with pytest.raises(BufferError, match="in use by 1"):
        buffer.close()
    del capsule
    buffer.close()
