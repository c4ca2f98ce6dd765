"""The package built in other ways than it is installed here: without the ring, without liburing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import build_wheel


@pytest.fixture(scope="module")
def without_ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as GDSDIRECT_URING_CMD=0 builds it, where there is no liburing."""
    folder = tmp_path_factory.mktemp("without_ring")
    done = build_wheel(folder, GDSDIRECT_URING_CMD="0", PKG_CONFIG_LIBDIR="/nowhere")
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, folder / "installed", "zip")
    return folder / "installed"


def run(package: Path, script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(package)!r})\n{script}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_without_the_ring_it_imports_and_packs(without_ring: Path) -> None:
    out = run(
        without_ring,
        "import gdsdirect\n"
        "print(gdsdirect.__file__)\n"
        "print(gdsdirect.probe())\n"
        "print(len(gdsdirect.encode_nvme_read_sqe(1, 2, 3, 4)))\n",
    )
    assert out == f"{without_ring}/gdsdirect/__init__.py\nFeatureDisabled()\n64\n"


@pytest.mark.parametrize(
    "use",
    [
        "gdsdirect.GpuMappedBuffer.from_host_visible(4096)",
        "gdsdirect.GpuMappedBuffer.from_object(bytearray(4096))",
        "gdsdirect.AsyncUringStream(None)",
        "gdsdirect.open(gdsdirect.__file__)",
        "next(gdsdirect.stream_files([gdsdirect.__file__], bytearray(8192)))",
        "gdsdirect.Namespace('/dev/null', geometry=gdsdirect.Geometry(1, 512, 8, 512))",
    ],
)
def test_without_the_ring_its_use_says_how_to_get_one(without_ring: Path, use: str) -> None:
    out = run(
        without_ring,
        f"import gdsdirect\ntry:\n    {use}\n"
        "except gdsdirect.RingUnavailableError as error:\n    print(error)\n",
    )
    for part in ("liburing-dev", "GDSDIRECT_URING_CMD=0", "Linux"):
        assert part in out


def test_without_the_ring_the_command_line_says_so(without_ring: Path) -> None:
    out = run(without_ring, "from gdsdirect.cli import main\nprint(main(['probe']))\n")
    assert out.startswith("feature disabled: ")
    assert out.endswith("\n2\n")


@pytest.mark.parametrize(
    "environment", [{"PKG_CONFIG_LIBDIR": "/nowhere"}, {"GDSDIRECT_LIBURING_PREFIX": "/nowhere"}]
)
def test_without_liburing_the_build_names_the_package(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    done = build_wheel(tmp_path, **environment)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "apt-get install liburing-dev" in line]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr


def test_liburing_can_be_linked_into_it(tmp_path: Path) -> None:
    """And then it is that one which is used, whatever liburing the process has besides."""
    done = build_wheel(tmp_path, GDSDIRECT_STATIC_LIBURING="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    (extension,) = (tmp_path / "installed" / "gdsdirect").glob("_uring_cmd*.so")
    needed = subprocess.run(
        ["readelf", "--dynamic", "--wide", extension], capture_output=True, text=True, check=True
    )
    assert "liburing" not in needed.stdout
    (tmp_path / "other.c").write_text(
        "#include <stdlib.h>\n"
        "int io_uring_queue_init_params(void) { abort(); }\n"
        "int io_uring_submit(void) { abort(); }\n"
    )
    other = tmp_path / "other.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", other, tmp_path / "other.c"], check=True)
    out = run(
        tmp_path / "installed",
        "from gdsdirect import *\n"
        "with GpuMappedBuffer.from_host_visible(4096) as buffer:\n"
        "    with AsyncUringStream(buffer) as stream, open('/dev/zero') as file:\n"
        "        stream.submit_read(file, 0, 4096, 0)\n"
        "        print(stream.wait()[0].result())\n",
        LD_PRELOAD=str(other),
    )
    assert out == "4096\n"
