"""What a survey consists of: facts with their evidence, and verdicts that rest on them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum, StrEnum
from typing import Any

from gdsdirect.stream import DataPath

SCHEMA_VERSION = 1
"""Of `Survey.to_dict`; it changes when a field goes or changes its meaning."""


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


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found.

    `checks` are the facts of the host, `paths` what was asked about (where nothing was: every NVMe
    namespace, and one of gdsdirect's own files), with facts and verdicts of their own. `verdicts`
    has for each way, into each kind of memory, the best of these. `verify` tells whether reads were
    tried, and `asked` whether paths were given.
    """

    checks: tuple[Check, ...]
    verdicts: tuple[Verdict, ...]
    paths: tuple[PathReport, ...]
    verify: bool
    asked: bool

    @property
    def exit_code(self) -> int:
        """0 if a direct way is open, 1 if only others are, 2 if none is; for the worst path asked.

        Direct is what leads into peer memory or a GPU's, with no copy after it.
        """
        if not self.asked:
            return _exit_code(self.verdicts)
        return max(_exit_code(report.verdicts) for report in self.paths)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values, as `gdsdirect check --json` prints: see survey.schema.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verify": self.verify,
            "exit_code": self.exit_code,
            "verdicts": [_plain(verdict) for verdict in self.verdicts],
            "paths": [_plain(report) for report in self.paths],
            "checks": [_plain(check) for check in self.checks],
        }


def _exit_code(verdicts: tuple[Verdict, ...]) -> int:
    opened = [verdict for verdict in verdicts if verdict.open]
    if any(verdict.direct for verdict in opened):
        return 0
    return 1 if opened else 2


def _plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, members of enumerations by their value."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
