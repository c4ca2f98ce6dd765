"""The runner of mutations, on some that end in each of its ways; and that the table is in order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import ROOT, TABLE, BrokenError, Mutation, judge, read_table, run_tests

ROW = """
[[mutation]]
name = "{name}"
promise = "As it was."
file = "{file}"
old = '''{old}'''
new = '''{new}'''
test = {test}
"""


@pytest.mark.parametrize("mutation", read_table(TABLE), ids=lambda mutation: mutation.name)
def test_every_mutation_can_be_made(mutation: Mutation) -> None:
    """Its line is there, and so are its tests."""
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old
    files = [each for each in mutation.test if ".py" in each]
    assert files
    for each in files:
        file, _, rest = each.partition("::")
        text = (ROOT / file).read_text()
        for name in filter(None, re.sub(r"\[.*", "", rest).split("::")):
            assert re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE), name


def test_a_table_that_is_not_in_order(tmp_path: Path) -> None:
    table = tmp_path / "table.toml"
    row = ROW.format(name="a", file="b", old="c", new="d", test=["e"])
    table.write_text(row + row)
    with pytest.raises(BrokenError, match=r"twice: \['a'\]"):
        read_table(table)
    table.write_text(row.replace("promise", "hope"))
    with pytest.raises(BrokenError, match=r"mutation 1 lacks, .*'hope', 'promise'"):
        read_table(table)


@pytest.mark.parametrize(
    ("body", "judged"),
    [
        ("assert True", ("survived", "")),
        ("assert False", ("killed", "failed")),
        ("os.abort()", ("killed", "SIGABRT")),
        ("time.sleep(1000)", ("killed", "hung")),
        ("os._exit(9)", ("broken", "pytest's exit status is 9\n")),
    ],
)
def test_how_a_run_ends(body: str, judged: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(f"import os, time\ndef test():\n    {body}\n")
    limit = 5 if "sleep" in body else 60
    assert judge(*run_tests(["test_it.py"], tmp_path, tmp_path, limit)) == judged


def test_what_becomes_of_mutations(tmp_path: Path) -> None:
    test = ["tests/test_nvme_sqe.py::test_golden_bytes"]
    opcode = "#define NVME_CMD_READ 0x02"
    probe = "probe = GpuDirectCapability.probe"
    rows = [
        ("of C", "csrc/nvme_abi.h", opcode, "#define NVME_CMD_READ 3", test),
        ("no C", "csrc/nvme_abi.h", opcode, "#define NVME_CMD_READ )", test),
        ("of none", "csrc/liburing-LICENSE.txt", "Jens Axboe", "Jens", test),
        ("of Python", "gdsdirect/__init__.py", probe, "encode_nvme_read_sqe = bytes", test),
        ("no import", "gdsdirect/__init__.py", probe, "del encode_nvme_read_sqe", test),
        ("comment", "gdsdirect/__init__.py", probe, f"{probe}  # as it was", test),
        ("not there", "gdsdirect/__init__.py", "There is no such line.", "", test),
        ("no test", "gdsdirect/__init__.py", probe, "", [*test, "-k", "silver"]),
    ]
    table = tmp_path / "table.toml"
    names = ("name", "file", "old", "new", "test")
    table.write_text("".join(ROW.format(**dict(zip(names, row, strict=True))) for row in rows))
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "tests" / "mutants.py"), "--table", str(table)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    lines = re.findall(r"^([A-Za-z ]+?) +[0-9.]+ s  (.*)$", done.stdout, re.MULTILINE)
    assert sorted(lines) == [
        ("BROKEN", "no C: it is not built:"),
        ("BROKEN", "no import: pytest's exit status is 4"),
        ("BROKEN", "not there: `old` is 0 times in gdsdirect/__init__.py, not once"),
        ("BROKEN", "of none: no extension is built of csrc/liburing-LICENSE.txt"),
        ("NOT GREEN", f"no test: {shlex.join(rows[-1][-1])}, exit status 5"),
        ("SURVIVED", "comment: As it was."),
        ("killed", "of C: failed"),
        ("killed", "of Python: failed"),
    ]
    end = r"8 mutations in [0-9]+ s: 2 killed, 1 SURVIVED, 1 NOT GREEN, 4 BROKEN\n$"
    assert re.search(end, done.stdout)


def test_one_by_its_name() -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "tests" / "mutants.py"), "--only", "no such"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "no mutation has the name no such\n")
