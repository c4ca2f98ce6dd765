"""Which reads make up a transfer: whole blocks into their place, the rest by way of a slot."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gdsdirect._nvme_sqe import _survey

SLOT = 64 << 10  # bytes of a slot; of smaller ones the handling shows in large misaligned reads
REGISTERED = 1 << 30  # bytes of a registered buffer (csrc/check.c); a read may not cross two


class Range(NamedTuple):
    """Bytes from `offset` on, and the place in the buffer where they go."""

    offset: int
    size: int
    target: int


class Bounced(NamedTuple):
    """An aligned read into a slot: of its bytes, `wanted` begin `skip` bytes from its start."""

    offset: int
    size: int
    skip: int
    wanted: Range


class Rules(NamedTuple):
    """What reads are held to, in bytes.

    Offsets and sizes are multiples of `alignment`, addresses of `memory_alignment`, which is no
    larger, and no read is of more than `most`. `address` is the buffer's.
    """

    alignment: int
    memory_alignment: int
    most: int
    address: int


@dataclass
class Plan:
    """Reads into their place, as arrays for the ring, and those by way of a slot."""

    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("I"))
    targets: array[int] = field(default_factory=lambda: array("Q"))
    bounced: list[Bounced] = field(default_factory=list)
    _common: Common | None = field(default=None, init=False, repr=False, compare=False)

    def range(self, index: int) -> Range:
        """One of the reads into their place."""
        return Range(self.offsets[index], self.sizes[index], self.targets[index])

    def ranges(self) -> list[Range]:
        """All of them."""
        return list(map(Range, self.offsets, self.sizes, self.targets))

    @property
    def common(self) -> Common:
        """What the reads into their place have in common; asked for once the plan is made."""
        # Not functools.cached_property, whose lock (before 3.12) another thread may have at a fork.
        if self._common is None:
            self._common = Common(*_survey(self.offsets, self.sizes, self.targets))
        return self._common


class Common(NamedTuple):
    """Of many reads: the bits of all offsets and sizes ored, and of all targets; the smallest and
    largest size, all together; the first offset, and the last one's end in file and buffer."""

    blocks: int
    places: int
    least: int
    most: int
    total: int
    first: int
    end: int
    target_end: int

    def are_whole(self, rules: Rules) -> bool:
        """Whether they may be sent as they are."""
        return (
            self.blocks % rules.alignment == 0
            and (self.places | rules.address) % rules.memory_alignment == 0
            and 0 < self.least <= self.most <= rules.most
            and self.target_end <= REGISTERED
        )


def span_of(ranges: Sequence[Range]) -> tuple[int, int]:
    """The first offset, and where the last range ends."""
    return min(each.offset for each in ranges), max(each.offset + each.size for each in ranges)


def plan_reads(ranges: Iterable[Range], rules: Rules, *, overrun: bool = False) -> Plan:
    """The reads that bring `ranges`.

    With `overrun` the buffer has room behind each range, up to the next multiple of the alignment,
    that may be written.
    """
    plan = Plan()
    alignment = rules.alignment
    for offset, size, target in ranges:
        end = offset + size
        first = offset + -offset % alignment
        last = end + -end % alignment if overrun else end - end % alignment
        begins = target + first - offset
        if first >= last or (rules.address + begins) % rules.memory_alignment:
            _bounce(plan, Range(offset, size, target), rules)
            continue
        _bounce(plan, Range(offset, first - offset, target), rules)
        _read(plan, Range(first, last - first, begins), rules)
        _bounce(plan, Range(last, end - last, begins + last - first), rules)
    return plan


def _read(plan: Plan, whole: Range, rules: Rules) -> None:
    offset, left, target = whole
    while left > 0:
        room = REGISTERED - target % REGISTERED
        size = min(left, room - room % rules.alignment)
        if size == 0:  # a block that lies across two registered buffers
            size = rules.alignment
            _bounce(plan, Range(offset, size, target), rules)
        else:
            most = rules.most
            full, rest = divmod(size, most)
            plan.offsets.extend(range(offset, offset + size, most))
            plan.sizes.extend([most] * full + [rest] * (rest > 0))
            plan.targets.extend(range(target, target + size, most))
        offset, left, target = offset + size, left - size, target + size


def _bounce(plan: Plan, whole: Range, rules: Rules) -> None:
    offset, left, target = whole
    while left > 0:
        skip = offset % rules.alignment
        wanted = min(left, SLOT - skip)
        size = skip + wanted + -(skip + wanted) % rules.alignment
        plan.bounced.append(Bounced(offset - skip, size, skip, Range(offset, wanted, target)))
        offset, left, target = offset + wanted, left - wanted, target + wanted
