"""NVIDIA's own cuda-bindings, over fake_libcuda.c in the place of the driver's library.

The tests of tests/gpu that need neither torch nor CuPy are run so, in a process of their own.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
WITHOUT_OTHERS = (
    "(test_ranges and driver) or (test_all_of_a_file and driver) or test_each_way or "
    "test_the_current_context_stays or test_threads_and_tasks or test_the_end_of_an_interpreter"
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("cuda") is None,
        reason="cuda-bindings is not installed: pip install 'gdsdirect[cuda]'",
    ),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("libcuda")
    library = folder / "libcuda.so.1"
    source = str(HERE / "fake_libcuda.c")
    flags = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-ldl", "-pthread")
    subprocess.run(["gcc", source, *flags, "-o", str(library)], check=True)
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_LIBCUDA_REPORT": str(folder / "report"),
        "GDSDIRECT_REQUIRE": "gpu",
    }


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_reads_by_way_of_the_binding(environment: dict[str, str]) -> None:
    chosen = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", WITHOUT_OTHERS)
    shown = run(environment, *chosen, str(HERE / "gpu"))
    passed = re.search(r"(\d+) passed", shown)
    assert passed is not None
    assert int(passed[1]) >= 10  # a way or two may be closed here
    # That process, and those of the interpreters that came to their end in it.
    left = Path(environment["FAKE_LIBCUDA_REPORT"]).read_text().split()
    assert left == ["0"] * 5


def test_what_the_binding_says_of_errors(environment: dict[str, str]) -> None:
    script = (
        "from gdsdirect import cuda\n"
        "print(cuda.device(0))\n"
        "for call in (lambda: cuda.device(1), lambda: cuda.device(0).call('cuMemFree', 5)):\n"
        "    try:\n"
        "        call()\n"
        "    except (ValueError, RuntimeError) as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    assert run(environment, "-c", script).splitlines() == [
        "<Device 0, 0000:3b:00.0>",
        "ValueError device is 1: CUDA shows 1 of them here, so give one below that",
        "CudaError cuMemFree: invalid argument (CUDA_ERROR_INVALID_VALUE, 1)",
    ]
