"""The machine as QEMU sees it: its command line, and one process of it."""

import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab import trace
from lab.control import Control
from lab.drives import Drive, escaped, qemu_arguments
from lab.errors import LabError
from lab.image import bootable
from lab.kernels import Kernel
from lab.tools import tool

_LAST_SECONDS = 10
_ACCELERATORS = {"tcg": ("tcg,thread=single", "max"), "kvm": ("kvm", "host")}

_KERNEL_COMMAND_LINE = (
    "console=ttyS0 loglevel=8 oops=panic panic=-1 "
    # All of the controller memory is for peer transfers: no submission queues in it.
    "nvme.use_cmb_sqes=0 "
    # Speed, where no test looks: defences, self-tests, and doubts about an emulated clock.
    "mitigations=off cryptomgr.notests=1 tsc=reliable"
)


@dataclass(frozen=True)
class Machine:
    """A virtual machine that has been described and not yet started.

    While it runs, it writes to `folder`, which is its own: `console` (the kernel's log), `answer`
    (the command's status), `trace` (what the drives did), `errors` (QEMU's complaints).
    """

    kernel: Kernel
    folder: Path
    accel: str = "tcg"
    append: str = ""
    share: Path | None = None
    drives: Sequence[Drive] = ()
    traced: bool = True

    @property
    def initramfs(self) -> Path:
        """What the machine boots into; to be written first."""
        return self.folder / "initramfs"

    def arguments(self, control: Control) -> list[str]:
        """QEMU's command line. Port 1 goes to QEMU's own stdout, port 2 to the file `answer`,
        port 3 to `control`.
        """
        accelerator, cpu = _ACCELERATORS[self.accel]
        return [
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-machine", "q35", "-accel", accelerator, "-cpu", cpu, "-smp", "2", "-m", "2048"),
            *("-kernel", str(bootable(self.kernel)), "-initrd", str(self.initramfs)),
            *("-append", f"{_KERNEL_COMMAND_LINE} {self.append}".strip()),
            *("-chardev", f"file,id=console,path={escaped(self.folder / 'console')}"),
            *("-serial", "chardev:console"),
            *("-device", "virtio-serial-pci,id=ports"),
            *("-chardev", "stdio,id=output,signal=off"),
            *("-device", "virtserialport,bus=ports.0,nr=1,chardev=output"),
            *("-chardev", f"file,id=status,path={escaped(self.folder / 'answer')}"),
            *("-device", "virtserialport,bus=ports.0,nr=2,chardev=status"),
            *control.arguments(),
            *_shared("root", Path("/"), "readonly=on,multidevs=remap"),
            *_shared("modules", self.kernel.modules.parent, "readonly=on"),
            *(_shared("share", self.share, "multidevs=remap") if self.share else ()),
            *qemu_arguments(self.drives, self.folder),
            *("-D", str(self.folder / "trace")),
            *(part for event in trace.EVENTS if self.traced for part in ("-trace", event)),
        ]

    def boot(self, timeout: float, on_output: Callable[[bytes], object]) -> bool:
        """Run until the guest ends (True) or `timeout` seconds have passed (False)."""
        deadline = time.monotonic() + timeout
        with Control(self.drives, self.folder) as control, self._process(control) as qemu:
            assert qemu.stdout is not None
            output = qemu.stdout.fileno()
            while (left := deadline - time.monotonic()) > 0:
                ends = control.sockets
                waited = [output, *(end.fileno() for end in ends)]
                readable = select.select(waited, [], [], left)[0]
                for end in ends:
                    if end.fileno() in readable:
                        control.receive(end)
                if output in readable:
                    data = os.read(output, 1 << 16)
                    if not data:  # QEMU is gone
                        return True
                    on_output(data)
        return False

    def status(self) -> int | None:
        """The command's exit status; None if the guest did not come to tell it."""
        answer = self.folder / "answer"
        said = answer.read_text() if answer.exists() else ""
        return int(said) if said else None

    def _environment(self) -> dict[str, str]:
        """QEMU's own: what is preloaded is for the command, such as a sanitizer's library."""
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        environment["TMPDIR"] = str(self.folder)  # for what drives must not keep
        return environment

    def _pinned(self) -> Sequence[str]:
        """To one processor, unless speed is what is looked for.

        QEMU 7.2 has no memory barrier between telling the guest up to where it has seen a drive's
        queue and looking there once more (shadow doorbells, nvme_process_sq), while the guest, in
        another thread, writes there and looks whether it must ring. Both can miss each other, and
        commands are never answered. On one processor they see each other's writes in order.
        """
        if not self.traced:
            return ()
        return tool("taskset"), "--cpu-list", str(max(os.sched_getaffinity(0)))

    @contextmanager
    def _process(self, control: Control) -> Iterator[subprocess.Popen[bytes]]:
        # Should this process be killed, the kernel kills QEMU with it.
        command = [tool("setpriv"), "--pdeathsig", "KILL", *self._pinned()]
        command.append(tool("qemu-system-x86_64"))
        with (self.folder / "errors").open("wb") as errors:
            qemu = subprocess.Popen(
                [*command, *self.arguments(control)],
                stdin=subprocess.PIPE,  # never written; at its end the output port would close
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=control.descriptors,
                env=self._environment(),
            )
        try:
            control.started()
            yield qemu
        finally:
            _end(qemu)


def _end(qemu: subprocess.Popen[bytes]) -> None:
    qemu.kill()
    for pipe in (qemu.stdin, qemu.stdout):
        if pipe is not None:
            pipe.close()
    try:
        qemu.wait(_LAST_SECONDS)
    except subprocess.TimeoutExpired:
        raise LabError(f"QEMU (process {qemu.pid}) hangs and cannot be killed") from None


def _shared(tag: str, path: Path, options: str) -> Sequence[str]:
    backend = f"local,id={tag},path={escaped(path)},security_model=none,{options}"
    return "-fsdev", backend, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"
