"""Exceptions inside of a call: at a bytecode, from a signal's handler, for want of memory.

Each disturbance runs a call, and `raised` has what it raised meanwhile.
"""

from __future__ import annotations

import dis
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple, Protocol

import gdsdirect

PACKAGE = str(Path(gdsdirect.__file__).resolve().parent) + os.sep


class Interrupt(BaseException):
    """Raised by nobody else."""


class ControlC(KeyboardInterrupt):
    """The same as one that ends an event loop."""


DISTURBANCES = (Interrupt, ControlC, MemoryError)

Call = Callable[[], object]


class Disturbance(Protocol):
    """Runs a call, and raises in it."""

    raised: list[BaseException]

    def run(self, call: Call) -> None: ...


def is_ours(frame: FrameType) -> bool:
    """Whether the code is the package's."""
    return frame.f_code.co_filename.startswith(PACKAGE)


# ---- At a bytecode


class Point(NamedTuple):
    """The n-th time that a bytecode is executed, and what to call it."""

    code: CodeType
    instruction: int
    nth: int
    text: str


class _Traced:
    """Looks at each bytecode of a call, by a trace function, which every CPython has."""

    def __init__(self) -> None:
        self.raised: list[BaseException] = []

    def run(self, call: Call) -> None:
        sys._getframe().f_trace_opcodes = True  # 3.12 looks for it here
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, _: object) -> Any:
        if not self._concerns(frame):
            return None
        frame.f_trace = self._step  # 3.13 looks for it below
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            self._look(frame)
        return self._step

    def _concerns(self, frame: FrameType) -> bool:
        raise NotImplementedError

    def _look(self, frame: FrameType) -> None:
        raise NotImplementedError


class Recorder(_Traced):
    """Raises nothing, and notes each bytecode of the package's."""

    # After these CPython looks whether a signal came.
    _LOOKS = ("CALL", "RESUME", "JUMP_BACKWARD", "SEND")
    # Raised here, an exception makes CPython itself keep the one that is being handled, for good.
    _HANDLING = ("PUSH_EXC_INFO", "POP_EXCEPT")

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Point] = []
        self._counts: dict[tuple[CodeType, int], int] = {}
        self._before: dict[int, str] = {}  # each frame's last bytecode

    def _concerns(self, frame: FrameType) -> bool:
        self._before.pop(id(frame), None)
        return is_ours(frame)

    def _look(self, frame: FrameType) -> None:
        code, instruction = frame.f_code, frame.f_lasti
        names = [dis.opname[each] for each in code.co_code[instruction : instruction + 4 : 2]]
        name = names[0]
        if name in self._HANDLING or names == ["COPY", "POP_EXCEPT"]:
            return
        nth = self._counts[code, instruction] = self._counts.get((code, instruction), 0) + 1
        before, self._before[id(frame)] = self._before.get(id(frame), "RESUME"), name
        where = f"{os.path.relpath(code.co_filename, PACKAGE)}:{frame.f_lineno}"
        text = f"{code.co_qualname}, {where}, {name}"
        if not before.startswith(self._LOOKS):
            text += ", where no signal is seen"
        self.points.append(Point(code, instruction, nth, text))


class AtBytecode(_Traced):
    """Raises an exception before one bytecode is executed."""

    def __init__(self, point: Point, error: BaseException) -> None:
        super().__init__()
        self._point = point
        self._left = point.nth
        self._error = error

    def _concerns(self, frame: FrameType) -> bool:
        return frame.f_code is self._point.code

    def _look(self, frame: FrameType) -> None:
        if frame.f_lasti == self._point.instruction:
            self._left -= 1
            if self._left == 0:
                self.raised.append(self._error)
                raise self._error


# ---- From a signal's handler


class Storm:
    """Signals whose handler raises: the first after `delay` seconds, others soon after it.

    `may_raise` tells of the frame that a signal was seen in whether it may be left by an exception.
    """

    def __init__(
        self,
        kind: type[BaseException],
        delay: float,
        times: int,
        may_raise: Callable[[FrameType], bool],
    ) -> None:
        self.raised: list[BaseException] = []
        self._kind, self._delay, self._left = kind, delay, times
        self._may_raise = may_raise
        self._armed = False

    def run(self, call: Call) -> None:
        signal.signal(signal.SIGALRM, self._handle)
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, self._delay)
            call()
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, _ignore)

    def _handle(self, _: int, frame: FrameType | None) -> None:
        if not self._armed or frame is None or self._left == 0:
            return
        own = frame.f_code in (Storm.run.__code__, Storm._handle.__code__)
        if own or not self._may_raise(frame):
            signal.setitimer(signal.ITIMER_REAL, 2e-5)
            return
        self._left -= 1
        if self._left:
            signal.setitimer(signal.ITIMER_REAL, self._delay / 4 + 1e-6)
        where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        self.raised.append(self._kind(f"a signal in {frame.f_code.co_qualname}, {where}"))
        raise self.raised[-1]


def _ignore(_: int, frame: FrameType | None) -> None:
    """A handler, since CPython complains of signals that came before they were ignored."""


# ---- For want of memory


class NoMemory:
    """One allocation of CPython's fails, after `after` that don't."""

    def __init__(self, after: int) -> None:
        import _testcapi  # type: ignore[import-not-found]

        self.raised: list[BaseException] = []
        self._after, self._testcapi = after, _testcapi

    def run(self, call: Call) -> None:
        self._testcapi.set_nomemory(self._after, self._after + 1)
        try:
            call()
        finally:
            self._testcapi.remove_mem_hooks()
