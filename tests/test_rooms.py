"""csrc/ has the order of the README's picture: a file includes and calls only what is below it.

The files of one stem are one room: sqe.h and sqe.c. Data is not looked at, such as the module's
definition, by which types find their module.
"""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FILES = sorted(path.name for path in CSRC.glob("*.[ch]"))

COMMENT_OR_STRING = re.compile(r'/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
# clang-format begins a line with the name of a function where it is defined, and nowhere else.
DEFINITION = re.compile(r"^(\w+)\([^;{}]*\)\n\{", re.MULTILINE)
DECLARATION = re.compile(r"^\w[\w *]*[ *]\w+\([^;{}]*\);", re.MULTILINE)
NAME = re.compile(r"(?<![.>\w])[a-z_]\w*")


def room(name: str) -> str:
    return name.split(".")[0]


@cache
def rooms() -> tuple[str, ...]:
    """From the top down, as the README has them."""
    picture = (ROOT / "README.md").read_text().split("\n## The layers\n")[1].split("\n## ")[0]
    lines = re.findall(r"^ {4}csrc/([^ ,]+(?:, [^ ,]+)*)", picture, re.MULTILINE)
    return tuple(dict.fromkeys(room(name) for line in lines for name in line.split(", ")))


def above(name: str) -> set[str]:
    return set(rooms()[: rooms().index(room(name))])


@cache
def code(name: str) -> str:
    return COMMENT_OR_STRING.sub("", (CSRC / name).read_text())


@cache
def defined() -> dict[str, set[str]]:
    """By the name of each function the rooms that define it: static ones may be several."""
    found: dict[str, set[str]] = {}
    for name in FILES:
        for function in DEFINITION.findall(code(name)):
            found.setdefault(function, set()).add(room(name))
    return found


def test_the_picture_has_every_file() -> None:
    assert sorted(rooms()) == sorted({room(name) for name in FILES})


def test_every_function_that_is_declared_is_found() -> None:
    declared = {
        re.findall(r"(\w+)\(", declaration)[0]
        for name in FILES
        for declaration in DECLARATION.findall(code(name))
    }
    assert len(declared) > 40
    assert declared - set(defined()) == set()


@pytest.mark.parametrize("name", FILES)
def test_a_file_includes_only_what_is_below_it(name: str) -> None:
    included = re.findall(r'^#include "(.+)"', (CSRC / name).read_text(), re.MULTILINE)
    assert [header for header in included if room(header) in above(name)] == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_calls_only_what_is_below_it(name: str) -> None:
    words = set(NAME.findall(DECLARATION.sub("", code(name))))
    called = {word: defined()[word] for word in words & set(defined())}
    assert {word: where for word, where in called.items() if where <= above(name)} == {}
