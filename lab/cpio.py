"""The archive format that the kernel unpacks as its first root file system (cpio, "newc")."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from stat import S_IFDIR, S_IFLNK, S_IFREG


@dataclass(frozen=True)
class Entry:
    """One path, relative to the root; `mode` holds the type and the permissions."""

    path: str
    mode: int
    data: bytes = b""


def file(path: str, data: bytes, permissions: int = 0o644) -> Entry:
    return Entry(path, S_IFREG | permissions, data)


def link(path: str, target: str) -> Entry:
    return Entry(path, S_IFLNK | 0o777, target.encode())


def folder(path: str) -> Entry:
    return Entry(path, S_IFDIR | 0o755)


def archive(entries: Iterable[Entry]) -> bytes:
    """`entries` and the folders they lie in; archives may be appended to one another."""
    trailer = Entry("TRAILER!!!", 0)
    whole = [*_with_parents(entries), trailer]
    return b"".join(_packed(number, entry) for number, entry in enumerate(whole, 1))


def _with_parents(entries: Iterable[Entry]) -> Iterator[Entry]:
    seen = {"."}
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.path).parents):
            if str(parent) not in seen:
                seen.add(str(parent))
                yield folder(str(parent))
        seen.add(entry.path)
        yield entry


def _packed(number: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, 4 device numbers, name's length, checksum
    fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(head + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
