"""The two C extensions. Everything else about the package is in pyproject.toml.

GDSDIRECT_URING_CMD=0       builds without the ring (and so without liburing)
GDSDIRECT_LIBURING_PREFIX   takes liburing from this prefix instead of asking pkg-config
GDSDIRECT_STATIC_LIBURING=1 links liburing.a into the extension, its symbols hidden: for wheels
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

LIBURING = "liburing >= 2.3"  # the first with URING_CMD's flags and io_uring_enter2 in its header
MISSING = (
    f"gdsdirect needs {LIBURING} to build its ring, and {{}}: run `apt-get install liburing-dev "
    "pkg-config`, or build without the ring by GDSDIRECT_URING_CMD=0"
)

RING_FILES = (
    *("uring_cmd", "ringobject", "requestobject", "submit", "check", "batch", "reap", "carry"),
    *("sqe", "ring", "handout", "jobs", "memory", "source", "open", "alias", "ask", "dlpack"),
)

# Symbols are hidden except PyInit. setuptools lets CFLAGS take the place of CPython's own flags, so
# that without an optimisation of our own `CFLAGS=-Werror pip install .` would build without any.
UNIX_FLAGS = ["-std=c11", "-Wall", "-Wextra", "-fvisibility=hidden"]
if "-O" not in os.environ.get("CFLAGS", ""):
    UNIX_FLAGS += ["-O3", "-DNDEBUG"]


def liburing_flags() -> tuple[list[str], list[str]]:
    """Compiler and linker flags of liburing. Exits with one sentence where there is none."""
    prefix = os.environ.get("GDSDIRECT_LIBURING_PREFIX")
    if prefix:
        if not Path(prefix, "include", "liburing.h").is_file():
            sys.exit(MISSING.format(f"{prefix} has no include/liburing.h"))
        return [f"-I{prefix}/include"], [f"-L{prefix}/lib", "-luring"]
    if shutil.which("pkg-config") is None:
        sys.exit(MISSING.format("there is no pkg-config to find it with"))
    if subprocess.run(["pkg-config", "--exists", LIBURING], check=False).returncode != 0:
        sys.exit(MISSING.format("pkg-config finds none"))

    def ask(option: str) -> list[str]:
        return subprocess.check_output(["pkg-config", option, "liburing"], text=True).split()

    return ask("--cflags"), ask("--libs")


def ring_extension() -> Extension:
    compile_flags, link_flags = liburing_flags()
    if os.environ.get("GDSDIRECT_STATIC_LIBURING") == "1":
        link_flags = ["-l:liburing.a" if flag == "-luring" else flag for flag in link_flags]
        link_flags.append("-Wl,--exclude-libs,ALL")
    return Extension(
        "gdsdirect._uring_cmd",
        [f"csrc/{name}.c" for name in RING_FILES],
        depends=[str(header) for header in Path("csrc").glob("*.h")],
        define_macros=[("_GNU_SOURCE", "1")],
        extra_compile_args=[*UNIX_FLAGS, *compile_flags],
        extra_link_args=link_flags,
    )


extensions = [
    Extension(
        "gdsdirect._nvme_sqe",
        ["csrc/nvme_sqe.c"],
        depends=["csrc/arrays.h", "csrc/nvme_abi.h", "csrc/pycompat.h"],
        extra_compile_args=UNIX_FLAGS if os.name == "posix" else ["/std:c11"],
    )
]
if sys.platform == "linux" and os.environ.get("GDSDIRECT_URING_CMD") != "0":
    extensions.append(ring_extension())

setup(ext_modules=extensions)
