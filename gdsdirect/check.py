"""What a survey consists of: facts with their evidence, and verdicts that rest on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from gdsdirect.stream import DataPath


class Status(StrEnum):
    """How a fact stands to reading into GPU-visible memory."""

    OK = "ok"
    """As it should be."""

    WARN = "warn"
    """It works, with less than there could be; or it could not be told."""

    MISSING = "missing"
    """It stands in the way of at least one way."""

    NOT_APPLICABLE = "not applicable"
    """The question does not arise here."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was read, as read: `text` from the file or call `source`."""

    source: str
    text: str

    @property
    def number(self) -> int | None:
        """The text as a decimal number, or None if it is none."""
        return int(self.text) if re.fullmatch("[0-9]{1,20}", self.text) else None


@dataclass(frozen=True, slots=True)
class Check:
    """One fact.

    `name` is the same on every host ("kernel.io_uring"); `subject` is what it is about where there
    are several (a device, a pair of them, a path), else None. `why` is what the evidence means, and
    `remedy` a command or setting that mends it, where there is one.
    """

    name: str
    status: Status
    why: str
    evidence: tuple[Evidence, ...] = ()
    remedy: str | None = None
    subject: str | None = None


class Target(StrEnum):
    """The kind of memory that a way leads into."""

    PEER = "peer memory"
    """Memory of another PCI device, such as a GPU's BAR1 with P2PDMA pages."""

    GPU = "GPU memory"
    """Memory of CUDA's, which only NVIDIA's cuFile reaches directly."""

    HOST = "host memory"
    """RAM, from where a copy to the GPU remains."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A small read that was done: `nbytes` by the way, and the same bytes plainly.

    `ok` if both were the same. `compared_with` names the plain read, `error` says what failed.
    """

    ok: bool
    nbytes: int = 0
    compared_with: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether bytes can go one way into one kind of memory.

    `provider` is the PCI address of the device whose memory it is, for peer memory. `verified` if
    `open` rests on a read that was done (`trial`), and not on facts alone. A way that is not open
    is `closed_by` the named checks, whose `remedy` comes first, or by the trial's error.
    """

    way: DataPath
    target: Target
    open: bool
    why: str
    provider: str | None = None
    verified: bool = False
    trial: Trial | None = None
    closed_by: tuple[str, ...] = ()
    remedy: str | None = None

    @property
    def direct(self) -> bool:
        """Whether the drive writes where the GPU's memory is, with no copy after it."""
        return self.target is not Target.HOST


@dataclass(frozen=True, slots=True)
class PathReport:
    """What was asked about, what it is ("ext4 on /dev/nvme0n1p2"), its facts and its verdicts."""

    path: str
    what: str
    checks: tuple[Check, ...]
    verdicts: tuple[Verdict, ...]
