"""A group a row. A round is a pass of all of a contestant's commands, as many as the group says."""

from typing import Any

from benchmarks.rows import Row

_ROUNDS = 20


def test_contestant(benchmark: Any, row: Row, contestant: str) -> None:
    (chosen,) = (each for each in row.contestants if each.name == contestant)
    benchmark.group = f"{row.title}: {chosen.commands:,} commands"
    benchmark.extra_info["commands"] = chosen.commands
    benchmark.pedantic(chosen.run, setup=chosen.before, rounds=_ROUNDS, warmup_rounds=2)
