"""A survey as a page to read: verdicts first, then what stands in the way, then the rest."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

from gdsdirect.check import Check, Status, Survey, Verdict

_WIDTH = 100  # columns at most, which are easier to read than a wide terminal's
_COLOURS = {"good": "32", "fair": "33", "bad": "31", "title": "1", "quiet": "2"}
_MARKS = {
    Status.OK: ("ok", "good"),
    Status.WARN: ("warn", "fair"),
    Status.MISSING: ("missing", "bad"),
    Status.NOT_APPLICABLE: ("n/a", "quiet"),
}
_SUMMARIES = {
    0: ("A direct way is open: drives write where the GPU reads.", "good"),
    1: ("No direct way is open: bytes go through host memory.", "fair"),
    2: ("No way is open.", "bad"),
}


def print_report(survey: Survey, output: TextIO | None = None) -> None:
    """Write the page to `output`, standard output by default; in colours on a terminal."""
    file = output or sys.stdout
    coloured = file.isatty()
    width = min(shutil.get_terminal_size((_WIDTH, 0)).columns, _WIDTH)
    for text, style in _page(survey, width):
        code = _COLOURS.get(style)
        # A path can hold bytes that are no text.
        shown = text.encode("utf-8", "backslashreplace").decode()
        print(f"\x1b[{code}m{shown}\x1b[0m" if coloured and code and text else shown, file=file)


def _page(survey: Survey, width: int) -> Iterator[tuple[str, str]]:
    text, style = _SUMMARIES[survey.exit_code]
    worst = survey.asked and len(survey.paths) > 1
    yield text + (" (To the worst of the paths.)" if worst else ""), style
    for report in survey.paths:
        yield "", ""
        yield f"{report.path or 'No path'}: {report.what}", "title"
        for verdict in report.verdicts:
            yield from _verdict(verdict, width)
    yield from _in_the_way(survey, width)
    yield from _rest(survey, width)


def _verdict(verdict: Verdict, width: int) -> Iterator[tuple[str, str]]:
    if verdict.open:
        word = "open, verified" if verdict.verified else "open, not tried"
        style = "good" if verdict.verified else "fair"
    else:
        word, style = "closed", "bad"
    where = verdict.target.value + (f" of {verdict.provider}" if verdict.provider else "")
    yield f"  {word:16}{verdict.way.name} into {where}", style
    told_below = not verdict.open and verdict.trial is None
    why = f"by {', '.join(verdict.closed_by)}" if told_below else verdict.why
    yield from _wrapped(why, width, 18)


def _in_the_way(survey: Survey, width: int) -> Iterator[tuple[str, str]]:
    """The checks that close a way, each once, with what mends it."""
    closing = {name for report in survey.paths for one in report.verdicts for name in one.closed_by}
    checks = [check for check in _all_checks(survey) if check.status is Status.MISSING]
    shown = [check for check in checks if check.name in closing]
    if not shown:
        return
    yield "", ""
    yield "What stands in the way", "title"
    for check in shown:
        yield f"  {_label(check)}", "bad"
        yield from _wrapped(check.why, width, 6)
        for seen in check.evidence:
            yield from _wrapped(f"{seen.source}: {_short(seen.text)}", width, 6)
        if check.remedy:
            # Never wrapped: it is to be copied.
            yield f"      remedy: {check.remedy}", "good"


def _rest(survey: Survey, width: int) -> Iterator[tuple[str, str]]:
    yield "", ""
    yield "All facts", "title"
    for check in _all_checks(survey):
        word, style = _MARKS[check.status]
        yield f"  {word:8}{_label(check)}", style
        yield from _wrapped(check.why, width, 10)


def _all_checks(survey: Survey) -> list[Check]:
    own: list[Check] = []
    for report in survey.paths:
        own += report.checks
    return list(dict.fromkeys((*survey.checks, *own)))


def _label(check: Check) -> str:
    return check.name + (f" ({check.subject})" if check.subject else "")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:200] + " …"


def _wrapped(text: str, width: int, indent: int) -> Iterator[tuple[str, str]]:
    blanks = " " * indent
    for line in textwrap.wrap(text, max(width - indent, 20), break_on_hyphens=False):
        yield blanks + line, "quiet"
