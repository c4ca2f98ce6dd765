"""Which ways are open on this host, to this drive, to this file; with evidence and remedy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from gdsdirect.check import Check, PathReport, Target, Verdict
from gdsdirect.stream import DataPath
from gdsdirect.sysfs import Sysfs

if TYPE_CHECKING:
    from gdsdirect.checks.nvme import Drive
    from gdsdirect.host import Host

SCHEMA_VERSION = 1
"""Of `Survey.to_dict`; it changes when a field goes or changes its meaning."""


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


def survey(
    *paths: str | bytes | os.PathLike[str] | os.PathLike[bytes], verify: bool = True
) -> Survey:
    """Look at this host, and at `paths` on it: files, folders, block devices, NVMe namespaces.

    With `verify`, a way is called open only if a read of a few kilobytes went that way into that
    kind of memory and brought the bytes that a plain read brings. It only reads. It never raises,
    but TypeError for what is no path.

    >>> found = survey("/dev/null", verify=False)
    >>> found.exit_code, found.paths[0].what
    (2, 'character device null')
    """
    from gdsdirect.host import Host

    return survey_host(Host(Sysfs()), [os.fsdecode(path) for path in paths], verify)


def survey_host(host: Host, paths: Iterable[str], verify: bool) -> Survey:
    """The same of any host, such as a recorded one."""
    # Not at import time: it is much code, and most programs never ask.
    from gdsdirect.checks import environment, kernel, nvidia, nvme, peer
    from gdsdirect.checks.paths import PathFacts, describe
    from gdsdirect.ways import HostFacts, judge

    drives = nvme.find_drives(host)
    providers = peer.find_providers(host)
    of_kernel = kernel.checks(host)
    of_drives = nvme.checks(host, drives)
    of_peers = peer.checks(host, drives, providers)
    of_nvidia = nvidia.find_nvidia(host)
    facts = HostFacts(
        {check.name: check for check in (*of_kernel, *of_peers)},
        providers,
        of_nvidia,
    )
    given = list(paths)
    # What a recording was asked about is asked again.
    recorded = _strings(host.ask("asked", lambda: given))
    asked = given or recorded
    subjects = [describe(host, path) for path in asked or _subjects(host, drives)]
    if not subjects:
        subjects = [PathFacts("", "nothing", "", 0, (of_drives[0],))]
    reports = tuple(
        PathReport(one.path, one.what, one.checks, judge(host, facts, one, verify))
        for one in subjects
    )
    checks = (*of_kernel, *of_drives, *of_peers, *of_nvidia.checks, *environment.checks(host))
    return Survey(checks, _best(reports), reports, verify, bool(asked))


def _subjects(host: Host, drives: tuple[Drive, ...]) -> list[str]:
    """What is judged where no path is given: every namespace, and a file that is always there."""
    namespaces = [drive.path for drive in drives]
    return _strings(host.ask("subjects", lambda: [*namespaces, __file__])) or namespaces


def _strings(answer: Any) -> list[str]:
    return [item for item in answer if isinstance(item, str)] if isinstance(answer, list) else []


def _best(reports: tuple[PathReport, ...]) -> tuple[Verdict, ...]:
    """For each way and kind of memory, the verdict that promises most."""
    best: dict[tuple[DataPath, Target], Verdict] = {}
    for verdict in (verdict for report in reports for verdict in report.verdicts):
        key = (verdict.way, verdict.target)
        if key not in best or _promise(verdict) > _promise(best[key]):
            best[key] = verdict
    return tuple(best.values())


def _promise(verdict: Verdict) -> tuple[bool, bool, int]:
    return verdict.verified, verdict.open, -len(verdict.closed_by)


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
