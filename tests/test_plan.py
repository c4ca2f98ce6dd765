"""Which reads make up a transfer: all of it, once, and each as direct reads must be."""

from hypothesis import given
from hypothesis import strategies as st

from gdsdirect.plan import REGISTERED, SLOT, Range, Rules, plan_reads

ALIGNMENTS = st.sampled_from([1, 512, 4096, 16384])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Range], Rules]:
    alignment = draw(ALIGNMENTS)
    rules = Rules(
        alignment=alignment,
        memory_alignment=min(alignment, draw(st.sampled_from([1, 4, 512]))),
        most=max(512, alignment * draw(st.integers(1, 64))),
        address=4096 * draw(st.integers(1, 1 << 20)) + draw(st.sampled_from([0, 0, 4, 16, 512])),
    )
    targets = st.one_of(st.integers(0, 1 << 20), st.integers(REGISTERED - 50_000, REGISTERED))

    def placed(offset: int, size: int, target: int, apart: bool) -> Range:
        """As it is, or moved to where memory and file are aligned alike and nothing bounces."""
        move = 0 if apart else (rules.address + target - offset) % rules.memory_alignment
        return Range(offset + move, size, target)

    offsets, sizes = st.integers(0, 1 << 40), st.integers(0, 200_000)
    ranges = st.builds(placed, offsets, sizes, targets, st.booleans())
    return draw(st.lists(ranges, max_size=3)), rules


@given(cases())
def test_every_byte_once(case: tuple[list[Range], Rules]) -> None:
    ranges, rules = case
    plan = plan_reads(ranges, rules)
    parts = [plan.range(index) for index in range(len(plan.offsets))]
    parts += [each.wanted for each in plan.bounced]
    for whole in ranges:
        inside = sorted(
            part
            for part in parts
            if part.offset - part.target == whole.offset - whole.target
            and whole.offset <= part.offset < whole.offset + whole.size
        )
        if len(ranges) == 1:
            assert len(inside) == len(parts)
            assert sum(part.size for part in inside) == whole.size
            at = whole.offset
            for part in inside:
                assert part.offset == at
                at += part.size


@given(cases())
def test_each_read_may_be_sent(case: tuple[list[Range], Rules]) -> None:
    ranges, rules = case
    plan = plan_reads(ranges, rules)
    for offset, size, target in map(plan.range, range(len(plan.offsets))):
        assert offset % rules.alignment == size % rules.alignment == 0
        assert (rules.address + target) % rules.memory_alignment == 0
        assert 0 < size <= rules.most
        assert target // REGISTERED == (target + size - 1) // REGISTERED
    for offset, size, skip, wanted in plan.bounced:
        assert offset % rules.alignment == size % rules.alignment == 0
        assert 0 < size <= SLOT
        assert offset + skip == wanted.offset
        assert 0 < skip + wanted.size <= size


@given(cases())
def test_only_the_ends_bounce(case: tuple[list[Range], Rules]) -> None:
    """Where memory and offset are aligned alike, and no registered buffer ends."""
    ranges, rules = case
    for whole in ranges:
        begins = whole.target + -whole.offset % rules.alignment
        crosses = whole.target < REGISTERED <= whole.target + whole.size
        if crosses or (rules.address + begins) % rules.memory_alignment:
            continue
        plan = plan_reads([whole], rules)
        copied = sum(each.wanted.size for each in plan.bounced)
        assert copied <= 2 * (rules.alignment - 1)


def test_with_room_behind_it_the_end_is_read_whole() -> None:
    rules = Rules(alignment=4096, memory_alignment=512, most=1 << 20, address=1 << 20)
    plan = plan_reads([Range(8192, 5000, 0)], rules, overrun=True)
    assert not plan.bounced
    assert plan.range(0) == Range(8192, 8192, 0)
