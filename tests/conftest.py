"""What all tests share.

The package under test is the installed one, so the repository's root is never on sys.path (run
pytest as `python -P -m pytest`). The lab is not installed: it is imported from its folder.
"""

import gc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_cuda import FakeDriver

from gdsdirect import cuda, cufile, gpu

ROOT = Path(__file__).resolve().parent.parent

# They run inside the virtual machine, started by test_in_lab.py.
collect_ignore = ["lab"]


def _import_lab() -> None:
    folder = ROOT / "lab"
    spec = importlib.util.spec_from_file_location(
        "lab", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["lab"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_import_lab()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """CUDA with two devices, of which nothing must be left at the end."""
    fake = FakeDriver(devices=2)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake.module)
    monkeypatch.setattr(cuda, "_devices", {})
    monkeypatch.setattr(gpu, "_pools", gpu.Pools())
    monkeypatch.setattr(gpu, "_SLOTS", 8)
    monkeypatch.setattr(cufile, "library", cufile.Library())
    yield fake
    fake.release()
    fake.fail.clear()
    gpu._pools.drain()
    gpu._pools._by_ordinal.clear()
    gc.collect()
    fake.release()
    fake.check()
    assert fake.registered == {}
    assert fake.events == {}
    assert list(fake.streams) == [1]
