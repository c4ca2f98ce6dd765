"""The manual: it builds without a warning, has every public name, and its examples run."""

import ast
import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, GetSetDescriptorType, MethodDescriptorType, ModuleType
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy
import pytest

import gdsdirect
from gdsdirect import Geometry, GpuMappedBuffer
from gdsdirect.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

# An example that can't run here says so in the page's source, with the test that does the same.
EXAMPLE = re.compile(
    r"(?:<!-- not run here: (?P<mark>.*?) -->\n)?```python\n(?P<code>.*?)```", re.S
)
COMMANDS = next(iter(_parser()._subparsers._group_actions)).choices

MARK = re.compile(
    r"needs (?:a drive|a GPU|peer memory); (?P<file>tests/\S+\.py)::(?P<test>test_\w+)"
)
MOST_MARKS = 4

KINDS = (
    FunctionType,
    property,
    classmethod,
    staticmethod,
    MethodDescriptorType,
    GetSetDescriptorType,
)


class Example(NamedTuple):
    page: str
    code: str
    mark: str | None


def examples(page: Path) -> list[Example]:
    found = EXAMPLE.finditer(page.read_text())
    return [Example(page.name, each["code"], each["mark"]) for each in found]


def pages_of_their_own() -> set[str]:
    """Those whose examples tests/test_docs.py runs, all of them, and looks at what they print."""
    text = (ROOT / "tests" / "test_docs.py").read_text()
    return set(re.findall(r'"docs" / "([\w-]+\.md)"', text))


def runnable() -> Iterator[Path]:
    for page in PAGES:
        if page.name not in pages_of_their_own() and examples(page):
            yield page


@pytest.mark.parametrize("page", list(runnable()), ids=lambda page: page.stem)
def test_the_examples_of_a_page(page: Path, tmp_path: Path) -> None:
    """One after the other, as a reader types them; of drives, /dev/null is read."""
    (tmp_path / "model").write_bytes(bytes(range(250)) * 10_000)
    names: dict[str, Any] = {}
    for example in examples(page):
        if example.mark is not None:
            continue
        if page.name == "README.md":  # whose examples are parts of a program
            names |= {
                "buffer": GpuMappedBuffer.from_host_visible(8 << 20),
                "geometry": Geometry(1, 512, 1 << 20, 128 << 10),
                "numpy": numpy,
                "paths": [tmp_path / "model"],
                "use": lambda array, file, offset: None,
            }
        code = example.code.replace('"/data/', f'"{tmp_path}/')
        code = code.replace('"/dev/ng0n1"', '"/dev/null", geometry=geometry').replace("30)", "25)")
        exec(code, names)


def test_the_examples_that_do_not_run_here_are_few_and_have_a_test() -> None:
    marks = [example.mark for page in PAGES for example in examples(page) if example.mark]
    assert len(marks) <= MOST_MARKS
    assert len(marks) == sum(page.read_text().count("<!-- not run here") for page in PAGES)
    for mark in marks:
        named = MARK.fullmatch(mark)
        assert named, mark
        assert f"def {named['test']}(" in (ROOT / named["file"]).read_text()


def command_lines() -> Iterator[str]:
    for page in PAGES:
        for line in page.read_text().splitlines():
            if found := re.match(r"(?: {4}|\$ )(gdsdirect .*)", line):
                yield found[1]


@pytest.mark.parametrize("line", list(command_lines()))
def test_the_commands_of_the_pages_are_understood(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    if arguments[-1] == "--help":
        with pytest.raises(SystemExit, match=r"^0$"):
            _parser().parse_args(arguments)
    else:
        _parser().parse_args(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_of_the_tree(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
        assert re.match("https?://", link) or (page.parent / link).is_file(), link


def modules() -> Iterator[ModuleType]:
    yield gdsdirect
    for found in pkgutil.walk_packages(gdsdirect.__path__, "gdsdirect."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def test_the_examples_of_docstrings() -> None:
    """Of modules in Python; of those in C: tests/test_nvme_sqe.py."""
    results = {module.__name__: doctest.testmod(module) for module in modules()}
    assert {name for name, result in results.items() if result.failed} == set()
    assert {"gdsdirect.stream", "gdsdirect.memory", "gdsdirect.file", "gdsdirect.survey"} <= {
        name for name, result in results.items() if result.attempted
    }


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the manual was built into; every warning of Sphinx's is an error."""
    pytest.importorskip("furo", reason="the extra `docs` isn't installed")
    folder = tmp_path_factory.mktemp("manual")
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "sphinx", "-q", "-W", "-n", "--keep-going"),
            *("-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


def inventory(manual: Path) -> set[str]:
    """Every Python name that the reference has: four lines of a head, then a name a line."""
    *_, names = (manual / "objects.inv").read_bytes().split(b"\n", 4)
    return set(re.findall(r"(?m)^(\S+) py:", zlib.decompress(names).decode()))


def test_every_public_name_is_in_the_reference(manual: Path) -> None:
    documented = inventory(manual)
    public = {
        f"{module.__name__}.{name}"
        for module in modules()
        for name in getattr(module, "__all__", ())
    }
    public |= {"gdsdirect.open", *members()}
    assert "gdsdirect.AsyncUringStream.wait_into" in public
    assert public - documented == set()


def members() -> Iterator[str]:
    """What public classes have: methods, properties, members of an Enum."""
    classes = [
        value for name in gdsdirect.__all__ if isinstance(value := getattr(gdsdirect, name), type)
    ]
    for cls in classes:
        for base in cls.__mro__:
            if base.__module__.startswith("gdsdirect") and (base is cls or base not in classes):
                for name, value in vars(base).items():
                    if not name.startswith("_") and isinstance(value, (*KINDS, base)):
                        yield f"gdsdirect.{cls.__name__}.{name}"


def test_the_values_in_the_reference() -> None:
    for page in (DOCS / "reference").glob("*.md"):
        for name, value in re.findall(r"py:data:: (\w+)\n   :value: (.*)", page.read_text()):
            assert getattr(gdsdirect, name) == ast.literal_eval(value)


def test_the_command_line_says_itself_what_there_is(manual: Path) -> None:
    page = (manual / "command-line.html").read_text()
    assert len(COMMANDS) >= 4
    for command in ("", *COMMANDS):
        assert f"usage: gdsdirect {command}".strip() in page  # made by docs/conf.py


def test_drawings_are_small_and_their_text_is_text() -> None:
    for drawing in (DOCS / "ways").iterdir():
        assert drawing.stat().st_size < 4096
        root = ElementTree.fromstring(drawing.read_text())
        kinds = [element.tag.rpartition("}")[2] for element in root.iter()]
        assert kinds[1] == "title"
        assert kinds.count("text") > 8
        assert f"](ways/{drawing.name})" in (DOCS / "ways.md").read_text()
