"""Mutations: lines that keep a promise, each broken in a copy of the tree; its tests must turn red.

    python -P tests/mutants.py [--only NAME] [--jobs 2]

tests/mutations.toml has them. Each has a copy of the tree and of the installed package to itself.
A C file is compiled again alone, and linked with the objects of all others. A mutation is killed
when one of its tests fails, crashes or hangs. The exit status is 1 if one survives, can't be made
or built, or names tests that aren't green without it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "mutations.toml"

# Not of the tree: what was built, and what tools keep.
_BESIDE = shutil.ignore_patterns(
    *(".git", ".venv*", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis", ".benchmarks")
)

_PATIENCE = 20.0  # seconds, and four times as long as without a mutation, before a test hangs
_COMPILED = ("-O1", "-MMD")  # quickly, and with a list of the headers beside each object

_WORDS = {
    "killed": "killed",
    "survived": "SURVIVED",
    "unfit": "NOT GREEN",
    "broken": "BROKEN",
}


class BrokenError(Exception):
    """A mutation that can't be tried, and why."""


@dataclass(frozen=True)
class Mutation:
    """`old`, which is in `file` once, becomes `new`, and one of the tests fails.

    `test` is what pytest is given: node ids, or files and -k with an expression.
    """

    name: str
    promise: str
    file: str
    old: str
    new: str
    test: tuple[str, ...]

    def apply(self, tree: Path) -> None:
        """Break the promise in this tree."""
        path = tree / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise BrokenError(f"`old` is {text.count(self.old)} times in {self.file}, not once")
        path.write_text(text.replace(self.old, self.new))


def read_table(path: Path) -> list[Mutation]:
    """All mutations of a table; BrokenError for what is no mutation."""
    mutations = []
    for number, row in enumerate(tomllib.loads(path.read_text())["mutation"], 1):
        missing = {field.name for field in fields(Mutation)} ^ set(row)
        if missing:
            raise BrokenError(f"mutation {number} lacks, or should not have: {sorted(missing)}")
        mutations.append(Mutation(**{**row, "test": tuple(row["test"])}))
    twice = [name for name, count in Counter(each.name for each in mutations).items() if count > 1]
    if twice:
        raise BrokenError(f"names that are there twice: {twice}")
    return mutations


# ---- Building


class _Command(NamedTuple):
    """What the compiler was called with, from which tree, to make `output`."""

    arguments: list[str]
    output: str


class Extensions:
    """The tree's extensions, built once, of which single files are then built anew."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self._folder = folder
        self._compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC"))
        self._record(tree)
        commands = [self._command(path) for path in sorted((folder / "commands").iterdir())]
        self._links = [each for each in commands if each.output.endswith(".so")]
        self._units = [each for each in commands if each.output.endswith(".o")]
        if not (self._links and self._units):
            raise BrokenError("the compiler was not called by the name that CC gave it")
        self.built = [Path(each.output) for each in self._links]

    def _record(self, tree: Path) -> None:
        """Build all, by a compiler that writes down what it is called with."""
        recorder = self._folder / "cc"
        calls = self._folder / "commands"
        calls.mkdir()
        recorder.write_text(
            f'#!/bin/sh\nprintf "%s\\0" "$@" >"$(mktemp {shlex.quote(str(calls))}/XXXXXX)"\n'
            f'exec {shlex.join(self._compiler)} "$@"\n'
        )
        recorder.chmod(0o755)
        setup = (sys.executable, "setup.py", "--quiet", "build_ext", "--parallel", "2")
        places = ("--build-lib", str(self._folder / "lib"), "--build-temp", str(self._folder / "o"))
        environment = {**os.environ, "CC": str(recorder), "CFLAGS": " ".join(_COMPILED)}
        _called((*setup, *places), tree, environment)

    @staticmethod
    def _command(path: Path) -> _Command:
        arguments = path.read_text().split("\0")[:-1]
        return _Command(arguments, arguments[arguments.index("-o") + 1])

    def _reads(self, unit: _Command, file: str) -> bool:
        listed = Path(unit.output).with_suffix(".d").read_text().replace("\\\n", " ").split()
        return file in listed

    def rebuild(self, file: str, tree: Path, into: Path) -> list[Path]:
        """The extensions that are made of this file of the tree, into a folder."""
        units = [unit for unit in self._units if self._reads(unit, file)]
        if not units:
            raise BrokenError(f"no extension is built of {file}")
        new: dict[str, str] = {}
        for number, unit in enumerate(units):
            new[unit.output] = str(into / f"{number}.o")
            self._again(unit, new, tree)
        made = []
        for link in self._links:
            if not new.keys().isdisjoint(link.arguments):
                new[link.output] = str(into / Path(link.output).name)
                self._again(link, new, tree)
                made.append(Path(new[link.output]))
        return made

    def _again(self, command: _Command, new: dict[str, str], tree: Path) -> None:
        arguments = [new.get(argument, argument) for argument in command.arguments]
        _called((*self._compiler, *arguments), tree, os.environ)


def _called(
    command: Sequence[str], folder: Path, environment: os._Environ[str] | dict[str, str]
) -> None:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BrokenError("it is not built:\n" + _end_of(done.stdout + done.stderr))


def _end_of(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-12:])


# ---- Running


class Outcome(NamedTuple):
    """What became of a run of tests: `kind` is one of `_WORDS`' keys."""

    kind: str
    how: str
    seconds: float


def run_tests(
    test: Sequence[str], tree: Path, package: Path, limit: float
) -> tuple[int | None, str]:
    """pytest's exit status and output, in the tree, of this folder's package; None: it hung."""
    options = ("-q", "-x", "-p", "no:cacheprovider", "--timeout=0", f"--basetemp={tree / 'tmp'}")
    with (tree / "output").open("w+") as output:
        run = subprocess.Popen(
            (sys.executable, "-P", "-m", "pytest", *options, *test),
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(package)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = run.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # Its own children too, and those that it left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        output.seek(0)
        return status, output.read()


class Workshop:
    """The tree, the package and its extensions, unbroken, and copies of them."""

    def __init__(self, folder: Path, mutations: Sequence[Mutation]) -> None:
        self._folder = folder
        self._tree = folder / "tree"
        self._package = folder / "package"
        shutil.copytree(ROOT, self._tree, ignore=_BESIDE)
        shutil.copytree(_installed(), self._package / "gdsdirect")
        self._extensions: Extensions | None = None
        if any(each.file.startswith("csrc/") for each in mutations):
            (folder / "extensions").mkdir()
            self._extensions = Extensions(self._tree, folder / "extensions")
            for built in self._extensions.built:
                shutil.copy(built, self._package / "gdsdirect")
        self._seconds: dict[tuple[str, ...], float] = {}

    def _copies(self, name: str) -> tuple[Path, Path]:
        place = self._folder / name
        shutil.copytree(self._tree, place / "tree")
        shutil.copytree(self._package, place / "package")
        return place / "tree", place / "package"

    def check(self, number: int, test: tuple[str, ...]) -> Outcome | None:
        """Run tests without a mutation; what is wrong with them, if they aren't green."""
        tree, package = self._copies(f"green-{number}")
        begun = time.monotonic()
        status, text = run_tests(test, tree, package, 600)
        seconds = self._seconds[test] = time.monotonic() - begun
        shutil.rmtree(tree.parent)
        if status == 0 and re.search(r"\b\d+ passed", text):
            return None
        return Outcome(
            "unfit", f"{shlex.join(test)}, exit status {status}\n{_end_of(text)}", seconds
        )

    def attempt(self, mutation: Mutation) -> Outcome:
        """Break the promise, and see."""
        begun = time.monotonic()
        tree, package = self._copies(mutation.name)
        try:
            mutation.apply(tree)
            self._install(mutation.file, tree, package / "gdsdirect")
            limit = _PATIENCE + 4 * self._seconds[mutation.test]
            status, text = run_tests(mutation.test, tree, package, limit)
            kind, how = judge(status, text)
        except BrokenError as error:
            kind, how = "broken", str(error)
        finally:
            shutil.rmtree(tree.parent)
        return Outcome(kind, how, time.monotonic() - begun)

    def _install(self, file: str, tree: Path, package: Path) -> None:
        folder, _, rest = file.partition("/")
        if folder == "csrc" and self._extensions is not None:
            self._extensions.rebuild(file, tree, package)
        elif folder == "gdsdirect" and (package / rest).is_file():
            shutil.copy(tree / file, package / rest)
            for cached in (package / rest).parent.glob(f"__pycache__/{Path(rest).stem}.*"):
                cached.unlink()
        else:
            raise BrokenError(f"{file} is no part of the installed package")


def judge(status: int | None, text: str) -> tuple[str, str]:
    """What an exit status of pytest says of a mutation."""
    if status == 0:
        return "survived", ""
    if status is None:
        return "killed", "hung"
    if status < 0:
        return "killed", signal.Signals(-status).name
    if status == 1:
        return "killed", "failed"
    return "broken", f"pytest's exit status is {status}\n{_end_of(text)}"


def _installed() -> Path:
    """The folder of the package that is installed, which must be this tree's."""
    found = importlib.util.find_spec("gdsdirect")
    if found is None or found.origin is None:
        raise BrokenError("gdsdirect is not installed: make .venv/installed")
    folder = Path(found.origin).parent
    for path in (ROOT / "gdsdirect").rglob("*.py"):
        installed = folder / path.relative_to(ROOT / "gdsdirect")
        if not installed.is_file() or installed.read_bytes() != path.read_bytes():
            raise BrokenError(
                f"what is installed is not this tree's {path.name}: make .venv/installed"
            )
    return folder


def outcomes(
    mutations: Sequence[Mutation], folder: Path, jobs: int
) -> Iterator[tuple[Mutation, Outcome]]:
    """What became of each, as it is known."""
    workshop = Workshop(folder, mutations)
    with ThreadPoolExecutor(jobs) as pool:
        tests = sorted({each.test for each in mutations})
        unfit = dict(zip(tests, pool.map(workshop.check, range(len(tests)), tests), strict=True))
        begun: dict[Future[Outcome], Mutation] = {}
        for mutation in mutations:
            wrong = unfit[mutation.test]
            if wrong is not None:
                yield mutation, wrong
            else:
                begun[pool.submit(workshop.attempt, mutation)] = mutation
        for done in as_completed(begun):
            yield begun[done], done.result()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this one [and others]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies at a time")
    parser.add_argument("--table", type=Path, default=TABLE, help="another table of mutations")
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # crashes are what is hoped for
    begun = time.monotonic()
    seen: Counter[str] = Counter()
    try:
        mutations = read_table(options.table)
        wanted = set(options.only or (each.name for each in mutations))
        unknown = wanted - {each.name for each in mutations}
        if unknown:
            raise BrokenError(f"no mutation has the name {', '.join(sorted(unknown))}")
        mutations = [each for each in mutations if each.name in wanted]
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            for mutation, outcome in outcomes(mutations, Path(folder), options.jobs):
                seen[outcome.kind] += 1
                told = mutation.promise if outcome.kind == "survived" else outcome.how
                word = _WORDS[outcome.kind]
                print(f"{word:9}{outcome.seconds:6.1f} s  {mutation.name}: {told}", flush=True)
    except BrokenError as error:
        print(error)
        return 1
    sums = ", ".join(f"{seen[kind]} {word}" for kind, word in _WORDS.items() if seen[kind])
    print(f"{len(mutations)} mutations in {time.monotonic() - begun:.0f} s: {sums}")
    return 0 if seen["killed"] == len(mutations) else 1


if __name__ == "__main__":
    sys.exit(main())
