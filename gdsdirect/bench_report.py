"""What `gdsdirect bench` measured, as a table to read: by Rich where it is installed."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TextIO

from gdsdirect.bench import Measured, Results
from gdsdirect.memory import MemoryKind
from gdsdirect.stream import DataPath

_WIDTH = 100  # columns at most, which are easier to read than a wide terminal's
# Headings, and how their columns are aligned.
_COLUMNS = {
    "block": "<",
    "way": "<",
    "depth": ">",
    "IOPS": ">",
    "MiB/s": ">",
    "mean latency": ">",
    "CPU s/GiB": ">",
    "rounds": ">",
}
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_MEMORY = {MemoryKind.HOST_VISIBLE: "host memory", MemoryKind.BAR1_PEER: "peer memory"}
_O_DIRECT = frozenset((DataPath.FILE_FIXED, DataPath.FILE_DIRECT))


def size_text(nbytes: int) -> str:
    """Bytes in the largest unit that they are whole in: "64 KiB"."""
    for unit, name in _UNITS:
        if nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def summary(results: Results) -> str:
    """How it was measured."""
    settings = results.settings
    rounds = "1 round" if settings.rounds == 1 else f"{settings.rounds} rounds"
    return (
        f"{settings.pattern} reads into {_MEMORY[results.memory]}, {rounds} of "
        f"{settings.seconds:g} s, Linux {results.kernel}"
    )


def readable(text: str) -> str:
    """A path can hold bytes that are no text."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_results(results: Results, output: TextIO) -> None:
    """Write the table, what was left out, and what the figures mean."""
    width = min(shutil.get_terminal_size((_WIDTH, 0)).columns, _WIDTH)
    path = readable(results.settings.path)
    print(f"{path}, {size_text(results.size)}: {summary(results)}", file=output)
    if results.cells:
        print(file=output)
        _print_table(list(_rows(results)), output)
    for title, lines in (("Left out", _left_out(results)), ("To be known", _notes(results))):
        for number, line in enumerate(lines):
            if number == 0:
                print(f"\n{title}", file=output)
            shown = textwrap.wrap(
                readable(line),
                width,
                initial_indent="  ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
            print(*shown, sep="\n", file=output)


def _rows(results: Results) -> Iterator[Sequence[str]]:
    """With an empty one between block sizes."""
    before = results.cells[0].cell.block_size
    for each in results.cells:
        if each.cell.block_size != before:
            yield [""] * len(_COLUMNS)
        before = each.cell.block_size
        yield _row(each)


def _row(measured: Measured) -> tuple[str, ...]:
    cell, median = measured.cell, measured.iops
    shares = [round(100 * each.iops / median) for each in measured.rounds]
    return (
        size_text(cell.block_size),
        cell.way.name,
        str(cell.depth),
        f"{median:,.0f}",
        _figure(measured.bytes_per_second / (1 << 20)),
        f"{_figure(measured.mean_latency * 1e6)} us",
        _figure(measured.cpu_seconds_per_gib),
        f"{min(shares)} to {max(shares)} %",
    )


def _figure(number: float) -> str:
    """With three digits, or all that are before the point."""
    digits = 0 if number >= 100 else 1 if number >= 10 else 2 if number >= 1 else 3
    return f"{number:,.{digits}f}"


def _print_table(rows: Sequence[Sequence[str]], output: TextIO) -> None:
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        forms = [f"{align}{width}" for align, width in zip(_COLUMNS.values(), widths, strict=True)]
        for row in (tuple(_COLUMNS), *rows):
            shown = [format(text, form) for text, form in zip(row, forms, strict=True)]
            print("  ".join(shown), file=output)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading, align in _COLUMNS.items():
        table.add_column(heading, justify="left" if align == "<" else "right")
    for row in rows:
        table.add_row(*row)
    # Elsewhere than on a terminal, Rich would fold it to 80 columns.
    width = None if output.isatty() else sum(widths) + 2 * len(widths)
    Console(file=output, width=width).print(table)


def _left_out(results: Results) -> Iterator[str]:
    for way, why in results.closed.items():
        yield f"{way.name} is closed: {why}"
    for (way, block_size), why in results.refused.items():
        yield f"{way.name}, {size_text(block_size)}, is refused: {why}"
    for cell, why in results.failed.items():
        yield f"{cell.way.name}, {size_text(cell.block_size)}, depth {cell.depth}, failed: {why}"


def _notes(results: Results) -> Iterator[str]:
    """What the figures mean, and what they don't."""
    ways = {each.cell.way for each in results.cells}
    if ways:
        yield (
            "Figures are medians of the rounds, and the last column has the lowest and highest IOPS"
            " of one. The mean latency is depth / IOPS (Little's law), CPU that of this process."
        )
    if names := " and ".join(way.name for way in DataPath if way in ways & _O_DIRECT):
        yield f"{names}: with O_DIRECT, past the page cache."
    if DataPath.BUFFERED in ways:
        yield "BUFFERED: may come from the page cache, and not from the drive."
    if results.memory is MemoryKind.HOST_VISIBLE:
        unregistered = dict.fromkeys(
            f"{each.cell.way.name}, {size_text(each.cell.block_size)}, depth {each.cell.depth}"
            for each in results.cells
            if not each.registered and each.cell.way is not DataPath.FILE_DIRECT
        )
        for which in unregistered:
            yield f"{which}: into memory that the kernel did not register."
