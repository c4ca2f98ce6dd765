"""Sphinx's settings: `make docs` builds the manual, from these pages and the docstrings."""

import os
import re
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import version as version_of

from docutils import nodes
from sphinx.addnodes import desc
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

project = "gdsdirect"
version = release = version_of("gdsdirect")
html_title = f"gdsdirect {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["manual.css"]
html_copy_source = False
html_show_copyright = False
exclude_patterns = ["examples"]

myst_heading_anchors = 3
highlight_language = "text"
python_maximum_signature_line_length = 80

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
# Docstrings write code between single backquotes, as Markdown does.
default_role = "code"

ALIASES = {
    "Require": "DataPath | Collection[DataPath] | None",
    "_Integers": "Sequence[int] | Buffer",
}

# Names in signatures, mostly Python's own; links to them would take the network at each build.
nitpick_ignore = [
    ("py:class", name)
    for name in (
        "Buffer",
        "Collection",
        "Coroutine",
        "OnGpu",  # what the text calls GPU memory
        "Sequence",
        "collections.abc.Callable",
        "collections.abc.Collection",
        "collections.abc.Coroutine",
        "collections.abc.Iterable",
        "collections.abc.Mapping",
        "collections.abc.Sequence",
        "os.PathLike",
    )
]


def fill_in_output(app: Sphinx, page: str, source: list[str]) -> None:
    """After each `$ gdsdirect … --help` of a page, put what the command line says to it."""
    source[0] = re.sub(r"(?m)^\$ (gdsdirect(?: \w+)* --help)$", _shown, source[0])


def _shown(command: re.Match[str]) -> str:
    arguments = command[1].split()[1:]
    said = subprocess.run(
        [sys.executable, "-P", "-m", "gdsdirect", *arguments],
        capture_output=True,
        check=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"},
    ).stdout
    return f"{command[0]}\n{said.rstrip()}"


def spell_out(app: Sphinx, what: str, name: str, *rest: object) -> tuple[str, str | None] | None:
    """Aliases that only type checkers see, as what they stand for."""
    signature, returns = rest[-2:]
    if not isinstance(signature, str):
        return None
    for alias, meaning in ALIASES.items():
        signature = signature.replace(f": {alias}", f": {meaning}")
    signature = signature.replace("<factory>", "...")  # of a dataclass: no expression
    return signature, returns if isinstance(returns, str) else None


def link_names(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Link the public names in the text to the reference, so that pages are plain Markdown.

    Long code is marked, to be broken where a table would be too wide (static/manual.css).
    """
    objects = app.env.domains.python_domain.objects
    for literal in list(doctree.findall(nodes.literal)):
        if len(literal.astext()) > 16:
            literal["classes"].append("long")
        if isinstance(literal.parent, nodes.reference | nodes.title):
            continue
        full = full_name(literal.astext(), enclosing_class(literal), objects)
        if full is not None:
            place = objects[full]
            link = make_refnode(app.builder, page, place.docname, place.node_id, [], full)
            literal.replace_self(link)
            link += literal


def full_name(text: str, inside: str | None, objects: Collection[str]) -> str | None:
    """The public name that is meant: `File`, `File.size`; `read_into(…)` if no other has it."""
    name, call = re.sub(r"\(.*\)$", "", text), text.endswith(")")
    if name in objects and name.startswith("gdsdirect."):
        return name
    if text == "open":
        return None  # Python's as often as this one
    if f"gdsdirect.{name}" in objects:
        return f"gdsdirect.{name}"
    if not (call or name.isupper() or re.search("[_.]", name)):
        return None  # `size` is an argument as often as a property
    if f"{inside}.{name}" in objects:
        return f"{inside}.{name}"
    found = [
        known for known in objects if re.fullmatch(rf"gdsdirect\.\w+\.{re.escape(name)}", known)
    ]
    return found[0] if len(found) == 1 else None


def enclosing_class(node: nodes.Node) -> str | None:
    """Of a docstring, the class that it is about."""
    while (parent := node.parent) is not None:
        if isinstance(parent, desc) and parent["objtype"] in ("class", "exception"):
            return str(parent[0]["ids"][0])
        node = parent
    return None


def setup(app: Sphinx) -> None:
    app.connect("source-read", fill_in_output)
    app.connect("autodoc-process-signature", spell_out)
    app.connect("doctree-resolved", link_names)
