"""The stream's whole surface in random order, against a plain model of it.

The model is sets of user_data: what will complete by itself (commands on /dev/null, reads of a
file) and what waits for a byte in a pipe. Every call must do what follows from them: hand out each
completion once, with its bytes, and lose nothing by an error, a timeout or a refused batch.
"""

import os
import select
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gdsdirect import (
    COMPLETION_FORMAT,
    AsyncUringStream,
    Completion,
    DataPath,
    Geometry,
    GpuMappedBuffer,
    Namespace,
    ShortReadError,
    encode_nvme_read_sqe,
)

GEOMETRY = Geometry(nsid=3, lba_size=512, capacity=1000, max_transfer=8 << 10)
NBYTES = 256 << 10
LONGEST = 64  # bytes of one read of the file; each read has so many of the buffer for its own
CONTENTS = bytes(1 + i % 255 for i in range(1000))

BAD = {
    "opcode": (0, b"\x01"),
    "reserved": (63, b"\x01"),
    "nsid": (4, b"\x04"),
    "lba": (40, (1000).to_bytes(8, "little")),
    "blocks": (48, (16).to_bytes(4, "little")),
    "address": (32, bytes(8)),
}
TIMEOUTS = st.sampled_from([0, 0.0005])
is_open = precondition(lambda self: not self.stream.closed)
is_closed = precondition(lambda self: self.stream.closed)
has_room = precondition(lambda self: not self.stream.closed and self.blocked < self.stream.depth)


@dataclass(frozen=True)
class Expected:
    """What a command that completes by itself will have brought."""

    way: DataPath
    nbytes: int
    asked: int
    target: int = 0
    contents: bytes = b""


class StreamMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.file.write(CONTENTS)
        self.file.flush()
        self.namespace = Namespace("/dev/null", geometry=GEOMETRY)

    @initialize(depth=st.integers(1, 6), single_thread=st.booleans())
    def begin(self, depth: int, single_thread: bool) -> None:
        self.options = depth, single_thread
        self.make()

    def make(self) -> None:
        depth, single_thread = self.options
        self.buffer = GpuMappedBuffer.from_host_visible(NBYTES)
        self.stream = AsyncUringStream(self.buffer, depth, single_thread=single_thread)
        self.pipe = os.pipe()
        self.certain: dict[int, Expected] = {}
        self.waiting: dict[int, int] = {}  # reads of the pipe, with their targets
        self.arriving: list[int] = []  # bytes that such reads have taken, and are not handed out
        self.unread: list[int] = []  # bytes in the pipe
        self.written = 0
        self.next_target = 0
        self.submitted = self.taken = self.failed = self.nbytes = 0
        self.readable()  # from now on it is watched

    # ---- The model

    @property
    def blocked(self) -> int:
        """Reads that nothing but a write to the pipe completes."""
        return len(self.waiting) - len(self.arriving)

    @property
    def due(self) -> int:
        """Completions that are there, or come by themselves."""
        return len(self.certain) + len(self.arriving)

    def settle(self) -> None:
        while self.unread and self.blocked:
            self.arriving.append(self.unread.pop(0))

    def new_target(self) -> int:
        self.next_target += LONGEST
        return self.next_target - LONGEST

    def check_fresh(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            assert token not in self.certain
            assert token not in self.waiting

    def hand_out(self, user_data: int, nbytes: int, res: int | None = None) -> None:
        """One completion came. It must be one that could, with its bytes in the buffer."""
        self.taken += 1
        with self.buffer.view() as view:
            if user_data in self.waiting:
                target = self.waiting.pop(user_data)
                assert (nbytes, res) in ((1, 1), (1, None))
                self.arriving.remove(view[target])
                self.nbytes += 1
                return
            expected = self.certain.pop(user_data)
            start, end = expected.target, expected.target + len(expected.contents)
            assert view[start:end] == expected.contents
        assert nbytes == expected.nbytes
        if res is not None:
            assert res == (0 if expected.way is DataPath.NVME_PASSTHROUGH else nbytes)
        self.nbytes += nbytes
        self.failed += nbytes != expected.asked

    def check_completion(self, completion: Completion) -> None:
        expected = self.certain.get(completion.user_data)
        short = expected is not None and expected.nbytes != expected.asked
        assert completion.path is (expected.way if expected else DataPath.BUFFERED)
        assert completion.ok is not short
        if short:
            with pytest.raises(ShortReadError):
                completion.result()
        else:
            assert completion.result() == completion.nbytes
        self.hand_out(completion.user_data, completion.nbytes)

    # ---- Commands in

    def commands(self, blocks: list[int]) -> bytes:
        address = self.buffer.address
        return b"".join(encode_nvme_read_sqe(3, i, n, address) for i, n in enumerate(blocks))

    @has_room
    @rule(count=st.integers(0, 40), step=st.integers(0, 15), numbered=st.booleans())
    def submit_good(self, count: int, step: int, numbered: bool) -> None:
        blocks = [1 + i * step % 16 for i in range(count)]
        user_data = (1 << 40) + self.submitted if numbered else None
        tokens = self.stream.submit_nvme_passthrough(
            self.namespace, self.commands(blocks), user_data=user_data
        )
        assert len(tokens) == len(blocks)
        assert user_data in (None, tokens.start)
        self.check_fresh(tokens)
        for token, many in zip(tokens, blocks, strict=True):
            nbytes = 512 * many
            self.certain[token] = Expected(DataPath.NVME_PASSTHROUGH, nbytes, nbytes)
        self.submitted += len(tokens)

    @is_open
    @rule(before=st.integers(0, 40), behind=st.integers(0, 9), what=st.sampled_from(sorted(BAD)))
    def submit_bad(self, before: int, behind: int, what: str) -> None:
        """Refused whole, and at once: even with no slot free."""
        batch = bytearray(self.commands([1] * (before + 1 + behind)))
        offset, content = BAD[what]
        batch[64 * before + offset : 64 * before + offset + len(content)] = content
        with pytest.raises(ValueError, match=f"^command {before}: "):
            self.stream.submit_nvme_passthrough(self.namespace, batch)

    @is_open
    @rule(odd=st.integers(1, 63))
    def submit_odd(self, odd: int) -> None:
        with pytest.raises(ValueError, match="not a multiple of 64"):
            self.stream.submit_nvme_passthrough(self.namespace, self.commands([1, 1])[:-odd])

    @has_room
    @rule(fixed=st.booleans())
    def read_pipe(self, fixed: bool) -> None:
        submit = self.stream.submit_read_fixed if fixed else self.stream.submit_read
        target = self.new_target()
        token = submit(self.pipe[0], 0, 1, target)
        self.check_fresh([token])
        self.waiting[token] = target
        self.submitted += 1
        self.settle()

    @has_room
    @rule(
        fixed=st.booleans(),
        offset=st.integers(0, len(CONTENTS) + 10),
        nbytes=st.integers(1, LONGEST),
    )
    def read_file(self, fixed: bool, offset: int, nbytes: int) -> None:
        """Some end behind the file's end."""
        submit = self.stream.submit_read_fixed if fixed else self.stream.submit_read
        target = self.new_target()
        token = submit(self.file, offset, nbytes, target)
        self.check_fresh([token])
        there = CONTENTS[offset : offset + nbytes]
        untouched = bytes(LONGEST - len(there))
        self.certain[token] = Expected(
            DataPath.BUFFERED, len(there), nbytes, target, there + untouched
        )
        self.submitted += 1

    @is_open
    @rule(
        fixed=st.booleans(),
        arguments=st.sampled_from(
            [(-1, 1, 0), (0, 0, 0), (0, NBYTES + 1, 0), (0, 1, NBYTES), (0, 2, NBYTES - 1)]
        ),
    )
    def read_outside(self, fixed: bool, arguments: tuple[int, int, int]) -> None:
        submit = self.stream.submit_read_fixed if fixed else self.stream.submit_read
        with pytest.raises(ValueError, match="outside"):
            submit(self.file, *arguments)

    @precondition(lambda self: not self.stream.closed and len(self.unread) < 50)
    @rule(count=st.integers(1, 5))
    def write(self, count: int) -> None:
        data = [1 + (self.written + i) % 255 for i in range(count)]
        os.write(self.pipe[1], bytes(data))
        self.written += count
        self.unread += data
        self.settle()
        self.readable()

    # ---- Completions out

    def timeout_for(self, count: int, timeout: float) -> float | None:
        """None where the wait must come to an end by itself."""
        return None if count <= self.due or self.blocked == 0 else timeout

    @is_open
    @rule(count=st.integers(0, 30), timeout=TIMEOUTS)
    def wait(self, count: int, timeout: float) -> None:
        due, timeout_or_none = self.due, self.timeout_for(count, timeout)
        done = self.stream.wait(count, timeout_or_none)
        assert len(done) <= due
        assert len(done) >= min(count, due) or timeout_or_none is not None
        for completion in done:
            self.check_completion(completion)

    @is_open
    @rule()
    def poll(self) -> None:
        for completion in self.stream.poll():
            self.check_completion(completion)

    @is_open
    @rule(fit=st.sampled_from([1, 2, 3, 5, 8, 40]), count=st.integers(0, 9), timeout=TIMEOUTS)
    def wait_into(self, fit: int, count: int, timeout: float) -> None:
        out = bytearray(b"\xee" * (16 * fit + 5))
        if count > fit:
            with pytest.raises(ValueError, match=f"count is {count}"):
                self.stream.wait_into(out, count)
            return
        due, timeout_or_none = self.due, self.timeout_for(count, timeout)
        got = self.stream.wait_into(out, count, timeout_or_none)
        assert got <= min(fit, due)
        assert got >= min(count, due) or timeout_or_none is not None
        assert out[16 * got :] == b"\xee" * (len(out) - 16 * got)
        for user_data, res, nbytes in struct.iter_unpack(COMPLETION_FORMAT, out[: 16 * got]):
            self.hand_out(user_data, nbytes, res)

    @is_open
    @rule()
    def readable(self) -> None:
        """Readable when a completion is there or about to come, and never without any command."""
        if self.due:
            assert select.select([self.stream], [], [], 5)[0]
        elif not self.waiting:
            assert not select.select([self.stream], [], [], 0)[0]

    # ---- Closing

    @is_open
    @rule()
    def close_the_buffer(self) -> None:
        with pytest.raises(BufferError):
            self.buffer.close()

    @is_open
    @rule()
    def close_the_namespace(self) -> None:
        """What is in flight goes on; what is submitted then is refused."""
        self.namespace.close()
        with pytest.raises(ValueError, match="/dev/null is closed"):
            self.stream.submit_nvme_passthrough(self.namespace, self.commands([1, 2]))
        self.namespace = Namespace("/dev/null", geometry=GEOMETRY)

    @is_open
    @rule()
    def close(self) -> None:
        """Waits for what is in flight, or cancels what would never come."""
        self.stream.close(0 if self.blocked else None)
        assert self.stream.closed
        stats = self.stream.stats
        assert (stats.submitted, self.submitted) == (
            stats.completed + stats.failed,
            stats.submitted,
        )
        if not self.waiting:
            assert stats.nbytes == self.nbytes + sum(e.nbytes for e in self.certain.values())
        for end in self.pipe:
            os.close(end)

    @is_closed
    @rule()
    def use_after_close(self) -> None:
        self.stream.close()
        stream = self.stream
        for use in (
            lambda: stream.submit_nvme_passthrough(self.namespace, self.commands([1])),
            lambda: stream.submit_read(self.file, 0, 1, 0),
            lambda: stream.submit_read_fixed(self.file, 0, 1, 0),
            stream.wait,
            stream.poll,
            lambda: stream.wait_into(bytearray(16)),
            stream.fileno,
        ):
            with pytest.raises(ValueError, match="the stream is closed"):
                use()
        assert stream.inflight == 0

    @is_closed
    @rule()
    def make_anew(self) -> None:
        self.buffer.close()
        self.make()

    # ---- What holds after every step

    @invariant()
    def counts(self) -> None:
        if not hasattr(self, "stream") or self.stream.closed:
            return
        assert self.stream.inflight == len(self.certain) + len(self.waiting)
        stats = self.stream.stats
        assert stats.submitted == self.submitted
        assert self.taken <= stats.completed + stats.failed <= self.taken + self.due
        assert stats.failed >= self.failed
        assert stats.nbytes >= self.nbytes
        if self.due == 0:
            assert (stats.failed, stats.nbytes) == (self.failed, self.nbytes)
        for name in ("submitted", "registered", "completed", "failed", "nbytes"):
            assert getattr(stats, name) == sum(getattr(w, name) for w in stats.ways.values())

    def teardown(self) -> None:
        if hasattr(self, "stream"):
            if not self.stream.closed:
                self.close()
            self.buffer.close()
        self.namespace.close()
        self.file.close()


# Without shrinking: where a wake-up is lost each try takes seconds, and there are thousands.
StreamMachine.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
TestStream = StreamMachine.TestCase
