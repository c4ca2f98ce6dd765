"""The machine, and the versions that figures were taken with."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

_PACKAGES = ("gdsdirect", "liburing", "caio")


def describe() -> dict[str, str]:
    """By name, in the order to be shown in."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M %z"),
        "command": " ".join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "kernel": f"Linux {platform.release()}",
        "processor": _processor(),
        "Python": f"Python {platform.python_version()}",
        "compiler": _said_by(os.environ.get("CC", "cc"), "--version"),
        "liburing (C)": _said_by("pkg-config", "--modversion", "liburing"),
        "fio": _said_by("fio", "--version"),
        **{f"{name} (package)": _version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} processors"


def _said_by(*command: str) -> str:
    """The first line that a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
