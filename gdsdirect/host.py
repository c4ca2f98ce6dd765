"""The host that a survey looks at: this one, or one that was recorded.

A recording is a folder: the files that were read, below their own paths, and `answers.json`, what
calls answered that are no files (the ring's set-up, opening a device, a trial read). A survey of it
asks the same questions and comes to the same verdicts, on any machine.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gdsdirect.check import Evidence
from gdsdirect.errors import ring_module
from gdsdirect.sysfs import Sysfs

ANSWERS = "answers.json"

UNREADABLE = "cannot be read"
"""What evidence says of a file that is missing or refused."""

NOT_RECORDED = "it was not recorded"
"""Why a recording has no answer to what a check asks."""

_ANSWERS_LIMIT = 1 << 24  # bytes
_MOST = (1 << 63) - 1  # of a size
_MOST_ERRNO = 4095  # MAX_ERRNO, linux/err.h

_KINDS = (
    (stat.S_ISREG, "file"),
    (stat.S_ISBLK, "block"),
    (stat.S_ISCHR, "char"),
    (stat.S_ISDIR, "folder"),
)


@dataclass(frozen=True, slots=True)
class Stat:
    """stat(2) of a path: `errno` is 0, or why there is none, and None where it was not recorded.

    `kind` is "file", "block", "char", "folder" or "other", `dev` and `rdev` are "major:minor",
    `real` is the path without links.
    """

    errno: int | None = None
    kind: str = ""
    size: int = 0
    dev: str = ""
    rdev: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    real: str = ""


class Host:
    """Files by `sysfs`, and calls by the other methods, which answer with plain JSON values.

    With `answers`, nothing is called: the answers are taken from there, and are None for what was
    not recorded. Nothing here raises.
    """

    def __init__(self, sysfs: Sysfs, answers: Mapping[str, Any] | None = None) -> None:
        self.sysfs = sysfs
        self.answers = answers

    @property
    def is_recorded(self) -> bool:
        """Whether this is a recording, where nothing can be tried."""
        return self.answers is not None

    def look(self, *parts: str) -> Evidence:
        """A small file's text, for a check to show."""
        path = os.path.join("/", *parts)
        text = self.sysfs.read(path)
        return Evidence(path, UNREADABLE if text is None else text)

    def ask(self, question: str, call: Callable[[], Any]) -> Any:
        """What `call` answers, a JSON value; {"errno": ...} where it fails with an OSError."""
        if self.answers is not None:
            return self.answers.get(question)
        try:
            return call()
        except OSError as error:
            return {"errno": error.errno or errno.EIO}
        except ValueError:  # a path with a NUL in it
            return {"errno": errno.EINVAL}

    # ---- Questions

    def io_uring(self) -> dict[str, int]:
        """By feature 0 or an errno: see csrc/ask.c. Empty where gdsdirect was built without."""
        answer = self.ask("io_uring", _ask_io_uring)
        return {name: value for name, value in numbers(answer).items() if value <= _MOST_ERRNO}

    def open_error(self, path: str, flags: int = os.O_RDONLY) -> int | None:
        """0 if this user may open `path`, else the errno; None where it was not recorded."""
        mode = "rw" if flags & os.O_RDWR else "r"
        direct = " O_DIRECT" if flags & getattr(os, "O_DIRECT", 0) else ""
        answer = self.ask(f"open {path} {mode}{direct}", lambda: _try_open(path, flags))
        return numbers(answer).get("errno")

    def stat(self, path: str) -> Stat:
        """What `path` is."""
        answer = self.ask(f"stat {path}", lambda: _stat(path))
        # A recording can hold anything.
        given: dict[str, Any] = {**texts(answer), **numbers(answer)}
        of_type = {
            field.name: given[field.name]
            for field in fields(Stat)
            if field.name in given and isinstance(given[field.name], str) == (field.type == "str")
        }
        return Stat(**of_type)

    def environment(self, name: str) -> str:
        """A variable of the environment, empty where it is not set."""
        answer = self.ask(f"environment {name}", lambda: {"value": os.environ.get(name, "")})
        return texts(answer).get("value", "")

    def direct_alignment(self, path: str) -> tuple[int, int] | None:
        """What O_DIRECT wants of memory and offset, in bytes; None where it isn't told."""
        answer = self.ask(f"direct_alignment {path}", lambda: _direct_alignment(path))
        found = numbers(answer)
        return (found["memory"], found["offset"]) if {"memory", "offset"} <= found.keys() else None


@contextlib.contextmanager
def opened(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of any file, to look at. Not blocking: a FIFO would wait for its other end."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        yield fd
    finally:
        os.close(fd)


def read_answers(folder: str) -> dict[str, Any]:
    """The answers of a recording. ValueError, with what to give instead, for what is none."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no folder: give one that `gdsdirect check --record` made")
    content = Sysfs(folder).read_bytes(f"/{ANSWERS}", _ANSWERS_LIMIT)
    try:
        answers = json.loads(content or b"{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder}/{ANSWERS} is not JSON ({error}): record it again") from None
    if not isinstance(answers, dict):
        raise ValueError(f"{folder}/{ANSWERS} is not a JSON object: record it again")
    return answers


def numbers(answer: Any) -> dict[str, int]:
    """The members of an answer that are numbers, as a count, a size or an errno is one."""
    known = answer if isinstance(answer, dict) else {}
    return {
        name: value
        for name, value in known.items()
        if type(value) is int and 0 <= value <= (_MOST_ERRNO if name == "errno" else _MOST)
    }


def texts(answer: Any) -> dict[str, str]:
    """The members of an answer that are strings."""
    known = answer if isinstance(answer, dict) else {}
    return {name: value for name, value in known.items() if isinstance(value, str)}


def _ask_io_uring() -> dict[str, int]:
    try:
        answers: dict[str, int] = ring_module().ask_io_uring()
    except RuntimeError:
        return {}
    return answers


def _try_open(path: str, flags: int) -> dict[str, int]:
    with opened(path, flags):
        return {"errno": 0}


def _stat(path: str) -> dict[str, Any]:
    info = os.stat(path)
    kind = next((name for test, name in _KINDS if test(info.st_mode)), "other")
    return {
        "errno": 0,
        "kind": kind,
        "size": info.st_size,
        "dev": f"{os.major(info.st_dev)}:{os.minor(info.st_dev)}",
        "rdev": f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}",
        "mode": stat.S_IMODE(info.st_mode),
        "uid": info.st_uid,
        "gid": info.st_gid,
        "real": os.path.realpath(path),
    }


def _direct_alignment(path: str) -> dict[str, int]:
    try:
        with opened(path) as fd:
            found = ring_module().direct_alignment(fd)
    except RuntimeError:
        return {}
    return {} if found is None else dict(zip(("memory", "offset"), found, strict=True))
