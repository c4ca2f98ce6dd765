"""Safetensors files into GPU memory, with fake_cuda.py in CUDA's place, and some of CuPy on it.

The same on a real GPU, with torch and CuPy, is in tests/gpu.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import Array, FakeDriver
from test_safetensors import contents

from gdsdirect.safetensors import load_file, safe_open


class CupyArray:
    """An array in device memory, with as much of CuPy's as gdsdirect uses."""

    def __init__(self, memory: Array, place: int, dtype: Any, shape: tuple[int, ...]) -> None:
        self._memory, self._place = memory, place
        self.dtype, self.shape = np.dtype(dtype), shape
        self.data = SimpleNamespace(ptr=memory.address + place)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        assert (self._place, self.dtype) == (0, np.uint8)
        return self._memory.__cuda_array_interface__

    def __getitem__(self, part: slice) -> "CupyArray":
        assert self.dtype == np.uint8
        return CupyArray(
            self._memory, self._place + part.start, np.uint8, (part.stop - part.start,)
        )

    def view(self, dtype: Any) -> "CupyArray":
        assert self.data.ptr % np.dtype(dtype).itemsize == 0
        return CupyArray(
            self._memory, self._place, dtype, (self.nbytes // np.dtype(dtype).itemsize,)
        )

    def reshape(self, shape: tuple[int, ...]) -> "CupyArray":
        assert np.prod(shape) == np.prod(self.shape)
        return CupyArray(self._memory, self._place, self.dtype, shape)

    def copy(self) -> "CupyArray":
        driver = self._memory._driver
        made = Array(driver, self.nbytes)
        driver.allocated[made.address][1][:] = self.tobytes()
        return CupyArray(made, 0, self.dtype, self.shape)

    def tobytes(self) -> bytes:
        return self._memory.contents()[self._place : self._place + self.nbytes]


class Cupy(ModuleType):
    """The module: `empty`, data types, and devices, of which one is current."""

    dtype = np.dtype

    def __init__(self, driver: FakeDriver) -> None:
        super().__init__("cupy")
        self._driver = driver
        self.current = [0]
        module = self

        class Device:
            def __init__(self, ordinal: int) -> None:
                self.ordinal = ordinal

            def __enter__(self) -> None:
                module.current.append(self.ordinal)

            def __exit__(self, *exception: object) -> None:
                module.current.pop()

        self.cuda = SimpleNamespace(Device=Device)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)  # data types

    def empty(self, shape: Any, dtype: Any) -> CupyArray:
        shape = (shape,) if isinstance(shape, int) else shape
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return CupyArray(Array(self._driver, nbytes, self.current[-1]), 0, dtype, shape)


SHAPES: list[tuple[int, ...]] = [(), (7,), (0, 3), (3, 5), (2_000_003,)]


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("device", "ordinal"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), (1, 1)])
def test_cupy(
    device: object,
    ordinal: int,
    padding: int,
    tmp_path: Path,
    driver: FakeDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a header whose length is odd, what is of several bytes is copied into its own memory."""
    monkeypatch.setitem(sys.modules, "cupy", Cupy(driver))
    path = tmp_path / "file"
    specs = [(f"{number}", "F16", shape) for number, shape in enumerate(SHAPES)]
    path.write_bytes(contents([*specs, ("last", "U8", (5,))], padding=padding))
    wanted = load_file(path)
    found = load_file(path, device, framework="cupy")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
    memory = found["last"]._memory
    assert driver.allocated[memory.address][0] == ordinal
    assert (found["1"]._memory is memory) == (padding == 0)
    (result,) = found.reads.values()
    assert result.nbytes == result.bounce_bytes == sum(each.nbytes for each in wanted.values())
    with safe_open(path, "cupy", device) as tensors:
        assert tensors.get_tensor("3").tobytes() == wanted["3"].tobytes()
        assert tensors.read is not None
        assert tensors.read.bounce_bytes == wanted["3"].nbytes


def test_a_dtype_that_cupy_has_not(
    tmp_path: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", Cupy(driver))
    (tmp_path / "file").write_bytes(contents([("a", "BF16", (3,))]))
    with pytest.raises(TypeError, match="CuPy has no BF16"):
        load_file(tmp_path / "file", "cuda:0", framework="cupy")
    assert driver.allocated == {}
