"""Helpers that several tests use."""

import subprocess
import sys


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
