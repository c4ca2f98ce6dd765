"""The command line: `gdsdirect check`, `probe`, `read` and `bench`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import gdsdirect.file
from gdsdirect.errors import ShortReadError
from gdsdirect.file import File
from gdsdirect.memory import GpuMappedBuffer
from gdsdirect.probe import Available, FeatureDisabled, Unavailable, probe
from gdsdirect.stream import DataPath

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from gdsdirect.bench import Results

_T = TypeVar("_T")

_BUFFER = 8 << 20  # bytes: some commands of the largest drives, at a size that peer memory has free
_SLACK = 8 << 10  # of a smaller one: room for a chunk that begins and ends in the midst of blocks
_CHUNK = 1 << 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DEEPEST = 1 << 15  # reads that a ring has in flight at most
# Best first, as they are chosen among.
_WAYS = {
    "passthrough": DataPath.NVME_PASSTHROUGH,
    "fixed": DataPath.FILE_FIXED,
    "direct": DataPath.FILE_DIRECT,
    "cufile": DataPath.CUFILE,
    "buffered": DataPath.BUFFERED,
}


def parse_size(text: str) -> int:
    """Bytes, with K, M, G or T for powers of 1024: 4096, 64K, 0x1000, 1G."""
    unit = text[-1:].upper()
    number = text[:-1] if unit in _UNITS else text
    try:
        value = int(number, 0) * _UNITS.get(unit, 1)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: give bytes, such as 4096, 64K or 1G"
        )
    return value


def parse_target(text: str) -> str | None:
    """None for host memory, the path for peer memory."""
    kind, _, path = text.partition(":")
    if kind == "peer" and path:
        return path
    if text != "host":
        raise argparse.ArgumentTypeError(f"{text!r} is no target: give host or peer:PATH")
    return None


def parse_list(parse: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    """Of what `parse` takes, with commas between; each once."""
    return lambda text: list(dict.fromkeys(map(parse, text.split(","))))


def parse_block_size(text: str) -> int:
    """A size that is not 0."""
    size = parse_size(text)
    if size == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no block size: give 1 byte or more")
    return size


def parse_count(most: int | None = None) -> Callable[[str], int]:
    """A whole number from 1 on, `most` at most."""
    bound = "1 or more" if most is None else f"1 to {most}"

    def parse(text: str) -> int:
        if not (text.isdecimal() and int(text) >= 1 and (most is None or int(text) <= most)):
            raise argparse.ArgumentTypeError(f"{text!r} is no count: give {bound}")
        return int(text)

    return parse


def parse_seconds(text: str) -> float:
    """Seconds, more than none."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds, such as 0.5")
    return seconds


def parse_way(text: str) -> DataPath:
    """A way by its name here."""
    if text not in _WAYS:
        raise argparse.ArgumentTypeError(f"{text!r} is no way: give some of {','.join(_WAYS)}")
    return _WAYS[text]


def parse_png(text: str) -> str:
    """The name of a PNG file."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is no PNG file: give a name ending in .png")
    return text


class _Version(argparse.Action):
    """Looked for only when it is asked for, since that takes longer than the import."""

    def __call__(self, *_: object) -> None:
        from importlib.metadata import version

        print(f"gdsdirect {version('gdsdirect')}")
        raise SystemExit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gdsdirect", description="Reads NVMe into GPU-visible memory, and says the way taken."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version, and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    ask = commands.add_parser(
        "probe",
        help="say whether nvidia-fs is there",
        description="Say whether nvidia-fs is there. "
        "Exit code: 0 available, 1 unavailable, 2 this build or system has no io_uring.",
    )
    ask.set_defaults(run=_probe)

    check = commands.add_parser(
        "check",
        help="say which ways are open, and what stands in the way of others",
        description="Say which ways are open to each PATH (default: every NVMe namespace), what "
        "stands in the way of others, and what to do. It only reads. Exit code: 0 if a direct way "
        "is open, 1 if only others are, 2 if none is or PATH can't be read.",
    )
    check.add_argument("paths", nargs="*", metavar="PATH", help="a file, folder or device")
    check.add_argument("--json", action="store_true", help="print all of it as JSON")
    check.add_argument(
        "--no-verify", action="store_true", help="judge by facts alone, without a trial read"
    )
    where = check.add_mutually_exclusive_group()
    where.add_argument(
        "--record",
        metavar="DIR",
        help="write all that was read and asked to DIR, for a bug report: without serial numbers, "
        "host names and network addresses",
    )
    where.add_argument("--replay", metavar="DIR", help="judge the host that was recorded in DIR")
    check.set_defaults(run=_check)

    read = commands.add_parser(
        "read",
        help="read a namespace, block device or file",
        description="Read SOURCE: an NVMe namespace (/dev/ngXnY), a block device or a file. "
        "The way taken is said on stderr.",
    )
    read.add_argument("source", metavar="SOURCE", help="what to read; never written to")
    read.add_argument("--offset", type=parse_size, default=0, metavar="BYTES", help="default 0")
    read.add_argument("--size", type=parse_size, metavar="BYTES", help="default: to the end")
    read.add_argument(
        "--to",
        type=parse_target,
        metavar="host|peer:PATH",
        help="memory to read into: the host's (default), or a file that maps to PCI peer memory",
    )
    read.add_argument("--sha256", action="store_true", help="print the bytes' SHA-256")
    read.add_argument("--output", metavar="FILE", help="write the bytes to FILE, - for stdout")
    read.set_defaults(run=_read)
    _add_bench(commands.add_parser("bench", help="measure reads of a namespace, device or file"))
    return parser


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.description = (
        "Measure reads of SOURCE for each way, block size and number of reads in flight: a second "
        "for each in each of 3 rounds, if nothing else is said, and so a minute or two. It only "
        "reads. Exit code: 0 if something was measured, 1 if nothing was, 2 for wrong arguments."
    )
    add = bench.add_argument
    add("source", metavar="SOURCE", help="what to read; never written to")
    add(
        "--block-sizes",
        type=parse_list(parse_block_size),
        default="4K,64K,1M",
        metavar="BYTES,...",
        help="bytes of a read (default 4K,64K,1M)",
    )
    add(
        "--depths",
        type=parse_list(parse_count(_DEEPEST)),
        default="1,8,32",
        metavar="N,...",
        help="reads in flight (default 1,8,32)",
    )
    add(
        "--ways",
        type=parse_list(parse_way),
        default=",".join(_WAYS),
        metavar="WAY,...",
        help=f"of {', '.join(_WAYS)} (default: all)",
    )
    add(
        "--to",
        type=parse_target,
        metavar="host|peer:PATH",
        help="memory to read into: the host's (default), or a file that maps to PCI peer memory",
    )
    add("--pattern", choices=["random", "sequential"], default="random", help="default random")
    add(
        "--seconds",
        type=parse_seconds,
        default=1.0,
        metavar="S",
        help="for each combination in each round (default 1)",
    )
    add(
        "--rounds",
        type=parse_count(),
        default=3,
        metavar="N",
        help="of all combinations, each in another order; medians are told (default 3)",
    )
    add("--seed", type=int, metavar="N", help="of places and order (default: another each time)")
    add("--json", metavar="FILE", help="write all figures to FILE as JSON, - for stdout")
    add("--plot", type=parse_png, metavar="FILE.png", help="draw them into FILE.png")
    bench.set_defaults(run=_bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for an error, 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except BrokenPipeError:
        # Whoever read our output has gone. Nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        what = f"{error.filename}: {error.strerror}" if named else error.strerror or error
        print(f"gdsdirect: {what}", file=sys.stderr)
    except (ValueError, RuntimeError) as error:
        print(f"gdsdirect: {error}", file=sys.stderr)
    return 1


# ---- probe


def _probe(_: argparse.Namespace) -> int:
    match probe():
        case Available(stats):
            first = next((line.strip() for line in stats.splitlines() if line.strip()), "")
            print(f"available: {first}")
            return 0
        case Unavailable(reason, _):
            print(f"unavailable: {reason}")
            return 1
        case FeatureDisabled():
            print("feature disabled: this system or this build of gdsdirect has no io_uring")
            return 2
    raise AssertionError("probe() has three results")


# ---- check


def _check(options: argparse.Namespace) -> int:
    # Not at import time, for the sake of the other commands.
    from gdsdirect.host import Host, read_answers
    from gdsdirect.record import RecordingHost
    from gdsdirect.report import print_report
    from gdsdirect.survey import survey_host
    from gdsdirect.sysfs import Sysfs

    recording = RecordingHost() if options.record else None
    if options.replay:
        host = Host(Sysfs(options.replay), read_answers(options.replay))
    else:
        host = recording or Host(Sysfs())
    found = survey_host(host, options.paths, not options.no_verify)
    if recording:
        recording.write(options.record)
    if options.json:
        json.dump(found.to_dict(), sys.stdout, indent=2)
        print()
    else:
        print_report(found)
    return found.exit_code


# ---- read


def _read(options: argparse.Namespace) -> int:
    with gdsdirect.file.open(options.source) as file, contextlib.ExitStack() as stack:
        offset, size = _range(file, options.offset, options.size)
        buffer = stack.enter_context(_buffer(options.to, size))
        output = stack.enter_context(_output("--output", options.output, options.source))
        digest = hashlib.sha256() if options.sha256 else None
        advance = stack.enter_context(_progress(size))
        why = None
        chunk_size = max(1, min(_CHUNK, size))
        with file.stream(buffer, chunk_size=chunk_size, offset=offset, size=size) as stream:
            for chunk in stream:
                if digest:
                    digest.update(chunk.view)
                if output:
                    _write(output, chunk.view)
                advance(chunk.nbytes)
                why = chunk.why
        done = stream.progress
    ways = " and ".join(way.name for way in done.ways) or "no way"
    target = "host" if options.to is None else f"peer memory of {options.to}"
    because = f", since {why}" if why else ""
    print(
        f"{options.source}: {done.nbytes} bytes by {ways} into {target}{because}", file=sys.stderr
    )
    if done.nbytes < size:
        raise ShortReadError(options.source, offset, size, done.nbytes)
    if digest:
        # Where the bytes themselves go to stdout, the digest must not be among them.
        print(digest.hexdigest(), file=sys.stderr if options.output == "-" else sys.stdout)
    return 0


def _write(output: BinaryIO, view: memoryview) -> None:
    """All of it: an unbuffered pipe takes less when io_uring's completions interrupt the call."""
    done = 0
    while done < view.nbytes:
        done += output.write(view[done:])


def _range(file: File, offset: int, size: int | None) -> tuple[int, int]:
    """Offset and size, both inside the file."""
    have = file.size
    if offset > have or offset + (size or 0) > have:
        raise ValueError(
            f"{file.path} has {have} bytes: --offset {offset}"
            + ("" if size is None else f" and --size {size}")
            + " end beyond them"
        )
    return offset, have - offset if size is None else size


def _buffer(peer: str | None, wanted: int) -> GpuMappedBuffer:
    nbytes = min(_BUFFER, -(-wanted // 4096) * 4096 + _SLACK)
    if peer is None:
        return GpuMappedBuffer.from_host_visible(nbytes)
    return GpuMappedBuffer.from_bar1_peer(peer, nbytes)


@contextlib.contextmanager
def _output(option: str, path: str | None, source: str) -> Iterator[BinaryIO | None]:
    if path is None:
        yield None
    elif path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    else:
        if os.path.exists(path) and os.path.samefile(path, source):
            raise ValueError(f"{option} {path} is SOURCE itself, which is never written to")
        if os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode):
            # It can be another node of the drive that SOURCE is.
            raise ValueError(f"{option} {path} is a block device: give a file")
        with open(path, "wb") as file:
            yield file


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """Bytes of `total`, as they come."""
    bar = _bar(
        lambda rich: (
            rich.BarColumn(),
            rich.DownloadColumn(binary_units=True),
            rich.TransferSpeedColumn(),
        )
    )
    if bar is None:
        yield lambda _: None
        return
    with bar:
        task = bar.add_task("reading", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def _bar(
    columns: Callable[[ModuleType], tuple[ProgressColumn, ...]], *, by_itself: bool = True
) -> Progress | None:
    """A progress bar, on a terminal and with Rich installed; `by_itself` a thread draws it."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    return progress.Progress(
        *columns(progress), console=console, transient=True, auto_refresh=by_itself
    )


# ---- bench


def _bench(options: argparse.Namespace) -> int:
    # Not at import time, for the sake of the other commands.
    from gdsdirect.bench import Bench, Pattern, Settings
    from gdsdirect.bench_report import print_results

    draw = _drawing() if options.plot else None
    settings = Settings(
        options.source,
        options.ways,
        options.block_sizes,
        options.depths,
        Pattern(options.pattern),
        options.seconds,
        options.rounds,
        random.randrange(1 << 32) if options.seed is None else options.seed,
        options.to,
    )
    with Bench(settings) as bench, contextlib.ExitStack() as stack:
        figures = stack.enter_context(_output("--json", options.json, options.source))
        picture = stack.enter_context(_output("--plot", options.plot, options.source))
        with _rounds(len(bench.cells) * settings.rounds) as advance:
            results = bench.run(advance)
        if figures:
            text = json.dumps(results.to_dict(), indent=2)
            _write(figures, memoryview(f"{text}\n".encode()))
        # Where the JSON goes to stdout, the table must not be among it.
        print_results(results, sys.stderr if options.json == "-" else sys.stdout)
        if picture and draw:
            draw(picture, results)
    return 0 if results.cells else 1


def _drawing() -> Callable[[BinaryIO, Results], None]:
    """What draws the plot; asked for before anything is measured in vain."""
    try:
        from gdsdirect.bench_plot import draw
    except ImportError as error:
        raise RuntimeError(
            f"--plot needs matplotlib ({error}): run `pip install 'gdsdirect[bench]'`"
        ) from None
    return draw


@contextlib.contextmanager
def _rounds(total: int) -> Iterator[Callable[[], object]]:
    """Cells of `total`, drawn as each is done: a thread that draws would be measured too."""
    bar = _bar(
        lambda rich: (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeRemainingColumn()),
        by_itself=False,
    )
    if bar is None:
        yield lambda: None
        return
    with bar:
        task = bar.add_task("measuring", total=total)

        def advance() -> None:
            bar.advance(task)
            bar.refresh()

        bar.refresh()
        yield advance
