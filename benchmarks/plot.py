"""The results as a picture: each ratio a dot, with its quartiles and what it should be."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.results import MORE_IS_BETTER, Result
from benchmarks.rows import Bound, said

_INK, _QUIET, _FAINT, _ALLOWED = "#1f2933", "#7b8794", "#e4e7eb", "#e3f4ee"
_COLOURS = {True: "#0b8a6a", False: "#d64545", None: "#829ab1"}
_MEANINGS = {True: "bound reached", False: "bound missed", None: "no bound"}
_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20)
_LEAST = 0.08  # what is less is an arrow at the edge
_STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": _INK}

# Inches, across: margin, what is compared, the scale, its figures, margin. Then downwards.
_MARGIN, _NAMES, _SCALE, _FIGURES = 0.3, 3.7, 5.0, 1.7
_WIDTH = _MARGIN + _NAMES + _SCALE + _FIGURES
_HEAD, _LINE, _GAP, _FOOT = 1.3, 0.23, 0.9, 0.75

_Rows = list[tuple[str, list[Result]]]


def draw(path: Path, results: Sequence[Result], machine: dict[str, str]) -> None:
    """Panels of what is better small, of what is better large, and of differences."""
    ratios = [result for result in results if not result.is_difference]
    less, more, differences = (
        _rows(result for result in ratios if result.unit not in MORE_IS_BETTER),
        _rows(result for result in ratios if result.unit in MORE_IS_BETTER),
        _rows(result for result in results if result.is_difference),
    )
    every = (
        ("Time, CPU and memory: less is better", less),
        ("IOPS and rates: more is better", more),
        ("Time and memory on top, as a part of what was set out: less is better", differences),
    )
    panels = [(title, rows, _lines(rows) * _LINE) for title, rows in every if rows]
    height = _HEAD + sum(panel for *_, panel in panels) + _GAP * (len(panels) - 1) + _FOOT
    left = _MARGIN / _WIDTH
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height))
        figure.text(left, 1 - 0.45 / height, "gdsdirect beside others", size=16, weight="bold")
        told = "   ·   ".join(machine[key] for key in ("processor", "kernel", "Python", "when"))
        figure.text(left, 1 - 0.7 / height, told, size=8, color=_QUIET)
        _legend(figure, height)
        top = height - _HEAD
        for title, rows, panel in panels:
            figure.text(left, (top + 0.1) / height, title, size=10, color=_QUIET)
            bottom = (top - panel) / height
            place = ((_MARGIN + _NAMES) / _WIDTH, bottom, _SCALE / _WIDTH, panel / height)
            _panel(figure.add_axes(place), rows)
            top -= panel + _GAP
        figure.savefig(path, dpi=160, facecolor="white")


def _rows(results: Iterable[Result]) -> _Rows:
    return [(row, list(some)) for row, some in groupby(results, lambda result: result.row)]


def _lines(rows: _Rows) -> int:
    return sum(1 + len(results) for _, results in rows)


def _panel(axis: Axes, rows: _Rows) -> None:
    axis.set_xscale("log")
    axis.set_xlim(*_limits(rows))
    axis.set_ylim(_lines(rows) - 0.5, -0.5)
    axis.xaxis.set_major_locator(FixedLocator(_TICKS))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axis.set_yticks([])
    axis.tick_params(length=0, colors=_QUIET)
    axis.spines[:].set_visible(False)
    axis.grid(axis="x", color=_FAINT, linewidth=0.8)
    axis.axvline(1, color=_QUIET, linewidth=0.9)
    axis.set_axisbelow(True)
    line = 0
    for row, results in rows:
        _write(axis, -_NAMES, line, row, weight="bold")
        for below, result in enumerate(results, 1):
            _ratio(axis, line + below, result)
        line += 1 + len(results)


def _limits(rows: _Rows) -> tuple[float, float]:
    """All that there is and all that should be, with some room, but not for what is far off."""
    results = [result for _, some in rows for result in some]
    shown = [number for result in results for number in _drawn(result)]
    shown += [_limit(result.bound) for result in results if result.bound]
    return max(min(*shown, 1), _LEAST) / 1.2, max(*shown, 1) * 1.2


def _limit(bound: Bound) -> float:
    return 1 if bound.unit else bound.limit


def _drawn(result: Result) -> tuple[float, float, float]:
    """The quartiles; of a difference as parts of its bound."""
    whole = result.bound.limit if result.bound and result.bound.unit else 1
    first, median, third = (figure / whole for figure in result.quartiles)
    return first, median, third


def _ratio(axis: Axes, line: int, result: Result) -> None:
    first, median, third = _drawn(result)
    colour = _COLOURS[result.reached]
    if result.bound:
        limit, (least, most) = _limit(result.bound), axis.get_xlim()
        begin, end = (least, limit) if result.bound.at_most else (limit, most)
        axis.barh(line, end - begin, 0.64, begin, color=_ALLOWED, zorder=0.5)
        axis.vlines(limit, line - 0.32, line + 0.32, color=_INK, linewidth=1.5)
    axis.hlines(line, first, third, color=colour, linewidth=2.4)
    marker, place = ("o", median) if median >= _LEAST else ("<", _LEAST)
    axis.plot(place, line, marker, color=colour, markersize=6.5, markeredgecolor="white")
    over = f"  over  {result.over}" if result.over else ""
    figure = said(result.quartiles[1], result.unit) if result.is_difference else f"{median:.2f}"
    _write(axis, 0.15 - _NAMES, line, f"{result.of}{over}")
    _write(axis, _SCALE + 0.2, line, figure, weight="bold", color=colour)
    _write(axis, _SCALE + 0.9, line, str(result.bound or ""), color=_QUIET)


def _write(
    axis: Axes, inches: float, line: int, text: str, *, weight: str = "normal", color: str = _INK
) -> None:
    """On a line, so far from where the scale begins."""
    axis.text(
        inches / _SCALE,
        line,
        text,
        transform=axis.get_yaxis_transform(),
        va="center",
        weight=weight,
        color=color,
    )


def _legend(figure: Figure, height: float) -> None:
    dots = [
        Line2D([], [], color=_COLOURS[reached], marker="o", linewidth=2.4, label=meaning)
        for reached, meaning in _MEANINGS.items()
    ]
    figure.legend(
        handles=[*dots, Patch(color=_ALLOWED, label="where it should be")],
        loc="upper right",
        bbox_to_anchor=(1 - _MARGIN / _WIDTH, 1 - 0.28 / height),
        ncols=4,
        frameon=False,
        fontsize=8,
        borderaxespad=0,
    )
