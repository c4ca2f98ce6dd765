"""A file system whose reads wait until they are let go, and loop devices on files of it.

The server speaks the kernel's protocol (linux/fuse.h), in a process of its own: this file, run as a
program. What is read through it is slow in earnest, and on a loop device a file of it is a slow
drive. It takes root.

All of it is gone when the process that uses it is: mounts are in a namespace of its own, the server
dies with it, and the kernel takes a loop device back once nobody has it open.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

SIZE = 1 << 20  # bytes of each file
FILES = {"slow": b"S", "fast": b"F"}  # what they are full of; reads of the first wait

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


# ---- For tests


def missing() -> str | None:
    """What this host lacks for it, or None."""
    if os.geteuid() != 0:
        return "not root, who may mount"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            return f"no {device}"
    return None


class SlowFiles:
    """The mounted file system, and the one who says when its reads may go on."""

    def __init__(self, folder: Path) -> None:
        """For the process's only thread, since mounts are to be its own from now on."""
        new_namespace, private = 0x20000, 0x44000  # CLONE_NEWNS, MS_REC | MS_PRIVATE
        _call("unshare", new_namespace)
        _call("mount", None, b"/", None, private, None)
        folder.mkdir()
        self.slow, self.fast = folder / "slow", folder / "fast"
        self._server = subprocess.Popen(
            [sys.executable, "-P", __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()
        self.holds = True
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def _ask(self, question: str) -> str:
        with self._lock:
            assert self._server.stdin is not None
            self._server.stdin.write(question + "\n")
            self._server.stdin.flush()
            return self._answer()

    def hold(self) -> None:
        """Reads of the slow file wait from now on, as they do at first."""
        self.holds = self._ask("hold") != ""

    def let_go(self) -> None:
        """All are answered."""
        self.holds = self._ask("go") == ""

    def waiting(self) -> int:
        """Reads that wait now."""
        return int(self._ask("waiting"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server. Nothing of its files is open any more."""
        self.let_go()
        with self._server:  # which waits for it
            pass


def loop_device(file: Path) -> tuple[int, str]:
    """A drive that reads from `file`: its descriptor and its path, for as long as that is open."""
    get_free, configure = 0x4C82, 0x4C0A  # LOOP_CTL_GET_FREE, LOOP_CONFIGURE (linux/loop.h)
    read_only, autoclear = 1, 4
    with open("/dev/loop-control", "rb") as control, file.open("rb") as backing:
        while True:
            path = f"/dev/loop{fcntl.ioctl(control, get_free)}"
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            flags = struct.pack("=52xI176x", read_only | autoclear)
            try:
                fcntl.ioctl(
                    device, configure, struct.pack("=II", backing.fileno(), 0) + flags + bytes(64)
                )
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # somebody else was faster
                    raise
            else:
                return device, path


# ---- The server

_IN = struct.Struct("=IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, padding
_OUT = struct.Struct("=IiQ")  # length, error, unique
_ROOT = 1

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _RELEASEDIR, _INTERRUPT, _DESTROY, _BATCH_FORGET = (
    25,
    26,
    27,
    29,
    36,
    38,
    42,
)
_UNANSWERED = (_FORGET, _INTERRUPT, _BATCH_FORGET)


class _Server:
    def __init__(self, where: str) -> None:
        self._device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other"
        _call("mount", b"slow", where.encode(), b"fuse", 0, options.encode())
        self._names = list(FILES)
        self._changed = threading.Condition()
        self._held = True
        self._waiting = 0

    def say(self, question: str) -> str:
        with self._changed:
            if question in ("hold", "go"):
                self._held = question == "hold"
                self._changed.notify_all()
            return str(self._waiting) if question == "waiting" else "done"

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, 2 << 20)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return  # it is not mounted any more
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            if opcode in _UNANSWERED:
                continue
            answer = self._answer(opcode, node, request[_IN.size :])
            number = answer if isinstance(answer, int) else 0
            body = b"" if isinstance(answer, int) else answer
            header = _OUT.pack(_OUT.size + len(body), -number, unique)
            os.write(self._device, header + body)

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes | int:
        """What the kernel is told, or an errno."""
        answers: dict[int, Callable[[], bytes | int]] = {
            _INIT: lambda: struct.pack(
                "=IIIIHHIIHHII24x", 7, 31, 1 << 17, 1, 64, 48, 1 << 17, 1, 0, 0, 0, 0
            ),
            _LOOKUP: lambda: self._found(body.rstrip(b"\0").decode()),
            _GETATTR: lambda: struct.pack("=QII", 3600, 0, 0) + self._attributes(node),
            _OPEN: lambda: struct.pack("=QII", 0, 0, 0),
            _OPENDIR: lambda: struct.pack("=QII", 0, 0, 0),
            _READ: lambda: self._contents(node, *struct.unpack_from("=8xQI", body)),
            _STATFS: lambda: struct.pack("=QQQQQIIII24x", 0, 0, 0, 0, 0, 4096, 255, 0, 0),
        }
        if opcode in (_RELEASE, _FLUSH, _RELEASEDIR, _DESTROY):
            return b""
        return answers[opcode]() if opcode in answers else errno.ENOSYS

    def _found(self, name: str) -> bytes | int:
        if name not in self._names:
            return errno.ENOENT
        node = self._names.index(name) + _ROOT + 1
        return struct.pack("=QQQQII", node, 1, 3600, 3600, 0, 0) + self._attributes(node)

    def _attributes(self, node: int) -> bytes:
        is_root = node == _ROOT
        size, mode = (0, stat.S_IFDIR | 0o755) if is_root else (SIZE, stat.S_IFREG | 0o644)
        numbers = (node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
        return struct.pack("=QQQQQQIIIIIIIIII", *numbers)

    def _contents(self, node: int, offset: int, size: int) -> bytes:
        name = self._names[node - _ROOT - 1]
        if name == "slow":
            with self._changed:
                self._waiting += 1
                self._changed.wait_for(lambda: not self._held)
                self._waiting -= 1
        return FILES[name] * max(0, min(size, SIZE - offset))


def main(where: str) -> None:
    set_death_signal = 1  # PR_SET_PDEATHSIG
    _call("prctl", set_death_signal, signal.SIGKILL, 0, 0, 0)
    server = _Server(where)
    for _ in range(16):
        threading.Thread(target=server.serve, daemon=True).start()
    print("ready", flush=True)
    for line in sys.stdin:
        print(server.say(line.strip()), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
