"""docs/examples/load_batch.py on real files: the means that it prints, and the ways."""

import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import needs_torch

import gdsdirect
from gdsdirect import GpuMappedBuffer

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "load_batch.py"
COUNT, BATCH, SEED = 70, 32, 7

Samples = np.ndarray[Any, np.dtype[Any]]

KINDS = [
    pytest.param("float32", (4, 1024), (), id="numpy-whole-blocks"),
    pytest.param("uint8", (10, 99), (), id="numpy-parts-of-blocks"),
    pytest.param("float32", (4, 1024), ("--torch",), id="torch", marks=needs_torch),
    pytest.param("bfloat16", (1001,), ("--torch",), id="torch-bfloat16", marks=needs_torch),
]


def samples_of(dtype: str, shape: tuple[int, ...]) -> tuple[Samples, bytes]:
    """Random samples, as numbers and as bytes; NumPy has no bfloat16, half of a float32."""
    values = np.random.default_rng(SEED).uniform(0, 100, (COUNT, *shape))
    if dtype != "bfloat16":
        samples = values.astype(dtype)
        return samples, samples.tobytes()
    halves = values.astype(np.float32).view(np.uint32) >> 16
    return (halves << 16).view(np.float32), halves.astype(np.uint16).tobytes()


def batches_of(samples: Samples) -> Iterator[Samples]:
    order = list(range(COUNT))
    random.Random(SEED).shuffle(order)
    for start in range(0, COUNT, BATCH):
        yield samples[order[start : start + BATCH]]


def way_of(path: Path, *, direct: bool = True) -> str:
    """The way that a read of the file takes here."""
    with gdsdirect.open(path, direct=direct) as file:
        buffer = GpuMappedBuffer.from_host_visible(4096)
        return file.read_into(buffer, size=min(4096, file.size)).path.name


def described(dtype: str, shape: tuple[int, ...]) -> list[object]:
    """The samples, to the example."""
    lengths = ",".join(map(str, shape))
    return ["--dtype", dtype, "--shape", lengths, "--batch", BATCH, "--seed", SEED]


def run_example(*arguments: object) -> str:
    command = [sys.executable, "-P", "-W", "error", *map(str, (EXAMPLE, *arguments))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def told(text: str) -> dict[str, int]:
    """Bytes by way, as they are printed."""
    return {way: int(n.replace(",", "")) for n, way in re.findall(r"([\d,]+) bytes (\w+)", text)}


def check(printed: str, samples: Samples, dtype: str) -> dict[str, int]:
    """Compare shape, type and mean of each batch; the bytes by way of all of them."""
    *lines, last = printed.splitlines()
    total: Counter[str] = Counter()
    for line, batch in zip(lines, batches_of(samples), strict=True):
        found = re.fullmatch(r"(.+), mean (\S+) \| (.+)", line)
        assert found is not None, line
        assert found[1].replace("torch.", "") == f"{batch.shape} {dtype}"
        assert float(found[2]) == pytest.approx(batch.mean(dtype=float), rel=1e-7)
        total.update(told(found[3]))
    assert re.match(r"[\d,.]+ MB/s in [\d.]+ s \| ", last)
    assert told(last) == total
    return total


@pytest.mark.parametrize(("dtype", "shape", "options"), KINDS)
def test_samples_of_a_large_file(
    dtype: str, shape: tuple[int, ...], options: tuple[str, ...], tmp_path: Path
) -> None:
    samples, stored = samples_of(dtype, shape)
    path = tmp_path / "samples"
    path.write_bytes(stored + b"a rest")
    ways = check(run_example(path, *described(dtype, shape), *options), samples, dtype)
    copied = ways.pop("copied")
    assert sum(ways.values()) == len(stored)
    if len(stored) // COUNT % 4096 == 0:
        assert (ways, copied) == ({way_of(path): len(stored)}, 0)


@pytest.mark.parametrize(("dtype", "shape", "options"), KINDS)
def test_many_files(
    dtype: str, shape: tuple[int, ...], options: tuple[str, ...], tmp_path: Path
) -> None:
    samples, stored = samples_of(dtype, shape)
    size = len(stored) // COUNT
    for number in range(COUNT):
        (tmp_path / f"{number:02}").write_bytes(stored[number * size :][:size])
    ways = check(run_example(tmp_path, *described(dtype, shape), *options), samples, dtype)
    assert ways == {way_of(tmp_path / "00"): len(stored), "copied": len(stored)}


def test_the_page_cache_when_asked_for(tmp_path: Path) -> None:
    samples, stored = samples_of("int16", (100,))
    size = len(stored) // COUNT
    paths = [tmp_path / f"{number:02}" for number in range(COUNT)]
    for number, path in enumerate(paths):
        path.write_bytes(stored[number * size :][:size])
    (whole := tmp_path / "whole").write_bytes(stored)
    of_files = run_example(*paths, "--cached", *described("int16", (100,)))
    assert check(of_files, samples, "int16") == {"BUFFERED": len(stored), "copied": len(stored)}
    of_one = run_example(whole, "--cached", *described("int16", (100,)))
    assert check(of_one, samples, "int16") == {"BUFFERED": len(stored), "copied": 0}
