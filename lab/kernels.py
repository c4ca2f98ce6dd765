"""Kernels to boot: found in the cache, fetched from Debian's archive, or named by a folder."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab import cache, debian
from lab.errors import LabError
from lab.tools import tool

SUITES = {
    "6.1": ("bookworm",),
    "6.12": ("trixie",),
    # An index may name a version that the pool no longer has: then the next suite's turn.
    "7": ("trixie-backports", "forky", "sid"),
}
_PACKAGE = "linux-image-amd64"
_IMAGES = ("vmlinuz*", "boot/vmlinuz*", "lib/modules/*/vmlinuz*")


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted: its image, and the modules folder named after its release."""

    image: Path
    modules: Path

    @property
    def release(self) -> str:
        """What `uname -r` says in the guest."""
        return self.modules.name


def cached() -> dict[str, Kernel]:
    """The kernels that need no fetching, by name, oldest first."""
    return {name: kernel_in(_home(name)) for name in SUITES if _home(name).is_dir()}


def locate(name: str) -> Kernel:
    """The kernel called `name` (a key of SUITES, fetched once) or lying in the folder `name`.

    ValueError: neither. LabError: the folder holds no kernel, or none could be fetched.
    """
    if name in SUITES:
        return kernel_in(_home(name)) if _home(name).is_dir() else fetch(name)
    if Path(name).is_dir():
        return kernel_in(Path(name).resolve())
    known = ", ".join(SUITES)
    raise ValueError(f"kernel is {name!r}; use one of {known}, or a folder with a kernel in it")


def kernel_in(folder: Path) -> Kernel:
    """The one kernel in `folder`, laid out as an installed root or as an unpacked package."""
    images = [path for place in _IMAGES for path in folder.glob(place)]
    modules = [*folder.glob("lib/modules/*/modules.dep")]
    if len(images) == len(modules) == 1:
        return Kernel(images[0], modules[0].parent)
    raise LabError(
        f"{folder} holds {len(images)} kernel images ({', '.join(_IMAGES)}) and {len(modules)} "
        "module folders (lib/modules/*/modules.dep); it must hold one of each "
        f"(depmod -b {folder} RELEASE makes modules.dep)"
    )


def fetch(name: str) -> Kernel:
    """Fetch the kernel `name`, unless another process just did, from the first suite that can."""
    home = _home(name)
    with _locked(home.with_name(f".{name}.lock")):
        if not home.is_dir():
            _fetch_from_any(name, home)
    return kernel_in(home)


def _fetch_from_any(name: str, home: Path) -> None:
    failures = []
    for suite in SUITES[name]:
        # Beside the goal, so that one rename makes the kernel appear, whole. What is left of a
        # fetch that was killed goes with the next.
        work = home.with_name(f".{name}.fetch")
        shutil.rmtree(work, ignore_errors=True)
        try:
            _fetch_from(suite, work)
            (work / "kernel").rename(home)
            return
        except debian.ArchiveError as failure:
            failures.append(str(failure))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise LabError(f"no kernel {name} could be fetched:\n" + "\n".join(failures))


def _fetch_from(suite: str, work: Path) -> None:
    _say(f"{suite}: reading the index")
    for folder in ("apt", "debs", "kernel"):
        (work / folder).mkdir(parents=True)
    archive = debian.Suite(suite, work / "apt")
    packages = archive.closure(_PACKAGE)
    _say(f"{suite}: fetching {packages[-1]}")
    archive.download(packages, work / "debs")
    for deb in sorted((work / "debs").glob("*.deb")):
        _say(f"{suite}: unpacking {deb.name}")
        debian.unpack(deb, work / "kernel")
    shutil.rmtree(work / "kernel/usr/share", ignore_errors=True)
    _index_modules(work / "kernel")
    _say(f"{suite}: {kernel_in(work / 'kernel').release} is ready", last=True)


def _index_modules(root: Path) -> None:
    """What installing the package would do: modules.dep and its companions."""
    if not (root / "lib").exists():  # newer packages use usr/lib only; depmod may look in lib
        (root / "lib").symlink_to("usr/lib")
    for modules in (root / "lib/modules").iterdir():
        command = [tool("depmod"), "-b", str(root), modules.name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise LabError(f"depmod failed on {modules.name}: {done.stderr.strip()}")


def _home(name: str) -> Path:
    folder = cache.folder() / "kernels"
    folder.mkdir(exist_ok=True)
    return folder / name


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(text: str, *, last: bool = False) -> None:
    """Progress: one line that rewrites itself on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[Klab: {text}", end="\n" if last else "", file=sys.stderr, flush=True)
    else:
        print(f"lab: {text}", file=sys.stderr, flush=True)
