"""A transfer: some ranges of an origin into a buffer, by the best way there is, to the end.

Each is a generator of the requests to carry out, so that threads and event loops drive the same
one: `to_the_end` and `to_the_end_async`.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from gdsdirect.errors import WayClosedError, completion_error, ring_module
from gdsdirect.extents import Extents, RefusedError
from gdsdirect.memory import MemoryKind
from gdsdirect.namespace import Namespace
from gdsdirect.origin import BEST_FIRST, DWORD, Origin
from gdsdirect.plan import Bounced, Plan, Range, Rules, plan_reads, span_of
from gdsdirect.shared_ring import Requests, SharedRing
from gdsdirect.stream import DataPath

if TYPE_CHECKING:
    from gdsdirect._uring_cmd import Request
    from gdsdirect.cuda import Event

PIECE = 1 << 20  # bytes of one read of a file: large enough that its overhead doesn't show
_TRIES = 3  # times that a read may bring nothing although there is more

# Registered memory is a run of pages to the kernel, and Linux 6.1 wants whole blocks of each
# (iov_iter_aligned_bvec), whatever it says of the memory's alignment.
_APART = "address and offset are not apart by a multiple of {} bytes, so that {}"

# With these the kernel refuses a direct read that it can't do, and a copy may do. EIO is none.
_REFUSALS = frozenset((errno.EINVAL, errno.EFAULT, errno.EOPNOTSUPP, errno.EREMOTEIO))

Require = DataPath | Collection[DataPath] | None
"""The ways that a read may take; None leaves it to gdsdirect."""

T = TypeVar("T")
Steps = Generator[Requests, None, "ReadResult"]


class ReadResult(NamedTuple):
    """What a read brought, and the way that it went.

    `nbytes` are in the buffer: all that were asked for, or all up to the end of the file. `path` is
    the way they went, and `why` says what stood in the way of a better one, or is None. Where
    several were taken, `path` is the least of them, and `ways` has the bytes of each.
    `bounce_bytes` of them were read into memory of gdsdirect's own and copied from there: those of
    blocks that are not wanted whole, and all that went through it into GPU memory.

    `event` is there where a read was ordered on a stream of CUDA's: the bytes are in place once it
    is done. `event.query()` tells whether it is, `event.synchronize()` waits for it, and
    `event.handle` is the CUevent.
    """

    nbytes: int
    path: DataPath
    why: str | None = None
    bounce_bytes: int = 0
    ways: Mapping[DataPath, int] = MappingProxyType({})
    event: Event | None = None


def result_of(
    nbytes: int,
    ways: Mapping[DataPath, int],
    way: DataPath,
    reasons: Iterable[str],
    bounced: int,
    event: Event | None = None,
) -> ReadResult:
    """The result of bytes that went these ways; of none at all they would have gone by `way`."""
    taken = {each: ways[each] for each in BEST_FIRST if ways.get(each)}
    path = next(reversed(taken), way)
    return ReadResult(nbytes, path, "; ".join(reasons) or None, bounced, taken, event)


class _Came(NamedTuple):
    """Bytes that a run brought, and how many of them by way of a slot."""

    nbytes: int
    copied: int


class _Gap(NamedTuple):
    """What a read did not bring, and the kernel's result for it."""

    range: Range
    result: int


class Transfer:
    """Reads of one origin into a ring's memory, by ways of `require` alone if that is given."""

    def __init__(
        self, origin: Origin, ring: SharedRing, require: Collection[DataPath] | None = None
    ) -> None:
        self._origin = origin
        self._ring = ring
        self._require = require
        self._reasons = [f"NVME_PASSTHROUGH is closed: {origin.unmapped}"] * bool(origin.unmapped)
        self._bounced = 0
        self._ways: dict[DataPath, int] = {}
        self._way = self._choose({})

    def _choose(self, obstacles: dict[DataPath, str]) -> DataPath:
        """The best way that is open and not among `obstacles`; notes why it is no better one."""
        for way in BEST_FIRST:
            obstacle = obstacles.get(way) or self._origin.obstacle(way, self._ring)
            if obstacle is None and (self._require is None or way in self._require):
                self._reasons += self._excuses(way)
                return way
            obstacles[way] = obstacle or "require= leaves it out"
        asked = self._require if self._require is not None else obstacles
        told = {way.name: obstacles[way] for way in BEST_FIRST if way in asked}
        raise WayClosedError(self._origin.path, told)

    def _excuses(self, way: DataPath) -> Iterator[str]:
        if way is DataPath.BUFFERED:
            yield self._origin.undirected or "require= asks for it"
        if way is DataPath.FILE_DIRECT and self._ring.unregistered is not None:
            yield self._ring.unregistered

    @property
    def _namespace(self) -> Namespace | None:
        """What the commands go to, where the way is passthrough."""
        if self._way is not DataPath.NVME_PASSTHROUGH:
            return None
        extents = self._origin.extents
        return self._origin.namespace if extents is None else extents.namespace

    # ---- Steps

    def read(self, wanted: Range, *, overrun: bool = False) -> Steps:
        """Bring `wanted`, or what the file has of it. `overrun` is that of `plan_reads`."""
        end = min(wanted.offset + wanted.size, self._origin.size)
        whole = wanted._replace(size=max(0, end - wanted.offset))
        cut = yield from self._bring([whole] if whole.size else [], overrun=overrun)
        return self._result(max(0, min(end, cut.range.offset if cut else end) - wanted.offset))

    def read_many(self, plan: Plan) -> Steps:
        """Bring all reads of a plan that the caller made; ShortReadError for one beyond the end."""
        whole = plan.common.are_whole(self._rules())
        ranges = [] if whole else [each for each in plan.ranges() if each.size]
        cut = yield from self._bring(ranges, plan=plan if whole else None)
        if cut is not None:
            raise self._error(cut)
        return self._result(plan.common.total)

    def _bring(
        self, left: list[Range], *, overrun: bool = False, plan: Plan | None = None
    ) -> Generator[Requests, None, _Gap | None]:
        """Read until nothing is left but what lies beyond the file's end, and return the first of
        that. A `plan` is for the first attempt, in place of ranges."""
        cut: _Gap | None = None
        tries = 0
        for whole in left:
            self._settle(whole)
        while left or plan is not None:
            before, way = left, self._way
            gaps = yield from self._attempt(left, plan, overrun=overrun)
            left, plan = [], None
            for gap in sorted(gaps):
                if gap.result >= 0 and self._is_the_end(gap.range.offset):
                    cut = min(cut or gap, gap)
                elif cut is None or gap.range.offset < cut.range.offset:
                    self._judge(gap, way)
                    left.append(gap.range)
            tries = tries + 1 if left == before and way is self._way else 0
            if tries == _TRIES:
                raise self._error(gaps[0])
        return cut

    def _settle(self, wanted: Range) -> None:
        """What address and offset have to do with each other, which the way depends on too."""
        apart = self._ring.buffer.address + wanted.target - wanted.offset
        direct = self._require is None or DataPath.FILE_DIRECT in self._require
        rules = self._rules()
        if apart % rules.memory_alignment == 0:
            return
        if self._way is DataPath.FILE_FIXED and direct:
            self._way = DataPath.FILE_DIRECT
            self._note(_APART.format(rules.memory_alignment, "FILE_FIXED doesn't go"))
            self._settle(wanted)
        else:
            self._note(_APART.format(rules.memory_alignment, "every byte is copied"))

    def _note(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.append(reason)

    def _is_the_end(self, offset: int) -> bool:
        return self._origin.namespace is None and offset >= self._origin.size

    def _attempt(
        self, ranges: list[Range], plan: Plan | None, *, overrun: bool
    ) -> Generator[Requests, None, list[_Gap]]:
        """Read the ranges, or the plan, once; returns what that did not bring."""
        if self._origin.extents is not None and self._namespace is not None:
            return (yield from self._attempt_by_extents(self._origin.extents, ranges, plan))
        plan = plan or plan_reads(ranges, self._rules(), overrun=overrun)
        gaps, came = yield from self._run(plan)
        self._count(came)
        return gaps

    def _attempt_by_extents(
        self, extents: Extents, ranges: list[Range], plan: Plan | None
    ) -> Generator[Requests, None, list[_Gap]]:
        """The same past the file system: all of it, or none, with a reason to do it as a file."""
        first, end = span_of(ranges) if plan is None else (plan.common.first, plan.common.end)
        try:
            with extents.hold(first, end) as held:
                device = held.located(plan) if plan is not None else None
                if device is None:
                    ranges = plan.ranges() if plan is not None else ranges
                    device = plan_reads(held.on_the_device(ranges), self._rules())
                gaps, came = yield from self._run(device)
                if gaps and not self._is_refusal(gaps[0]):
                    raise self._error(gaps[0])
                if gaps:
                    raise RefusedError(self._error(gaps[0]).strerror)
                if held.moved():
                    raise RefusedError("its blocks were moved while they were read")
        except RefusedError as refused:
            obstacle = str(refused)
            self._note(f"NVME_PASSTHROUGH is closed: {obstacle}")
            self._way = self._choose({DataPath.NVME_PASSTHROUGH: obstacle})
            ranges = plan.ranges() if plan is not None else ranges
            for whole in ranges:
                self._settle(whole)
            return [_Gap(whole, 0) for whole in ranges]
        self._count(came)
        return []

    def _run(self, plan: Plan) -> Generator[Requests, None, tuple[list[_Gap], _Came]]:
        """The plan's reads: what is missing of them, and what came."""
        direct = self._direct(plan) if plan.offsets else None
        bounce = self._by_slots(plan.bounced) if plan.bounced else None
        yield tuple(each for each in (direct, bounce) if each is not None)
        gaps = _gaps(direct, lambda index: (plan.range(index), 0))
        missed = _gaps(bounce, lambda index: (plan.bounced[index].wanted, plan.bounced[index].skip))
        copied = sum(each.wanted.size for each in plan.bounced) - _total(missed)
        return gaps + missed, _Came(plan.common.total - _total(gaps) + copied, copied)

    def _count(self, came: _Came) -> None:
        self._bounced += came.copied
        self._ways[self._way] = self._ways.get(self._way, 0) + came.nbytes

    def _rules(self) -> Rules:
        origin, address, namespace = self._origin, self._ring.buffer.address, self._namespace
        if namespace is not None:
            return Rules(namespace.lba_size, DWORD, namespace.safe_transfer, address)
        if self._way is DataPath.BUFFERED:
            return Rules(1, 1, PIECE, address)
        fixed = self._way is DataPath.FILE_FIXED
        memory_alignment = origin.alignment if fixed else origin.memory_alignment
        return Rules(origin.alignment, memory_alignment, PIECE, address)

    def _direct(self, plan: Plan) -> Request:
        arrays = plan.offsets, plan.sizes, plan.targets
        if self._namespace is not None:
            return self._ring.reads(self._namespace._source, arrays)
        buffered = self._way is DataPath.BUFFERED
        return self._ring.reads(
            self._origin.buffered if buffered else self._origin.source,
            arrays,
            fixed=self._ring.registered and self._way is not DataPath.FILE_DIRECT,
        )

    def _by_slots(self, bounced: list[Bounced]) -> Request:
        namespace = self._namespace
        arrays = (
            array("Q", [each.offset for each in bounced]),
            array("I", [each.size for each in bounced]),
            array("Q", [each.wanted.target for each in bounced]),
        )
        return self._ring.bounced(
            self._origin.source if namespace is None else namespace._source,
            arrays,
            [(each.skip, each.wanted.size) for each in bounced],
            fixed=self._way is DataPath.FILE_FIXED,
        )

    # ---- What came of it

    def _judge(self, gap: _Gap, way: DataPath) -> None:
        """Raise for what can't be read; else what is left is to be read again, `self._way`."""
        if gap.result >= 0 and self._namespace is None:
            return
        error = self._error(gap)
        copying = self._require is None or DataPath.BUFFERED in self._require
        files = way in (DataPath.FILE_FIXED, DataPath.FILE_DIRECT)
        if not (files and copying and self._is_refusal(gap)):
            raise error
        self._way = DataPath.BUFFERED
        self._note(f"{way.name} was refused: {error.strerror}")

    @staticmethod
    def _is_refusal(gap: _Gap) -> bool:
        return -gap.result in _REFUSALS

    def _error(self, gap: _Gap) -> OSError:
        namespace, (offset, size, _) = self._namespace, gap.range
        peer = self._ring.kind is MemoryKind.BAR1_PEER
        if namespace is None:
            path = self._origin.path
            return completion_error(gap.result, 0, size, path=path, offset=offset, peer=peer)
        first = offset // namespace.lba_size
        return completion_error(
            gap.result,
            0,
            size,
            path=namespace.path,
            namespace_id=namespace.nsid,
            starting_lba=first,
            blocks=-(-(offset + size) // namespace.lba_size) - first,
            peer=peer,
        )

    def _result(self, nbytes: int) -> ReadResult:
        return result_of(nbytes, self._ways, self._way, self._reasons, self._bounced)


def _gaps(request: Request | None, wanted: Callable[[int], tuple[Range, int]]) -> list[_Gap]:
    """What is missing of the request's reads; `wanted` tells a read's range and bytes to skip."""
    gaps = []
    for index, result, nbytes in request.take() if request is not None else ():
        (offset, size, target), skip = wanted(index)
        there = max(0, min(size, nbytes - skip))
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


def to_the_end(steps: Generator[Requests, None, T], deadline: int | None = None) -> T:
    """Take all steps, waiting in this thread; TimeoutError at the `deadline` (monotonic_ns)."""
    try:
        while True:
            requests = next(steps)
            requests[0].ring._carry_out(requests, deadline)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        steps.close()


async def to_the_end_async(steps: Generator[Requests, None, T]) -> T:
    """The same, while other tasks run."""
    try:
        while True:
            requests = next(steps)
            await requests[0].ring.carry_out(requests)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        steps.close()


def finish(steps: Steps, timeout: float | None) -> ReadResult:
    """Take all steps, with a TimeoutError after `timeout` seconds that says so."""
    try:
        return to_the_end(steps, ring_module().deadline(timeout))
    except TimeoutError as error:
        raise timed_out(error, timeout) from None


def timed_out(error: TimeoutError, timeout: float | None) -> TimeoutError:
    """The error for a read whose time was up; the drive's, the kernel's, a handler's stay."""
    if type(error) is not TimeoutError or error.args:
        return error
    return TimeoutError(f"the read did not come back in {timeout} s")
