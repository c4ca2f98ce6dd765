"""`pytest benchmarks/`: each contestant of the rows in benchmarks/suite.py, by pytest-benchmark."""

import gc
from collections.abc import Iterator

import pytest

from benchmarks import yardstick
from benchmarks.rows import Row
from benchmarks.suite import ROWS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A row is opened here for the names of its contestants, and again to measure."""
    yardstick.build()
    every, ids = [], []
    for make in ROWS:
        with make() as row:
            every += [(make, contestant.name) for contestant in row.contestants]
            ids += [f"{row.title}: {contestant.name}" for contestant in row.contestants]
    metafunc.parametrize(("row", "contestant"), every, ids=ids, indirect=["row"], scope="session")


@pytest.fixture(scope="session")
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """One at a time: a thread can register the descriptors of 16 rings, no more."""
    with request.param() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()
