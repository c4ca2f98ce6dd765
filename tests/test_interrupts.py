"""An exception may come anywhere in a call: nothing is lost, and nobody else is harmed.

It comes from a signal's handler (Ctrl-C in a notebook, a timeout by SIGALRM), or of want of memory.
interrupting.py raises it at every bytecode of gdsdirect's, at random times, and in place of memory;
afterwards the same buffer reads right, nothing is held that wasn't before, other threads went on, a
stream leaves no chunk out, and what came out is what went in.

Each trial is an interpreter of its own, since what is wrong may be that it hangs.
"""

import dis
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from disturbances import AtBytecode, Interrupt, Recorder
from trials import GPU, HOST, MEMORY

import gdsdirect

HERE = Path(__file__).resolve().parent


def disturb(kind: str, trial: str, folder: Path) -> None:
    """Fail with all that was wrong after a disturbance."""
    contents, status = folder / "contents", folder / "status"
    contents.mkdir()
    command = [sys.executable, "-P", str(HERE / "interrupting.py"), kind, trial]
    done = subprocess.run([*command, contents, status], capture_output=True, text=True)
    if (done.returncode, done.stdout, done.stderr) != (0, "", ""):
        last = status.read_text().strip() if status.exists() else "nothing"
        text = f"{done.stdout}status {done.returncode}, the last that was tried: {last}"
        pytest.fail(f"{text}\n{done.stderr}", pytrace=False)


@pytest.mark.parametrize("trial", [*HOST, *GPU])
def test_at_every_bytecode(trial: str, tmp_path: Path) -> None:
    disturb("bytecodes", trial, tmp_path)


@pytest.mark.parametrize("trial", [*HOST, *GPU])
def test_from_signals(trial: str, tmp_path: Path) -> None:
    disturb("signals", trial, tmp_path)


# Generators and comprehensions, of which some CPythons crash when an allocation fails.
PLAIN = """
import _testcapi
from collections import namedtuple

Pair = namedtuple("Pair", "first second")

def inner():
    yield
    return [pair for pair in (Pair(number, number + 300_000) for number in range(20))]

def outer():
    return (yield from inner())

for _ in range(5):
    list(outer())
for after in range(150):
    try:
        _testcapi.set_nomemory(after, after + 1)
        try:
            list(outer())
        finally:
            _testcapi.remove_mem_hooks()
    except MemoryError:
        pass
    list(outer())
"""


@functools.cache
def why_memory_cannot_lack() -> str | None:
    """What this CPython itself has against an allocation that fails, or None."""
    if importlib.util.find_spec("_testcapi") is None:
        return "this CPython comes without _testcapi, by which an allocation can be made to fail"
    if subprocess.run([sys.executable, "-c", PLAIN], stderr=subprocess.DEVNULL).returncode != 0:
        return "this CPython crashes by itself where an allocation fails"
    return None


@pytest.mark.parametrize("trial", MEMORY)
def test_for_want_of_memory(trial: str, tmp_path: Path) -> None:
    why = why_memory_cannot_lack()
    if why is not None:
        pytest.skip(why)
    disturb("memory", trial, tmp_path)


def test_a_bytecode_is_disturbed_as_it_is_said() -> None:
    """Each one that is recorded, once, and each of a function that runs through."""
    call = functools.partial(gdsdirect.parse_nvidia_fs_stats, "Reads : err=3")
    call()
    recorder = Recorder()
    recorder.run(call)
    seen = {point.instruction for point in recorder.points if point.code is call.func.__code__}
    assert {
        each.offset for each in dis.get_instructions(call.func) if each.opname != "CACHE"
    } >= seen
    assert len(seen) > 20
    for point in recorder.points:
        error = Interrupt()
        with pytest.raises(Interrupt) as came:
            AtBytecode(point, error).run(call)
        assert came.value is error
