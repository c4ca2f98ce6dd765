"""What the documents say of the code is there."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
from safetensors.numpy import save_file

from gdsdirect import Geometry, Namespace, decode_nvme_read_sqe

ROOT = Path(__file__).resolve().parent.parent


def test_every_test_that_keeps_a_promise_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    named = set(re.findall(r"[a-z_]+\.py\b|\btest_[a-z0-9_]+\b(?!\.py)", page))
    assert len(named) > 40
    functions = {name for text in files.values() for name in re.findall(r"^def (\w+)", text, re.M)}
    assert named - functions - set(files) == set()


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name
)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Links, and files of the repository in code."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    folders = "csrc|docs|gdsdirect|lab|tests|\\.github"
    files = re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    # The page of promises says of files that they are below tests/.
    missing += [x for x in files if not ((ROOT / x).exists() or (ROOT / "tests" / x).exists())]
    assert missing == []


def test_the_example_of_striped_drives() -> None:
    """On /dev/null here; what a striped range brings is compared in tests/lab/test_reads.py."""
    page = (ROOT / "docs" / "performance.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    geometry = Geometry(nsid=1, lba_size=512, capacity=1 << 20, max_transfer=128 << 10)
    with (
        Namespace("/dev/null", geometry=geometry) as one,
        Namespace("/dev/null", geometry=geometry) as two,
    ):
        batches = dict(names["striped"]([one, two], 8, buffer := Memory(4096, 8 << 10), 1 << 10))
        decoded = {
            drive: [decode_nvme_read_sqe(wire[i : i + 64]) for i in range(0, len(wire), 64)]
            for drive, wire in batches.items()
        }
        assert decoded == {
            one: [(1, 8 + 2 * i, 2, buffer.address + 2048 * i) for i in range(4)],
            two: [(1, 8 + 2 * i, 2, buffer.address + 1024 + 2048 * i) for i in range(4)],
        }
        with names["read_striped"]([one, two], 0, 1 << 20, 4096) as read:
            assert read.nbytes == 1 << 20


class Memory(NamedTuple):
    """As much of a buffer as the example looks at."""

    address: int
    nbytes: int


def test_the_example_of_a_survey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "capability.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(code.replace("/data/model.safetensors", str(tmp_path)), {})
    shown = capsys.readouterr().out
    assert "BUFFERED into host memory is open" in shown
    assert "   by path.namespace" in shown


def test_the_examples_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as they stand there. docs/examples: tests/test_example.py."""
    page = (ROOT / "docs" / "files.md").read_text().replace("/data/", f"{tmp_path}/")
    (tmp_path / "model").write_bytes(bytes(range(250)) * 10_000)
    (tmp_path / "samples").mkdir()
    for number in range(3):
        (tmp_path / "samples" / str(number)).write_bytes(b"abc" * 20_000 * number)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(code, names)
    shown = capsys.readouterr().out.splitlines()
    way = names["result"].path.name
    assert shown[0].startswith(f"1000000 {way}")
    assert shown[1].startswith("NVME_PASSTHROUGH is closed: it is not an NVMe namespace")
    assert shown[3] == f"65536 {way}"
    assert shown[4:6] == [f"0 1048576 {way} 249", f"1048576 1048576 {way} 249"]
    sizes = [line.removeprefix(f"{tmp_path}/samples/") for line in shown if "/samples/" in line]
    assert sizes == ["0 0 0", "1 0 60000", "2 0 65536", "2 65536 54464"]
    assert shown[-1] == str([way] * 3)


def test_the_examples_of_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "safetensors.md").read_text().replace("/data/", f"{tmp_path}/")
    weight = numpy.arange(3 * 4096, dtype=numpy.float32).reshape(3, 4096)
    bias = numpy.ones(3, numpy.float16)
    tensors = {"layers.0.weight": weight, "layers.0.bias": bias}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "np"})
    (tmp_path / "notes.txt").write_text("none of its kind")
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(code, names)
    assert (names["half"] == weight[:, :2048]).all()
    assert (names["bias"] == bias).all()
    shown = capsys.readouterr().out.splitlines()
    assert "layers.0.weight float32 (3, 4096)" in shown
    assert f"{tmp_path}/model.safetensors {weight.nbytes + bias.nbytes} BUFFERED" in shown[2]
    assert shown[-2] == f"(3, 2048) {bias.nbytes + names['half'].nbytes}"
    assert "notes.txt is no safetensors file that can be read" in shown[-1]


def test_the_examples_of_gpu_memory_are_marked() -> None:
    """Blocks that begin with "python gpu" need one, and are run by tests/gpu. Here, that they are
    Python, and that the page has no others, which nobody would run."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    blocks = re.findall(r"```(python[^\n]*)\n(.*?)```", page, re.S)
    assert len(blocks) > 3
    for mark, code in blocks:
        assert mark == "python gpu"
        compile(code, "docs/gpu.md", "exec")
