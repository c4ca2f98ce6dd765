"""Whether KVM can be trusted on this host."""

import tempfile
from pathlib import Path

from lab import cache, initramfs
from lab.errors import LabError
from lab.kernels import Kernel
from lab.qemu import Machine

_TRIAL_SECONDS = 20


def choose(accel: str, kernel: Kernel) -> str:
    """What `accel` (tcg, kvm, auto) means here: "tcg" or "kvm". LabError: kvm does not work."""
    if accel not in ("tcg", "kvm", "auto"):
        raise ValueError(f"accel is {accel!r}; use tcg, kvm or auto")
    if accel == "tcg":
        return "tcg"
    if _kvm_works(kernel):
        return "kvm"
    if accel == "kvm":
        raise LabError("a trial boot under KVM failed on this host; use accel tcg or auto")
    return "tcg"


def _kvm_works(kernel: Kernel) -> bool:
    """By a trial boot, once in the host's uptime.

    That /dev/kvm opens and answers proves nothing: there are hosts where it then hangs or aborts
    every guest.
    """
    if not Path("/dev/kvm").exists():
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    verdict = cache.folder() / f"kvm-{boot}"
    if not verdict.exists():
        verdict.write_text("works" if _trial(kernel) else "fails")
    return verdict.read_text() == "works"


def _trial(kernel: Kernel) -> bool:
    with tempfile.TemporaryDirectory(prefix="gdsdirect-lab-") as name:
        machine = Machine(kernel, Path(name), accel="kvm")
        machine.initramfs.write_bytes(initramfs.build(kernel, ["true"], env={}))
        try:
            machine.boot(_TRIAL_SECONDS, lambda data: None)
        except LabError:  # not even SIGKILL ended it
            return False
        return machine.status() == 0
