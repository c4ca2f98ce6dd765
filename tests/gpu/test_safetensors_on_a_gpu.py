"""Safetensors files into the memory of a real GPU, as torch's tensors and CuPy's arrays."""

from pathlib import Path
from typing import Any

import pytest
from support import needed, needs_gpu
from test_safetensors import KNOWN, contents

from gdsdirect.safetensors import load_file, safe_open

pytestmark = [pytest.mark.gpu, needs_gpu]

SHAPES: list[tuple[int, ...]] = [(), (7,), (0, 3), (4, 6), (3_000_017,)]


@pytest.fixture(params=[0, 1], ids=["aligned", "askew"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / "model.safetensors"
    specs = [
        (f"{dtype}.{number}", dtype, shape)
        for dtype in KNOWN
        for number, shape in enumerate(SHAPES)
    ]
    made.write_bytes(contents(specs, padding=request.param))
    return made


def test_torch(path: Path) -> None:
    torch = needed("torch")
    theirs = needed("safetensors.torch")
    wanted = theirs.load_file(path)
    found = load_file(path, "cuda:0")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].device == torch.device("cuda:0")
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert _bytes(torch, found[name]) == _bytes(torch, tensor)
    with safe_open(path, "torch", "cuda:0") as tensors:
        for name in ("F32.3", "BF16.3", "F8_E4M3.3"):
            part = tensors.get_slice(name)[1:3, ::2]
            assert _bytes(torch, part) == _bytes(torch, wanted[name][1:3, ::2])


def _bytes(torch: Any, tensor: Any) -> bytes:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return bytes(flat.cpu().numpy().tobytes())


def test_cupy(path: Path, tmp_path: Path) -> None:
    cupy = needed("cupy")
    some = tmp_path / "some"
    dtypes = ("BOOL", "I8", "U16", "F16", "F32", "C64", "F64", "I64")
    some.write_bytes(contents([(dtype, dtype, (5, 3)) for dtype in dtypes], padding=3))
    wanted = load_file(some)
    found = load_file(some, "cuda:0", framework="cupy")
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert cupy.asnumpy(found[name]).tobytes() == array.tobytes()
    with safe_open(some, "cupy", "cuda:0") as arrays:
        assert (cupy.asnumpy(arrays.get_slice("F32")[2:, 1]) == wanted["F32"][2:, 1]).all()
    with pytest.raises(TypeError, match="CuPy has no BF16"):
        load_file(path, "cuda:0", framework="cupy")
