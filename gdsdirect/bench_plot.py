"""What `gdsdirect bench` measured, as a picture: a panel for each block size, a line for each way.

Imports matplotlib, which the rest of the package does without.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, BinaryIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from gdsdirect.bench import Measured, Results
from gdsdirect.bench_report import readable, size_text, summary
from gdsdirect.stream import DataPath

_INK, _QUIET, _FAINT = "#1f2933", "#7b8794", "#e4e7eb"
# Colour, line and marker's size: of lines on each other both are seen.
_LINES = {
    DataPath.NVME_PASSTHROUGH: ("#7048b6", "-", 6.0),
    DataPath.FILE_FIXED: ("#0b8a6a", "-", 6.0),
    DataPath.FILE_DIRECT: ("#2f6fb5", (0, (3, 2)), 4.0),
    DataPath.BUFFERED: ("#d98e04", "-", 6.0),
}
_STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": _INK}
_MIB = 1 << 20

# Inches. A panel's scales are in its gaps: MiB/s at its left, IOPS at its right.
_SIDE, _PANEL, _GAP = 0.75, 2.7, 1.35
_HEAD, _HEIGHT, _BETWEEN, _FOOT = 1.45, 2.4, 0.95, 0.65
_MARGIN = 0.3
_ACROSS = 3  # panels at most
_LONGEST = 90  # characters of a path


def draw(output: BinaryIO, results: Results) -> None:
    """Write a PNG."""
    sizes = list(dict.fromkeys(each.cell.block_size for each in results.cells))
    across = min(max(len(sizes), 2), _ACROSS)
    down = max(1, -(-len(sizes) // across))
    width = 2 * _SIDE + across * _PANEL + (across - 1) * _GAP
    height = _HEAD + down * _HEIGHT + (down - 1) * _BETWEEN + _FOOT
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        _write_head(figure, results)
        for number, size in enumerate(sizes):
            line, place = divmod(number, across)
            left = _SIDE + place * (_PANEL + _GAP)
            bottom = height - _HEAD - (line + 1) * _HEIGHT - line * _BETWEEN
            box = (left / width, bottom / height, _PANEL / width, _HEIGHT / height)
            cells = [each for each in results.cells if each.cell.block_size == size]
            _panel(figure.add_axes(box), size, cells)
        figure.savefig(output, format="png", dpi=160, facecolor="white")


def _write_head(figure: Figure, results: Results) -> None:
    width, height = figure.get_size_inches()
    path = readable(results.settings.path)
    if len(path) > _LONGEST:
        path = f"{path[: _LONGEST // 2]}…{path[-_LONGEST // 2 :]}"
    lines = (
        (0.45, f"gdsdirect bench {path}", {"size": 13 if len(path) < 50 else 9, "weight": "bold"}),
        (0.68, summary(results), {"size": 8, "color": _QUIET}),
    )
    for down, text, style in lines:
        place = (_MARGIN / width, 1 - down / height)
        figure.text(*place, text, parse_math=False, **style)
    ways = dict.fromkeys(each.cell.way for each in results.cells)
    if not ways:
        figure.text(0.5, 0.4, "nothing was measured", ha="center", color=_QUIET)
        return
    figure.legend(
        handles=[Line2D([], [], label=way.name, **_line_style(way)) for way in ways],
        loc="upper left",
        bbox_to_anchor=(_MARGIN / width, 1 - 0.78 / height),
        ncols=len(ways),
        frameon=False,
        fontsize=8,
        borderaxespad=0,
        borderpad=0,
    )


def _panel(axis: Axes, block_size: int, cells: Sequence[Measured]) -> None:
    depths = sorted({each.cell.depth for each in cells})
    for way in _LINES:
        some = [each for each in cells if each.cell.way is way]
        if some:
            _line(axis, way, sorted(some, key=lambda each: each.cell.depth))
    axis.set_title(f"{size_text(block_size)} a read", loc="left", size=9, weight="bold", pad=8)
    axis.set_xscale("log", base=2)
    axis.set_xlim(depths[0] / 1.3, depths[-1] * 1.3)
    axis.xaxis.set_major_locator(FixedLocator(depths))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda depth, _: f"{depth:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,g}"))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("reads in flight", color=_QUIET, size=8)
    axis.set_ylabel("MiB/s", color=_QUIET, size=8)
    both = partial(operator.mul, _MIB / block_size), partial(operator.mul, block_size / _MIB)
    right = axis.secondary_yaxis("right", functions=both)
    right.yaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_ylabel("IOPS", color=_QUIET, size=8)
    for each in (axis, right):
        each.tick_params(length=0, colors=_QUIET, labelsize=8)
        each.spines[:].set_visible(False)
    axis.spines["bottom"].set(visible=True, color=_QUIET)
    axis.grid(axis="y", color=_FAINT, linewidth=0.8)
    axis.set_axisbelow(True)


def _line(axis: Axes, way: DataPath, cells: Sequence[Measured]) -> None:
    """Medians, and from the lowest to the highest round."""
    style = _line_style(way)
    depths = [each.cell.depth for each in cells]
    rounds = [[one.iops * each.cell.block_size / _MIB for one in each.rounds] for each in cells]
    lowest, highest = list(map(min, rounds)), list(map(max, rounds))
    axis.vlines(depths, lowest, highest, color=style["color"], alpha=0.4)
    axis.plot(depths, [each.bytes_per_second / _MIB for each in cells], **style)


def _line_style(way: DataPath) -> dict[str, Any]:
    colour, line, size = _LINES[way]
    return {
        "color": colour,
        "linestyle": line,
        "linewidth": 1.8,
        "marker": "o",
        "markersize": size,
        "markeredgecolor": "white",
    }
