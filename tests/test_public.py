"""The names that `import gdsdirect` brings: documented, and some imported only when asked for."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import GetSetDescriptorType

import pytest
from support import run_python

import gdsdirect

FOLDER = Path(gdsdirect.__file__).parent


def undocumented(name: str) -> Iterator[str]:
    """A public name, and a class's own functions and properties, where there is nothing to read.

    Its fields are told of in its own text.
    """
    value = getattr(gdsdirect, name)
    if not callable(value):
        sources = "\n".join(path.read_text() for path in FOLDER.glob("*.py*"))
        if not re.search(rf'^{name}\b.*\n"""', sources, re.M):
            yield name
    elif not inspect.getdoc(value):
        yield name
    for base in inspect.getmro(value) if isinstance(value, type) else ():
        for attribute in vars(base) if base.__module__.startswith("gdsdirect") else ():
            member = inspect.getattr_static(base, attribute)
            is_code = inspect.isroutine(member) or isinstance(
                member, (property, classmethod, staticmethod, GetSetDescriptorType)
            )
            if is_code and not attribute.startswith("_") and not inspect.getdoc(member):
                yield f"{name}.{attribute}"


@pytest.mark.parametrize("name", [*gdsdirect.__all__, "open"])
def test_it_is_documented(name: str) -> None:
    assert list(undocumented(name)) == []


def test_what_is_imported_later_is_there_all_the_same() -> None:
    out = run_python(
        "import sys, gdsdirect\n"
        "late = {'asyncio', 'concurrent.futures', 'gdsdirect.check', 'json'}\n"
        "print(*late & set(sys.modules))\n"
        "print(set(gdsdirect.__all__) <= set(dir(gdsdirect)))\n"
        "from gdsdirect import *\n"
        "print(Check.__name__, parse_nvidia_fs_stats.__name__, survey.__name__)\n"
        "import gdsdirect.survey, gdsdirect.probe, gdsdirect.check\n"
        "print(hasattr(gdsdirect, 'Sysfs'))\n"
    )
    assert out == "\nTrue\nCheck parse_nvidia_fs_stats survey\nFalse\n"
