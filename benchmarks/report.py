"""The results for reading: a table in the terminal, and all figures as JSON."""

import json
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from benchmarks.results import Result
from benchmarks.rows import said

# Heading, characters, alignment.
_COLUMNS: tuple[tuple[str, int, Literal["left", "right"]], ...] = (
    ("", 24, "left"),
    ("", 15, "right"),
    ("over", 24, "left"),
    ("", 15, "right"),
    ("ratio", 9, "right"),
    ("quartiles", 19, "right"),
    ("bound", 9, "left"),
    ("", 7, "left"),
)
WIDTH = sum(width + 1 for _, width, _ in _COLUMNS)
_VERDICTS = {None: "", True: "[green]reached[/]", False: "[red]missed[/]"}


def show(results: Sequence[Result], notes: Sequence[str], console: Console) -> None:
    """The table. A bound that is missed is said so, and is no error: benchmarks are no tests."""
    headings = _lines()
    headings.add_row(*(heading for heading, *_ in _COLUMNS), style="dim")
    console.print(headings)
    for row, some in groupby(results, lambda result: result.row):
        console.print(f"\n{row}", style="bold", highlight=False)
        lines = _lines()
        for result in some:
            first, median, third = (_compared(result, figure) for figure in result.quartiles)
            lines.add_row(
                f"  {result.of}",
                _figure(result.of_figures, result.unit),
                result.over,
                _figure(result.over_figures, result.unit) if result.over else "",
                f"+{median}" if result.is_difference and result.over else median,
                f"{first} … {third}",
                str(result.bound or ""),
                _VERDICTS[result.reached],
            )
        console.print(lines)
    for note in notes:
        console.print(f"\n{note}", highlight=False, markup=False)


def _lines() -> Table:
    """A table of its own for each row, all of the same widths: so a row's title can be long."""
    table = Table.grid(padding=(0, 1, 0, 0))
    for _, width, justify in _COLUMNS:
        table.add_column(width=width, justify=justify, no_wrap=True)
    return table


def _figure(figures: Sequence[float], unit: str) -> str:
    return said(statistics.median(figures), unit)


def _compared(result: Result, figure: float) -> str:
    return said(figure, result.unit) if result.is_difference else f"{figure:.2f}"


def write(
    path: Path, results: Sequence[Result], notes: Sequence[str], machine: dict[str, str]
) -> None:
    report = {
        "machine": machine,
        "results": [result.as_json() for result in results],
        "notes": list(notes),
    }
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
