"""What the documents say of the code is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_test_that_keeps_a_promise_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    named = set(re.findall(r"[a-z_]+\.py\b|\btest_[a-z0-9_]+\b(?!\.py)", page))
    assert len(named) > 40
    functions = {name for text in files.values() for name in re.findall(r"^def (\w+)", text, re.M)}
    assert named - functions - set(files) == set()
