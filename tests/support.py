"""Helpers that several tests use."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_TREE = ("csrc", "gdsdirect", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")

REQUIRED = frozenset(filter(None, os.environ.get("GDSDIRECT_REQUIRE", "").split(",")))

_SYSTEM = ":".join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))


def needs_lab(*programs: str) -> pytest.MarkDecorator:
    """Skip where a program that the lab needs, or one of `programs`, is not installed.

    With GDSDIRECT_REQUIRE=lab nothing is skipped, so that the test fails of what is missing.
    """
    needed = ("qemu-system-x86_64", "busybox", *programs)
    missing = [name for name in needed if shutil.which(name, path=_SYSTEM) is None]
    return pytest.mark.skipif(
        "lab" not in REQUIRED and bool(missing), reason=f"not installed: {', '.join(missing)}"
    )


needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="torch is not installed: the extra `dev` leaves it out, since PyPI's brings all of CUDA",
)


def _missing_for_a_gpu() -> list[str]:
    """Looked for without starting CUDA in the process of all the other tests."""
    found = {
        "NVIDIA's driver": Path("/proc/driver/nvidia/version").exists(),
        "cuda-bindings": importlib.util.find_spec("cuda") is not None,
    }
    return [name for name, there in found.items() if not there]


needs_gpu = pytest.mark.skipif(
    "gpu" not in REQUIRED and bool(_missing_for_a_gpu()),
    reason=f"for a GPU there is no {' and no '.join(_missing_for_a_gpu())}",
)


def needed(name: str) -> Any:
    """A package, or a skip that names it; with GDSDIRECT_REQUIRE=gpu its lack is a failure."""
    if "gpu" in REQUIRED:
        return importlib.import_module(name)
    return pytest.importorskip(name)


def run_python(script: str, *arguments: str, timeout: float = 60) -> str:
    """Run `script` against the installed package in an interpreter of its own; returns its output.

    Its failure is the test's, and so is anything it says on stderr, such as a warning.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def file_system(path: Path) -> str:
    """The name of the file system that `path` is on, as stat(1) has it."""
    command = ["stat", "--file-system", "--format=%T", str(path)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel of the tree into `folder`/dist, with what is installed here."""
    source = folder / "source"
    source.mkdir()
    for name in _TREE:
        copy = shutil.copytree if (_ROOT / name).is_dir() else shutil.copy
        copy(_ROOT / name, source / name)
    return subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"),
            *("--no-index", "--wheel-dir", str(folder / "dist"), str(source)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **environment},
    )
