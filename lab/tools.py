"""The programs that the lab calls, and the Debian packages that have them."""

import shutil

from lab.errors import LabError

_PACKAGES = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "taskset": "util-linux",
    "zstd": "zstd",
}
_SEARCH = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def tool(name: str) -> str:
    """The path of a program the lab needs; LabError names the Debian package that has it."""
    # depmod lives in sbin, which an ordinary user's PATH leaves out.
    path = shutil.which(name) or shutil.which(name, path=":".join(_SEARCH))
    if path is None:
        raise LabError(f"{name} is not installed; run: apt install {_PACKAGES[name]}")
    return path
