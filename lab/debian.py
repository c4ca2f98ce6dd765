"""Packages from Debian's archive, by suite, without touching the machine's own apt."""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.errors import LabError
from lab.tools import tool

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# The machine's apt.conf still applies (a proxy may be set there); only what it reads and
# writes is moved. The caller's cache is often below a home that the _apt user cannot enter.
_CONFIG = """\
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "";
Acquire::Languages "none";
Dir::Cache "{home}/cache";
Dir::Etc::SourceList "{home}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State "{home}/state";
Dir::State::Lists "{home}/lists";
Dir::State::status "{home}/status";
"""


class ArchiveError(LabError):
    """The archive does not give what it should; another suite may."""


class Suite:
    """One suite of the archive, with its index in a folder of its own (`home`, an existing one)."""

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self._home = home
        self._environment = {**os.environ, "APT_CONFIG": str(home / "apt.conf"), "LC_ALL": "C"}
        for folder in ("cache/archives/partial", "state", "lists/partial"):
            (home / folder).mkdir(parents=True)
        (home / "status").touch()
        (home / "apt.conf").write_text(_CONFIG.format(home=home))
        signed = f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""
        (home / "sources.list").write_text(f"deb {signed}{_archive()} {name} main\n")
        self._apt("apt-get", "update", "-q", "--error-on=any")

    def closure(self, package: str) -> list[str]:
        """`package` and all that it needs in exactly one version, itself first.

        Debian ties the parts of one kernel together with `(= version)`; what else a kernel
        package depends on (an initramfs maker, kmod) is for installing, not for booting.
        """
        found = [package]
        for name in found:  # grows while it is walked
            found += [part for part in self._exact_parts(name) if part not in found]
        return found

    def download(self, packages: Sequence[str], folder: Path) -> None:
        """The .deb files of `packages` into `folder`; ArchiveError if the pool lacks one."""
        self._apt("apt-get", "download", "-q", *packages, cwd=folder)

    def _exact_parts(self, package: str) -> Iterator[str]:
        shown = self._apt("apt-cache", "show", "--no-all-versions", package)
        for line in shown.splitlines():
            if line.startswith("Depends:"):
                yield from re.findall(r"([a-z0-9.+-]+) \(= [^)]+\)", line)

    def _apt(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [tool(command[0]), *command[1:]],
            cwd=cwd,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ArchiveError(f"{' '.join(command)} ({self.name}): {done.stderr.strip()}")
        return done.stdout


def unpack(deb: Path, folder: Path) -> None:
    """The files of a .deb into `folder`; nothing is installed and none of its scripts run."""
    command = [tool("dpkg-deb"), "-x", str(deb), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"cannot unpack {deb.name}: {done.stderr.strip()}")


def _archive() -> str:
    """The address of Debian's archive, as the machine's own apt knows it."""
    command = [tool("apt-get"), "indextargets", "--format", "$(LABEL) $(REPO_URI)"]
    done = subprocess.run([*command, "Created-By: Packages"], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        label, _, address = line.partition(" ")
        if label == "Debian":  # security updates and backports of old suites say otherwise
            return address
    raise LabError(
        "apt knows no Debian archive here, so there is nowhere to fetch a kernel from; "
        "run apt-get update, or name a kernel of your own with --kernel FOLDER"
    )
