"""Running one command in a virtual machine."""

import codecs
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lab import initramfs, kernellog, kernels, trace
from lab.accel import choose
from lab.drives import Drive, check_together, make_images
from lab.errors import LabError
from lab.qemu import Machine
from lab.trace import TraceRead

KERNEL_PROBLEM = 70  # EX_SOFTWARE of sysexits.h
TIMEOUT = 124  # as timeout(1) has it


@dataclass(frozen=True)
class Result:
    """What became of a command."""

    status: int
    """The command's exit status, 128 + n when signal n killed it; TIMEOUT (124) when it was not
    done in time, KERNEL_PROBLEM (70) when the kernel died under it."""
    output: str
    """Its standard output and error, as they came."""
    kernel_log: str
    trace: tuple[TraceRead, ...]
    """The reads that the drives executed, in order."""
    seconds: float
    """How long the machine ran, its boot included."""
    timed_out: bool = False

    @property
    def kernel_problems(self) -> tuple[str, ...]:
        """The lines of the kernel log that tell of a bug, a warning or a crash."""
        return kernellog.problems(self.kernel_log)


def run(
    command: Sequence[str],
    *,
    kernel: str = "7",
    drives: Sequence[Drive] = (),
    share: Path | None = None,
    append: str = "",
    timeout: float = 300,
    env: Mapping[str, str] | None = None,
    output: TextIO | None = None,
    accel: str = "tcg",
    traced: bool = True,
) -> Result:
    """Run `command` as root in a virtual machine with `drives`, and wait for its end.

    It sees this machine's files read-only, from the same working directory and with the same
    environment (or `env`, all of it); it can write to /tmp and /run, its own. The folder `share` is
    writable, at the same path. `output` gets what the command prints, while it runs. `append` goes
    to the kernel's command line. `timeout` is in seconds and includes the boot. What the command
    writes to /dev/lab has drives unplugged and plugged in: see lab.control. Without `traced` the
    result's trace is empty, and reads take less of the machine's time.

    ValueError: an argument cannot be. LabError: the machine could not be made or did not boot.
    """
    cwd = Path.cwd()
    share = share.resolve() if share else None
    _check(command, cwd, share, timeout)
    check_together(drives)
    found = kernels.locate(kernel)
    with tempfile.TemporaryDirectory(prefix="gdsdirect-lab-") as name:
        machine = Machine(found, Path(name), choose(accel, found), append, share, drives, traced)
        machine.initramfs.write_bytes(
            initramfs.build(
                found,
                command,
                cwd=cwd,
                env=os.environ if env is None else env,
                share=share,
                drives=len(drives),
            )
        )
        make_images(drives, machine.folder)
        return _result(machine, timeout, output)


def _result(machine: Machine, timeout: float, output: TextIO | None) -> Result:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text: list[str] = []

    def receive(data: bytes) -> None:
        text.append(decoder.decode(data))
        if output is not None:
            output.write(text[-1])
            output.flush()

    started = time.monotonic()
    ended = machine.boot(timeout, receive)
    seconds = time.monotonic() - started
    log = _read(machine.folder / "console")
    status = machine.status()
    timed_out = status is None and not ended
    if status is None:
        status = TIMEOUT if timed_out else _crash(machine, log)
    return Result(status, "".join(text), log, _reads(machine), seconds, timed_out)


def _crash(machine: Machine, log: str) -> int:
    """The status when the guest ended without telling one: the kernel's doing, or the lab's."""
    if kernellog.problems(log):
        return KERNEL_PROBLEM
    errors = _read(machine.folder / "errors")
    last_words = [*errors.splitlines()[-5:], *log.splitlines()[-5:]]
    raise LabError("the machine ended before the command did:\n" + "\n".join(last_words))


def _reads(machine: Machine) -> tuple[TraceRead, ...]:
    path = machine.folder / "trace"
    if not path.exists():  # stopped before QEMU had begun
        return ()
    with path.open(errors="replace") as lines:
        return tuple(trace.parse(lines))


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# Mounted anew in the guest: what the host has there is not to be seen.
_OWN = ("/dev", "/proc", "/run", "/sys")


def _check(command: Sequence[str], cwd: Path, share: Path | None, timeout: float) -> None:
    if isinstance(command, str) or not command:
        raise ValueError(f"command is {command!r}; use a sequence of a program and its arguments")
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout}; use a positive number of seconds")
    if share is not None and (not share.is_dir() or share == Path("/")):
        raise ValueError(f"share is {str(share)!r}; use a folder that exists, below the root")
    shared = share is not None and cwd.is_relative_to(share)
    if not shared and any(cwd.is_relative_to(own) for own in _OWN):
        raise ValueError(
            f"the working directory is {str(cwd)!r}, which the guest has its own of; "
            "change to another, or give it as share"
        )
