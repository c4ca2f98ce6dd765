"""A transfer: some ranges of an origin into a lane's buffer, by the best way there is, to the end.

Each is a generator of the requests to wait for, so that threads and event loops drive the same one:
`finish` and `finish_async`.
"""

from __future__ import annotations

import errno
import time
from array import array
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gdsdirect._nvme_sqe import encode_nvme_read_sqes
from gdsdirect.errors import WayClosedError, completion_error
from gdsdirect.lane import Bounce, CommandReads, FileReads, Lane, Request, copied_bytes
from gdsdirect.memory import MemoryKind
from gdsdirect.namespace import Namespace
from gdsdirect.origin import BEST_FIRST, Origin
from gdsdirect.plan import Bounced, Plan, Range, Rules, plan_reads
from gdsdirect.stream import DataPath

_PIECE = 1 << 20  # bytes of one read of a file: large enough that its overhead doesn't show
_TRIES = 3  # times that a read may bring nothing although there is more

# Registered memory is a run of pages to the kernel, and Linux 6.1 wants whole blocks of each
# (iov_iter_aligned_bvec), whatever it says of the memory's alignment.
_APART = "address and offset are not apart by a multiple of {} bytes, so that {}"

# With these the kernel refuses a direct read that it can't do, and a copy may do. EIO is none.
_REFUSALS = frozenset((errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP, errno.EREMOTEIO))

Require = DataPath | Collection[DataPath] | None
"""The ways that a read may take; None leaves it to gdsdirect."""

Steps = Generator[Request, None, "ReadResult"]


@dataclass(frozen=True)
class ReadResult:
    """What a read brought, and the way that it went.

    `nbytes` are in the buffer: all that were asked for, or all up to the end of the file. `path` is
    the way they went, and `why` says what stood in the way of a better one, or is None. Where
    several were taken, `path` is the least of them, and `ways` has the bytes of each.
    `bounce_bytes` of them were read into memory of gdsdirect's own and copied from there: those of
    blocks that are not wanted whole.
    """

    nbytes: int
    path: DataPath
    why: str | None = None
    bounce_bytes: int = 0
    ways: Mapping[DataPath, int] = field(default_factory=dict)


class _Gap(NamedTuple):
    """What a read did not bring, and the kernel's result for it."""

    range: Range
    result: int


class Transfer:
    """Reads of one origin into one lane's buffer, by ways of `require` alone if that is given."""

    def __init__(
        self, origin: Origin, lane: Lane, require: Collection[DataPath] | None = None
    ) -> None:
        self._origin = origin
        self._lane = lane
        self._require = require
        self._way, self._why = self._choose(BEST_FIRST)
        self._bounced = 0
        self._ways: dict[DataPath, int] = {}

    def _choose(self, among: Iterable[DataPath]) -> tuple[DataPath, str | None]:
        """The best open way, and why no better one is."""
        obstacles: dict[DataPath, str] = {}
        for way in among:
            obstacle = self._origin.obstacle(way, self._lane)
            if obstacle is None and (self._require is None or way in self._require):
                return way, self._excuse(way)
            obstacles[way] = obstacle or "require= leaves it out"
        asked = {way: obstacles[way] for way in obstacles if way in (self._require or obstacles)}
        raise WayClosedError(
            self._origin.path, {way.name: obstacle for way, obstacle in asked.items()}
        )

    def _excuse(self, way: DataPath) -> str | None:
        if way is DataPath.BUFFERED:
            return self._origin.undirected or "require= asks for it"
        if way is DataPath.FILE_DIRECT and self._lane.kind is not MemoryKind.BAR1_PEER:
            return self._lane.why_unregistered
        return None

    # ---- Steps

    def read(self, wanted: Range, *, overrun: bool = False) -> Steps:
        """Bring `wanted`, or what the file has of it. `overrun` is that of `plan_reads`."""
        yield from self._lane.abandoned  # it may write into the buffer still
        end = min(wanted.offset + wanted.size, self._origin.size)
        left = [wanted._replace(size=max(0, end - wanted.offset))]
        self._settle(wanted)
        tries = 0
        while left:
            before, way = left, self._way
            gaps = yield from self._attempt(left, overrun=overrun)
            left = []
            for gap in sorted(gaps):
                if gap.result >= 0 and self._is_the_end(gap.range.offset):
                    end = min(end, gap.range.offset)
                elif gap.range.offset < end:
                    self._judge(gap, way)
                    left.append(gap.range)
            tries = tries + 1 if left == before else 0
            if tries == _TRIES:
                raise self._error(gaps[0])
        return self._result(max(0, end - wanted.offset))

    def _settle(self, wanted: Range) -> None:
        """What address and offset have to do with each other, which the way depends on too."""
        apart = self._lane.address + wanted.target - wanted.offset
        direct = self._require is None or DataPath.FILE_DIRECT in self._require
        rules = self._rules()
        if apart % rules.memory_alignment == 0:
            return
        if self._way is DataPath.FILE_FIXED and direct:
            self._way = DataPath.FILE_DIRECT
            self._why = _APART.format(rules.memory_alignment, "FILE_FIXED doesn't go")
            self._settle(wanted)
        else:
            self._why = _APART.format(rules.memory_alignment, "every byte is copied")

    def _is_the_end(self, offset: int) -> bool:
        return self._origin.namespace is None and offset >= self._origin.size

    def _attempt(
        self, ranges: list[Range], *, overrun: bool
    ) -> Generator[Request, None, list[_Gap]]:
        """Read the ranges once, and return what that did not bring."""
        plan = plan_reads(ranges, self._rules(), overrun=overrun)
        direct = self._direct(plan) if plan.offsets else None
        bounce = self._by_slots(plan.bounced) if plan.bounced else None
        requests = [request for request in (direct, bounce) if request is not None]
        try:
            for request in requests:
                request.lane.start(request)
            yield from requests
        finally:
            for request in requests:
                if request.left:
                    request.lane.abandon(request)
        for request in requests:
            if request.error is not None:
                raise request.error
        gaps = _gaps(direct, lambda index: (plan.range(index), 0))
        missed = _gaps(bounce, lambda index: (plan.bounced[index].wanted, plan.bounced[index].skip))
        copied = sum(each.wanted.size for each in plan.bounced) - _total(missed)
        came = sum(plan.sizes) - _total(gaps) + copied
        self._bounced += copied
        self._ways[self._way] = self._ways.get(self._way, 0) + came
        return gaps + missed

    def _rules(self) -> Rules:
        origin, address = self._origin, self._lane.address
        if self._way is DataPath.BUFFERED:
            return Rules(1, 1, _PIECE, address)
        if origin.namespace is not None:
            most = origin.namespace.safe_transfer
            return Rules(origin.alignment, origin.memory_alignment, most, address)
        fixed = self._way is DataPath.FILE_FIXED
        memory_alignment = origin.alignment if fixed else origin.memory_alignment
        return Rules(origin.alignment, memory_alignment, _PIECE, address)

    def _direct(self, plan: Plan) -> Request:
        origin = self._origin
        if origin.namespace is not None:
            commands = _commands(origin.namespace, plan, self._lane.address)
            return CommandReads(self._lane, origin.namespace, commands, plan.sizes)
        return FileReads(
            self._lane,
            origin.buffered if self._way is DataPath.BUFFERED else origin.source,
            (plan.offsets, plan.sizes, plan.targets),
            fixed=self._lane.ring.registered and self._way is not DataPath.FILE_DIRECT,
        )

    def _by_slots(self, bounced: list[Bounced]) -> Request:
        origin, lane = self._origin, self._lane.bounce

        def submit(start: int, slots: array[int], user_data: int) -> object:
            some = bounced[start : start + len(slots)]
            reads = Plan(
                array("Q", [each.offset for each in some]),
                array("I", [each.size for each in some]),
                slots,
            )
            if origin.namespace is not None:
                commands = _commands(origin.namespace, reads, lane.address)
                send = lane.ring.submit_nvme_passthrough
                return send(origin.namespace, commands, user_data=user_data)
            fixed = self._way is DataPath.FILE_FIXED and lane.ring.registered
            reads_of = lane.ring.submit_reads_fixed if fixed else lane.ring.submit_reads
            arrays = reads.offsets, reads.sizes, reads.targets
            return reads_of(origin.source, *arrays, user_data=user_data)

        sizes = array("I", [each.size for each in bounced])
        wanted = [(each.skip, each.wanted.size, each.wanted.target) for each in bounced]
        return Bounce(lane, sizes, wanted, submit)

    # ---- What came of it

    def _judge(self, gap: _Gap, way: DataPath) -> None:
        """Raise for what can't be read; else what is left is to be read again, `self._way`."""
        if self._origin.namespace is not None:
            raise self._error(gap)
        if gap.result >= 0:
            return
        error = self._error(gap)
        copying = self._require is None or DataPath.BUFFERED in self._require
        if way is DataPath.BUFFERED or -gap.result not in _REFUSALS or not copying:
            raise error
        self._way, self._why = DataPath.BUFFERED, f"{way.name} was refused: {error.strerror}"

    def _error(self, gap: _Gap) -> OSError:
        namespace, (offset, size, _) = self._origin.namespace, gap.range
        peer = self._lane.kind is MemoryKind.BAR1_PEER
        path = self._origin.path
        if namespace is None:
            return completion_error(gap.result, 0, size, path=path, offset=offset, peer=peer)
        first = offset // namespace.lba_size
        return completion_error(
            gap.result,
            0,
            size,
            path=path,
            namespace_id=namespace.nsid,
            starting_lba=first,
            blocks=-(-(offset + size) // namespace.lba_size) - first,
            peer=peer,
        )

    def _result(self, nbytes: int) -> ReadResult:
        ways = {way: self._ways[way] for way in BEST_FIRST if self._ways.get(way)}
        path = next(reversed(ways), self._way)
        return ReadResult(nbytes, path, self._why, self._bounced, ways)


def _commands(namespace: Namespace, plan: Plan, address: int) -> bytes:
    """The plan's reads, packed; `address` is that of the memory they go into."""
    lba_size = namespace.lba_size
    return encode_nvme_read_sqes(
        namespace.nsid,
        array("Q", [offset // lba_size for offset in plan.offsets]),
        array("I", [size // lba_size for size in plan.sizes]),
        array("Q", [address + target for target in plan.targets]),
    )


def _gaps(request: Request | None, wanted: Callable[[int], tuple[Range, int]]) -> list[_Gap]:
    """What is missing of the request's reads; `wanted` tells a read's range and bytes to skip."""
    gaps = []
    for index, (result, nbytes) in (request.short if request is not None else {}).items():
        (offset, size, target), skip = wanted(index)
        there = copied_bytes(nbytes, skip, size)
        if there < size:
            gaps.append(_Gap(Range(offset + there, size - there, target + there), result))
    return gaps


def _total(gaps: Iterable[_Gap]) -> int:
    return sum(gap.range.size for gap in gaps)


def permitted(require: Require) -> Collection[DataPath] | None:
    """The ways of `require`, checked."""
    if require is None:
        return None
    ways = (require,) if isinstance(require, DataPath) else tuple(require)
    for way in ways:
        if not isinstance(way, DataPath):
            raise TypeError(f"require has {way!r}: give DataPath members")
    return ways


# ---- To the end


def finish(steps: Steps, timeout: float | None) -> ReadResult:
    """Take all steps, waiting in this thread; TimeoutError after `timeout` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        while True:
            request = next(steps)
            request.lane.wait(request, deadline)
    except StopIteration as stop:
        result: ReadResult = stop.value
        return result
    finally:
        steps.close()


async def finish_async(steps: Steps) -> ReadResult:
    """Take all steps, while other tasks run."""
    try:
        while True:
            request = next(steps)
            await request.lane.wait_async(request)
    except StopIteration as stop:
        result: ReadResult = stop.value
        return result
    finally:
        steps.close()
