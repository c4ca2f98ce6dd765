"""The lab on the command line.

    python -m lab run --drive serial=peer,peer_memory=64M --drive serial=data -- COMMAND
    python -m lab kernels --fetch

Exit statuses of `run`, where they are not the command's own: 70, the kernel log tells of a bug, a
warning or a crash, whatever the command said; 124, not done in time; 125, the machine could not be
made or did not boot; 2, a wrong argument.

A command can have its drives unplugged and others plugged in: in the guest,

    exec 3<>/dev/lab; echo unplug data >&3; read answer <&3

leaves `ok` in $answer, or `error` and why not. The other request is `plug SERIAL BYTES`, a drive of
that size into the slot of one that is out. More of it in lab/control.py.
"""

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lab import kernels
from lab.drives import Drive
from lab.errors import LabError
from lab.machine import KERNEL_PROBLEM, Result, run
from lab.trace import TraceRead

LAB_FAILURE = 125
_USAGE = 2
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # So that the machine is taken down by the same clean-up as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _kernels(options) if options.action == "kernels" else _run(options)
    except ValueError as wrong:
        print(f"lab: {wrong}", file=sys.stderr)
        return _USAGE
    except LabError as failure:
        print(f"lab: {failure}", file=sys.stderr)
        return LAB_FAILURE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _number(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


def _truth(text: str) -> bool:
    return {"": True, "yes": True, "no": False}[text]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(":"))


# How each of a drive's fields is read, by its type.
_READERS: dict[object, tuple[Callable[[str], object], str]] = {
    str: (str, "use a name"),
    int: (_number, "use a number, with K, M or G after it if you like"),
    bool: (_truth, "use yes, no, or the key alone for yes"),
    Path | None: (Path, "use a path"),
    tuple[int, ...]: (_numbers, "use numbers with colons between them"),
}
_KEYS = {field.name: _READERS[field.type] for field in dataclasses.fields(Drive)}


def drive(text: str) -> Drive:
    """A drive from `KEY=VALUE,…`, the keys being Drive's fields; ValueError says what is wrong."""
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in _KEYS:
            raise ValueError(f"a drive has no {key!r}; it has {', '.join(_KEYS)}")
        read, remedy = _KEYS[key]
        try:
            values[key] = read(value)
        except (KeyError, ValueError):
            raise ValueError(f"{key} is {value!r}; {remedy}") from None
    return Drive(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    runs = actions.add_parser("run", help="run a command in a virtual machine")
    runs.add_argument("--kernel", default="7", help="6.1, 6.12, 7 (the default), or a folder")
    runs.add_argument(
        "--drive",
        action="append",
        default=[],
        metavar="KEY=VALUE,…",
        help=f"a drive; the keys: {', '.join(_KEYS)}",
    )
    runs.add_argument("--append", default="", help="more of the kernel's command line")
    runs.add_argument("--timeout", type=float, default=300, help="seconds, boot included (300)")
    runs.add_argument("--share", type=Path, help="a folder that the command may write to")
    runs.add_argument("--trace", type=Path, help="write the drives' reads here, one JSON a line")
    runs.add_argument("--log", type=Path, help="write the kernel's log here")
    runs.add_argument("--accel", choices=("tcg", "kvm", "auto"), default="tcg")
    runs.add_argument("command", nargs="+", metavar="COMMAND")
    lists = actions.add_parser("kernels", help="say which kernels are here")
    lists.add_argument("--fetch", action="store_true", help="and fetch those that are not")
    return parser


def _kernels(options: argparse.Namespace) -> int:
    for name in kernels.SUITES:
        here = kernels.cached()
        if name not in here and not options.fetch:
            print(f"{name:5} not fetched")
        else:
            kernel = here.get(name) or kernels.locate(name)
            print(f"{name:5} {kernel.release:24} {kernel.image}")
    return 0


def _run(options: argparse.Namespace) -> int:
    result = run(
        options.command,
        kernel=options.kernel,
        drives=[drive(text) for text in options.drive],
        share=options.share,
        append=options.append,
        timeout=options.timeout,
        output=sys.stdout,
        accel=options.accel,
    )
    if options.log:
        options.log.write_text(result.kernel_log)
    if options.trace:
        options.trace.write_text("".join(_json(read) for read in result.trace))
    return _verdict(result, options.timeout)


def _json(read: TraceRead) -> str:
    return json.dumps(dataclasses.asdict(read)) + "\n"


def _verdict(result: Result, timeout: float) -> int:
    if result.timed_out:
        print(f"lab: not done after {timeout:g} s; the machine was stopped", file=sys.stderr)
    if result.kernel_problems:
        lines = "\n  ".join(result.kernel_problems)
        print(f"lab: the kernel log tells of trouble:\n  {lines}", file=sys.stderr)
        return KERNEL_PROBLEM
    return result.status


if __name__ == "__main__":
    sys.exit(main())
