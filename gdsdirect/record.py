"""Recording a host: what a survey read and asked, as a folder to attach to a report.

Nothing in it tells whose host it is: no serial numbers, host names or network addresses. What is
not needed for the verdicts is left out of the files that could tell.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gdsdirect.checks.nvidia import parse_cufile_json
from gdsdirect.host import ANSWERS, Host
from gdsdirect.sysfs import Sysfs, find_extended_capability, parse_mounts

_SERIAL_CAPABILITY = 0x0003  # Device Serial Number, PCI Express Base Specification 5.0, 7.9.3
_SERIAL_BYTES = slice(4, 12)


@dataclass(frozen=True)
class _Recorder(Sysfs):
    """Notes all that is read, by its path without links."""

    files: dict[str, bytes] = field(default_factory=dict)
    folders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def read_bytes(self, path: str, limit: int = 1 << 16) -> bytes | None:
        content = super().read_bytes(path, limit)
        if content is not None:
            self.files[self._follow(path)] = content
        return content

    def entries(self, *parts: str) -> tuple[str, ...]:
        names = super().entries(*parts)
        if names:
            self.folders[self.resolve(*parts)] = names
        return names

    def exists(self, *parts: str) -> bool:
        found = super().exists(*parts)
        if found:
            place = self.resolve(*parts)
            if os.path.isdir(self._real(place)):
                self.folders.setdefault(place, ())
            else:
                self.files.setdefault(place, b"")
        return found

    def resolve(self, *parts: str) -> str:
        # Link by link, where the kernel would do it at once, so that each is noted.
        return self._follow(os.path.join("/", *parts))

    def _link(self, place: str) -> str | None:
        target = super()._link(place)
        if target is not None:
            self.links[place] = target
        return target


class RecordingHost(Host):
    """This host, or a recorded one, whose every answer is noted; `write` makes the recording."""

    def __init__(self, root: str = "/", answers: Mapping[str, Any] | None = None) -> None:
        self._recorder = _Recorder(root)
        self._noted: dict[str, Any] = {}
        super().__init__(self._recorder, answers)

    def ask(self, question: str, call: Callable[[], Any]) -> Any:
        answer = self._noted[question] = super().ask(question, call)
        return answer

    def write(self, folder: str) -> None:
        """Write the recording to `folder`, which must be new or empty (OSError)."""
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            text = "a recording goes into a new or an empty folder; this one has files in it"
            raise OSError(errno.ENOTEMPTY, text, folder)
        recorder = self._recorder
        scrub = _Scrubber(self._noted)
        noted = {*recorder.files, *recorder.folders, *recorder.links}
        above = {parent for place in noted for parent in _parents(place)}
        for place, names in recorder.folders.items():
            os.makedirs(folder + scrub.name(place), exist_ok=True)
            for path in (f"{place.rstrip('/')}/{name}" for name in names):
                if path not in noted and path not in above:
                    _write(folder + scrub.name(path), b"")
        for place, content in recorder.files.items():
            _write(folder + scrub.name(place), scrub.content(place, content))
        for place, target in recorder.links.items():
            link = folder + scrub.name(place)
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink(scrub.name(target), link)
        answers = json.dumps(self._noted, indent=1, sort_keys=True)
        _write(os.path.join(folder, ANSWERS), scrub.name(answers).encode())


def _parents(place: str) -> Iterator[str]:
    while place != "/":
        place = os.path.dirname(place)
        yield place


def _write(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


# ---- What is left out


# Host names that are everybody's, and that other files have in them for other reasons.
_COMMON_NAMES = frozenset({"localhost", "linux", "host", "data", "dev", "sys", "proc", "nvme"})


class _Scrubber:
    """Names and contents without what could tell whose they are."""

    def __init__(self, answers: dict[str, Any]) -> None:
        stats = (answer for answer in answers.values() if isinstance(answer, dict))
        self._places = [stat["real"] for stat in stats if isinstance(stat.get("real"), str)]
        node = platform.node()
        names = {node, node.partition(".")[0]} - _COMMON_NAMES - {""}
        longest_first = sorted(map(re.escape, names), key=len, reverse=True)
        words = rf"(?<![0-9A-Za-z])(?:{'|'.join(longest_first)})(?![0-9A-Za-z])"
        self._host = re.compile(words) if names else None

    def name(self, text: str) -> str:
        """Without the host's name, in files and their names alike, so that they still agree."""
        return self._host.sub("host", text) if self._host else text

    def content(self, place: str, content: bytes) -> bytes:
        """A file's content."""
        for pattern, reduce in _RULES:
            if re.fullmatch(pattern, place):
                content = reduce(content)
        if place.endswith("/mountinfo"):
            content = self._mounts(content)
        try:
            return self.name(content.decode()).encode()
        except UnicodeDecodeError:
            return content

    def _mounts(self, content: bytes) -> bytes:
        """The mounts of what was asked about, without sources on other hosts."""
        kept = []
        for mount in parse_mounts(content):
            if not any(map(mount.holds, self._places)):
                continue
            before, _, after = mount.line.partition(" - ")
            kind, source, listed = after.split(" ")[:3]
            if ":" in source or source.startswith("//"):
                source = "host:/"
            options = [o for o in listed.split(",") if o.partition("=")[0] in _MOUNT_OPTIONS]
            kept.append(f"{before} - {kind} {source} {','.join(options) or 'rw'}\n")
        return "".join(kept).encode()


_MOUNT_OPTIONS = ("rw", "ro", "data", "lowerdir", "upperdir", "workdir")


def _lines(*starts: str) -> Callable[[bytes], bytes]:
    """Keeps the lines that start so, each once."""

    def reduce(content: bytes) -> bytes:
        kept: dict[bytes, bytes] = {}
        for line in content.splitlines(keepends=True):
            for start in starts:
                if line.startswith(start.encode()):
                    kept.setdefault(start.encode(), line)
        return b"".join(kept.values())

    return reduce


def _containing(*words: str) -> Callable[[bytes], bytes]:
    """Keeps the lines with one of the words in them."""

    def reduce(content: bytes) -> bytes:
        wanted = [word.encode() for word in words]
        lines = content.splitlines(keepends=True)
        return b"".join(line for line in lines if any(word in line for word in wanted))

    return reduce


def _config(content: bytes) -> bytes:
    # With a line before it and one after it, as it is looked for.
    return b"#\n" + _containing("CONFIG_PCI=", "P2PDMA")(content)


def _packed_config(content: bytes) -> bytes:
    try:
        return gzip.compress(_config(gzip.decompress(content)), mtime=0)
    except (OSError, EOFError):
        return b""


def _processor(content: bytes) -> bytes:
    flags = (
        b"flags\t\t: hypervisor\n" if re.search(rb"^flags.*\bhypervisor\b", content, re.M) else b""
    )
    return _lines("vendor_id", "cpu family")(content) + flags


def _fabrics_address(content: bytes) -> bytes:
    # "traddr=192.0.2.1,trsvcid=4420"; a PCI address has no "=".
    return re.sub(rb"=[^,\n]*", b"=", content)


def _uuids(content: bytes) -> bytes:
    zeros = b"00000000-0000-0000-0000-000000000000"
    return re.sub(rb"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", zeros, content)


def _driver(content: bytes) -> bytes:
    # A driver built here names who built it: "Release Build  (root@host)".
    return re.sub(rb"\([^()\n]*@[^()\n]*\)", b"()", content)


def _cufile(content: bytes) -> bytes:
    if not content:  # of a file that was looked for, and not read
        return content
    settings = parse_cufile_json(content.decode("utf-8", "replace"))
    if settings is None:
        return b"not JSON"
    nested: dict[str, Any] = {}
    for path, value in settings.items():
        *above, last = path.split(".")
        inner = nested
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return json.dumps(nested).encode()


def _configuration_space(content: bytes) -> bytes:
    place = find_extended_capability(content, _SERIAL_CAPABILITY)
    if place is None:
        return content
    scrubbed = bytearray(content)
    start, stop = place + _SERIAL_BYTES.start, place + _SERIAL_BYTES.stop
    scrubbed[start:stop] = bytes(len(scrubbed[start:stop]))
    return bytes(scrubbed)


_RULES: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    (r"/proc/[^/]+/status", _lines("Uid", "Gid", "CapEff", "Seccomp:")),
    (r"/proc/[^/]+/limits", _lines("Max locked memory")),
    (r"/proc/cpuinfo", _processor),
    (r"/proc/kallsyms", _containing("p2pdma")),
    (r"/proc/config\.gz", _packed_config),
    (r"/boot/config-.*|/lib/modules/.*/config|/usr/lib/modules/.*/config", _config),
    (r"/proc/driver/nvidia/version", _driver),
    (r"/proc/driver/nvidia/params", _containing("RegistryDwords:")),
    (r"/proc/driver/nvidia-fs/stats", _uuids),
    # Whatever file the environment names as cufile.json.
    (r"(?!/(?:boot|etc/ld\.so\.conf\.d|lib|proc|run|sys|usr)/).+", _cufile),
    (r"/sys/.*/nvme\d+/address", _fabrics_address),
    (r"/sys/.*/config", _configuration_space),
)
