"""What a command in the guest has done to its machine: a drive unplugged, another one plugged in.

In the guest, /dev/lab takes requests, one a line, and gives a line back for each, in their order:
`ok` when QEMU has agreed, or `error` and why not. One process at a time can have it open. From a
shell, as root:

    exec 3<>/dev/lab; echo unplug data >&3; read answer <&3

The requests:

    unplug SERIAL       ask the kernel to let a drive go, as the button at its slot does: it waits
                        for the commands in flight, takes no more, and the drive is out
    plug SERIAL BYTES   a drive of that size into the slot that `unplug` left: what the image of the
                        old one began with, read-only, in blocks of 512 bytes, its namespace id 1
                        (QEMU can't add a namespace that says more to a running machine)

A namespace that is in use can't be made smaller: QEMU's nvme doesn't allow its image to be resized
(block_resize: a conflict of permissions), and never looks at its size again.
"""

import contextlib
import json
import re
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lab.drives import Drive, image_of

DEVICE = "/dev/lab"
_LONGEST_REQUEST = 1024
_SECONDS_TO_READ = 1
_TAKES = {"unplug": "SERIAL", "plug": "SERIAL BYTES"}

Command = tuple[str, dict[str, Any]]
"""Of QEMU's monitor: its name and its arguments."""


class Control:
    """The host's ends of /dev/lab and of QEMU's monitor, and the passing on between them.

    The caller selects on `sockets` and calls `receive`, which doesn't wait. Requests are dealt with
    one after the other. QEMU gets the other ends as open descriptors: there is nothing to find or
    to clean up, and it lets go of them when it ends.
    """

    def __init__(self, drives: Sequence[Drive], folder: Path) -> None:
        self._drives = {drive.serial: drive for drive in drives}
        self._folder = folder
        self._out: set[str] = set()
        """The serials of the drives that are not in their slots."""
        self._plugged = 0
        self._guest, self._guest_far = socket.socketpair()
        self._monitor, self._monitor_far = socket.socketpair()
        self._guest.settimeout(_SECONDS_TO_READ)
        self._received = {self._guest: b"", self._monitor: b""}
        self._requests: deque[str] = deque()
        self._to_ask: list[Command] = []
        """What is left to be asked for the request in hand; the first of it was asked."""
        self._say_to_monitor({"execute": "qmp_capabilities"})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for end in (self._guest, self._guest_far, self._monitor, self._monitor_far):
            end.close()

    # ---- What QEMU needs

    @property
    def descriptors(self) -> tuple[int, int]:
        """What QEMU inherits: its ends of /dev/lab and of the monitor."""
        return self._guest_far.fileno(), self._monitor_far.fileno()

    def arguments(self) -> list[str]:
        """The part of QEMU's command line that is about them. In the guest, /dev/lab is port 3."""
        guest, monitor = self.descriptors
        return [
            *("-chardev", f"socket,id=requests,fd={guest}"),
            *("-device", "virtserialport,bus=ports.0,nr=3,chardev=requests"),
            *("-chardev", f"socket,id=monitor,fd={monitor}"),
            *("-mon", "chardev=monitor,mode=control"),
        ]

    def started(self) -> None:
        """QEMU has its ends."""
        self._guest_far.close()
        self._monitor_far.close()

    # ---- Lines in

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """What something may be received from."""
        return list(self._received)

    def receive(self, end: socket.socket) -> None:
        """Deal with what has come from one of `sockets`, which is readable."""
        try:
            data = end.recv(1 << 16)
        except OSError:
            data = b""
        if not data or end not in self._received:  # QEMU is gone, or nobody reads answers
            self._received.pop(end, None)
            return
        *lines, rest = (self._received[end] + data).split(b"\n")
        if end is self._guest:
            self._received[end] = rest[:_LONGEST_REQUEST]
            self._requests += [line[:_LONGEST_REQUEST].decode(errors="replace") for line in lines]
        else:
            self._received[end] = rest
            for line in lines:
                self._heard(json.loads(line))
        while self._requests and not self._to_ask:
            self._begin(self._requests.popleft())

    def _begin(self, request: str) -> None:
        try:
            name, drive, nbytes = understood(request, self._drives)
            self._to_ask = self._unplug(drive) if name == "unplug" else self._plug(drive, nbytes)
        except ValueError as wrong:
            self._answer(f"error {wrong}")
        else:
            self._ask()

    def _heard(self, message: Mapping[str, Any]) -> None:
        """From the monitor: an event, or what came of the command asked."""
        if message.get("event") == "DEVICE_DELETED":
            self._out.add(message["data"].get("device", ""))
        elif message.get("id") != "request":
            return
        elif "error" in message:
            self._to_ask.clear()
            self._answer(f"error {message['error']['desc']}")
        else:
            name, arguments = self._to_ask.pop(0)
            if name == "device_add":
                self._out.remove(arguments["id"])
            if self._to_ask:
                self._ask()
            else:
                self._answer("ok")

    # ---- Lines out

    def _ask(self) -> None:
        name, arguments = self._to_ask[0]
        self._say_to_monitor({"execute": name, "arguments": arguments, "id": "request"})

    def _say_to_monitor(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # QEMU is gone
            self._monitor.sendall(json.dumps(message).encode() + b"\n")

    def _answer(self, line: str) -> None:
        try:
            self._guest.sendall(" ".join(line.split()).encode() + b"\n")
        except OSError:  # QEMU is gone, or nobody reads: no more answers then
            self._received.pop(self._guest, None)
            self._requests.clear()

    # ---- Requests

    def _unplug(self, drive: Drive) -> list[Command]:
        return [("device_del", {"id": drive.serial})]

    def _plug(self, drive: Drive, nbytes: int) -> list[Command]:
        if drive.serial not in self._out:
            raise ValueError(f"{drive.serial} is in its slot: unplug it, and wait until it is out")
        if not 0 < nbytes <= drive.nbytes or nbytes % 512:
            raise ValueError(
                f"{nbytes} bytes for {drive.serial}: use blocks of 512, and at most {drive.nbytes}"
            )
        self._plugged += 1
        node = f"plugged-{self._plugged}"
        file = {"driver": "file", "filename": str(image_of(drive, self._folder)), "read-only": True}
        image = {"driver": "raw", "node-name": node, "size": nbytes, "read-only": True}
        place = {"id": drive.serial, "serial": drive.serial, "bus": f"{drive.serial}.port"}
        return [
            ("blockdev-add", {**image, "file": file}),
            ("device_add", {"driver": "nvme", "drive": node, "mdts": drive.mdts, **place}),
        ]


def understood(request: str, drives: Mapping[str, Drive]) -> tuple[str, Drive, int]:
    """A request's name, drive and number of bytes (or 0); ValueError says what is wrong with it."""
    name, *words = request.split() or [""]
    if name not in _TAKES:
        raise ValueError(f"there is no request {name[:80]!r}; there are {', '.join(_TAKES)}")
    if len(words) != len(_TAKES[name].split()):
        raise ValueError(f"the request is {name} {_TAKES[name]}")
    if words[0] not in drives:
        raise ValueError(f"no drive has the serial {words[0][:80]!r}")
    nbytes = words[1] if len(words) > 1 else "0"
    if not re.fullmatch("[0-9]{1,15}", nbytes):
        raise ValueError(f"{nbytes[:80]!r} is not a number of bytes")
    return name, drives[words[0]], int(nbytes)
