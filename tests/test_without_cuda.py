"""Without CUDA everything imports, what needs it says what is missing, and nothing else pays."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_cuda import Array, CUresult, FakeDriver
from support import run_python

import gdsdirect
from gdsdirect import CudaUnavailableError, GpuMappedBuffer, cuda
from gdsdirect.safetensors import load_file


@pytest.fixture(autouse=True)
def no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_devices", {})


def test_nothing_of_cuda_is_loaded_by_reads_into_host_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    loaded = run_python(
        "import sys, gdsdirect\n"
        "with gdsdirect.open(sys.argv[1]) as file:\n"
        "    file.read_into(bytearray(3))\n"
        "    file.read_into(gdsdirect.GpuMappedBuffer.from_host_visible(3))\n"
        "ours = ('gdsdirect.gpu', 'gdsdirect.cufile', 'gdsdirect.relay', 'ctypes')\n"
        "print([name for name in sys.modules if name in ours or name.split('.')[0] == 'cuda'])\n",
        str(tmp_path / "file"),
    )
    assert loaded == "[]\n"


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    extra = r"pip install 'gdsdirect\[cuda\]'"
    with pytest.raises(CudaUnavailableError, match=extra):
        GpuMappedBuffer.from_host_visible(4096, device=0)
    (tmp_path / "file").write_bytes(b"abc")
    with (
        gdsdirect.open(tmp_path / "file") as file,
        pytest.raises(CudaUnavailableError, match=extra),
    ):
        file.read_into(Array(FakeDriver(), 3))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    with pytest.raises(CudaUnavailableError, match=extra):
        load_file(tmp_path / "file", "cuda:0", framework="cupy")


def test_the_driver_is_missing() -> None:
    """With the real package: it has no library to load here."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed: pip install 'gdsdirect[cuda]'")
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver of NVIDIA's here")
    with pytest.raises(CudaUnavailableError, match=r"libcuda|nvidia-smi"):
        cuda.device(0)


def test_the_driver_is_missing_for_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuda-bindings raises it."""
    fake = FakeDriver()

    def missing(flags: int) -> object:
        raise RuntimeError('"cuda" is an NVIDIA driver library')

    fake.module.cuInit = missing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake.module)
    with pytest.raises(CudaUnavailableError, match=r"libcuda\.so\.1 can't be loaded"):
        cuda.device(0)


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", FakeDriver(devices=0).module)
    with pytest.raises(CudaUnavailableError, match=r"no device \(CUDA_ERROR_NO_DEVICE\)"):
        GpuMappedBuffer.from_host_visible(4096, device=0)


def test_a_context_that_can_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver()
    fake.fail_after("cuDevicePrimaryCtxRetain", 0, CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake.module)
    with pytest.raises(gdsdirect.CudaError, match="cuDevicePrimaryCtxRetain: out of memory"):
        cuda.device(0)
    fake.fail.clear()
    assert cuda.device(0).ordinal == 0


def test_a_fork_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", FakeDriver().module)
    monkeypatch.setattr(cuda.device(0), "pid", 1)
    with pytest.raises(CudaUnavailableError, match="forked"):
        cuda.device(0)


def test_the_real_cufile_refuses_where_there_is_no_nvidia_fs(tmp_path: Path) -> None:
    """Or there is no such library; it writes its log into the current folder."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed: pip install 'gdsdirect[cuda]'")
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver of NVIDIA's here")
    said = run_python(
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "from gdsdirect import cufile\n"
        "try:\n"
        "    cufile._open()\n"
        "except cufile.RefusedError as error:\n"
        "    print(error)\n",
        str(tmp_path),
    )
    assert said.startswith("cuFile's driver can't be opened without copies: ")
