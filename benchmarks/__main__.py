"""`make bench`: what the package costs, beside C loops, other packages and fio, as ratios.

    python -m benchmarks [--rounds N] [--no-lab] [--out FOLDER]

All contestants of a row take turns in short slices, round after round. Shown is the median of the
rounds' ratios, or of what comes on top, with its quartiles. The table goes to the terminal;
results.json, with all figures, and results.png, a plot, go to FOLDER (build/bench). A bound that is
missed is no failure.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import (
    depth,
    lab_rows,
    machine,
    measure,
    plot,
    report,
    sequential,
    streaming,
    yardstick,
)
from benchmarks.results import Result
from benchmarks.suite import ROWS
from lab import LabError

_ROUNDS_PER_LAB_ROUND = 6  # a turn there takes a second
_ROUNDS_PER_DRIVE_ROUND = 3  # a turn there takes two


def main() -> None:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH)
    yardstick.build()
    facts = machine.describe()
    for name, value in facts.items():
        console.print(f"{name + ':':20} {value}", highlight=False)
    columns = TextColumn("{task.description:45}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        parts = [_here(options.rounds, progress), _of_a_drive(options.rounds, progress)]
        if options.lab:
            parts.append(_in_the_lab(options.rounds, progress))
    results = [result for some, _ in parts for result in some]
    notes = [note for _, some in parts for note in some]
    options.out.mkdir(parents=True, exist_ok=True)
    table, picture = options.out / "results.json", options.out / "results.png"
    report.show(results, notes, console)
    report.write(table, results, notes, facts)
    plot.draw(picture, results, facts)
    console.print(f"Written: {table}, {picture}", highlight=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=30, help="default 30")
    parser.add_argument("--no-lab", dest="lab", action="store_false", help="no virtual machine")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), metavar="FOLDER")
    return parser.parse_args()


def _here(rounds: int, progress: Progress) -> tuple[list[Result], list[str]]:
    results: list[Result] = []
    notes: list[str] = []
    task = progress.add_task("", total=rounds * len(ROWS))
    for make in ROWS:
        with make() as row:
            progress.update(task, description=row.title)
            if row.pairs:
                results += measure.measure(row, rounds, lambda: progress.advance(task))
            notes += row.omitted
    progress.update(task, description="memory")
    results += depth.memory()
    streamed, said = streaming.memory()
    progress.remove_task(task)
    return results + streamed, notes + said


def _of_a_drive(rounds: int, progress: Progress) -> tuple[list[Result], list[str]]:
    rounds = max(2, rounds // _ROUNDS_PER_DRIVE_ROUND)
    task = progress.add_task("a large file", total=rounds * sequential.TURNS)
    figures = sequential.measure(rounds, lambda: progress.advance(task))
    progress.remove_task(task)
    return figures


def _in_the_lab(rounds: int, progress: Progress) -> tuple[list[Result], list[str]]:
    rounds = max(2, rounds // _ROUNDS_PER_LAB_ROUND)
    task = progress.add_task("the virtual machine", total=rounds * lab_rows.TURNS)
    try:
        figures = lab_rows.measure(rounds, lambda: progress.advance(task))
    except LabError as error:
        return [], [f"No rows from the lab: {error}"]
    finally:
        progress.remove_task(task)
    return figures.results, figures.notes


if __name__ == "__main__":
    main()
