"""Which ways are open on this host, to this drive, to this file; with evidence and remedy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gdsdirect.stream import DataPath

if TYPE_CHECKING:
    from gdsdirect.check import PathReport, Survey, Target, Verdict
    from gdsdirect.checks.nvme import Drive
    from gdsdirect.host import Host


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
    from gdsdirect.sysfs import Sysfs

    return survey_host(Host(Sysfs()), [os.fsdecode(path) for path in paths], verify)


def survey_host(host: Host, paths: Iterable[str], verify: bool) -> Survey:
    """The same of any host, such as a recorded one."""
    # Not at import time: it is much code, and most programs never ask.
    from gdsdirect.check import PathReport, Survey
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
