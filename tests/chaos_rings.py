"""Chaos, rings: commands whose completions are counted, and whose bytes are compared."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import struct
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from chaos_checks import Library, WrongError

from gdsdirect import (
    COMPLETION_FORMAT,
    AsyncUringStream,
    Completion,
    File,
    Geometry,
    GpuMappedBuffer,
    Namespace,
    encode_nvme_read_sqe,
)

SLOT = 4096  # bytes that one command reads
_SLOTS = 128
_GEOMETRY = Geometry(nsid=1, lba_size=512, capacity=1 << 20, max_transfer=64 << 10)
_RECORD = struct.Struct("=" + COMPLETION_FORMAT)
_TOKEN = struct.Struct("=Q")


class _Wanted(NamedTuple):
    """A command that was submitted: its slot, and of a file what it reads."""

    slot: int
    size: int
    path: str | None = None
    offset: int = 0
    piped: bool = False


class Case:
    """A ring, whose commands read files, a pipe that is fed now and then, and /dev/null.

    Each command has a slot of the buffer to itself until its completion was handed out. Once
    `is_over`, threads end: the kernel then cancels what they read of the pipe.
    """

    def __init__(
        self, library: Library, chance: random.Random, is_over: Callable[[], bool]
    ) -> None:
        self._library = library
        self._is_over = is_over
        self.buffer = GpuMappedBuffer.from_host_visible(_SLOTS * SLOT)
        self.stream = AsyncUringStream(
            self.buffer,
            chance.choice((1, 4, 64, 128)),
            register=chance.choice((None, False)),
            sqpoll=chance.random() < 0.05,
        )
        self.namespace = Namespace("/dev/null", geometry=_GEOMETRY)
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        self._tokens = itertools.count(1)
        self._fed: set[bytes] = set()
        self._numbers = itertools.count(1)
        self._slots = deque(range(0, _SLOTS * SLOT, SLOT))
        self._wanted: dict[int, _Wanted] = {}
        self.users: set[object] = set()  # those who are about to use it, or do
        self.stopped = False  # nobody new comes
        self.closing = False
        self.lossy = False  # not all that is wanted was sent, or is still to come

    @property
    def closed(self) -> bool:
        return self.closing

    @contextlib.contextmanager
    def used(self, user: object) -> Iterator[bool]:
        """By a user, of whom the ring's owner knows; False: it takes no more."""
        self.users.add(user)
        try:
            if self.stopped:
                self.users.discard(user)
            yield not self.stopped
        finally:
            self.users.discard(user)

    # ---- In

    def _take_slots(self, most: int) -> list[int]:
        slots: list[int] = []
        with contextlib.suppress(IndexError):
            while len(slots) < most:
                slots.append(self._slots.popleft())
        return slots

    def submit(self, chance: random.Random, file: File) -> bool:
        """Some commands of one kind; False if there are no slots."""
        slots = self._take_slots(chance.choice((1, 1, 4, 32)))
        if not slots:
            return False
        first = next(self._numbers) << 32
        kind = chance.choice((self._files, self._files, self._pipes, self._nulls))
        wanted = kind(chance, file, slots)
        self._wanted.update((first + index, each) for index, each in enumerate(wanted))
        try:
            self._send(chance, file, wanted, first)
        except Exception as error:
            if hasattr(error, "__notes__"):  # it says how many were sent
                self.lossy = True
            else:
                for index in range(len(wanted)):
                    del self._wanted[first + index]
                self._slots.extend(slots)
            raise
        return True

    def _files(self, chance: random.Random, file: File, slots: list[int]) -> list[_Wanted]:
        blocks = len(self._library.bytes[file.path]) // SLOT
        if blocks == 0:
            return self._nulls(chance, file, slots)
        places = [chance.randrange(blocks) * SLOT for _ in slots]
        return [_Wanted(slot, SLOT, file.path, at) for slot, at in zip(slots, places, strict=True)]

    def _pipes(self, chance: random.Random, file: File, slots: list[int]) -> list[_Wanted]:
        return [_Wanted(slot, _TOKEN.size, piped=True) for slot in slots]

    def _nulls(self, chance: random.Random, file: File, slots: list[int]) -> list[_Wanted]:
        return [_Wanted(slot, SLOT) for slot in slots]

    def _send(self, chance: random.Random, file: File, wanted: list[_Wanted], first: int) -> None:
        stream, one = self.stream, wanted[0]
        if one.path is None and not one.piped:
            start = self.buffer.address
            commands = [encode_nvme_read_sqe(1, 0, 8, start + each.slot) for each in wanted]
            if chance.random() < 0.5:
                stream.submit_nvme_passthrough(self.namespace, b"".join(commands), user_data=first)
            else:
                batches = ((self.namespace, command) for command in commands)
                stream.submit_nvme_passthroughs(batches, user_data=first)
            return
        source = self.pipe[0] if one.piped else file
        if len(wanted) == 1:
            read = stream.submit_read_fixed if stream.registered else stream.submit_read
            read(source, one.offset, one.size, one.slot, user_data=first)
            return
        reads = stream.submit_reads_fixed if stream.registered else stream.submit_reads
        offsets = array("Q", [each.offset for each in wanted])
        slots = array("Q", [each.slot for each in wanted])
        reads(source, offsets, one.size, slots, user_data=first)

    def feed(self, tokens: int) -> None:
        """Write so many tokens into the pipe, each of which one read takes; fewer if it is full."""
        for number in itertools.islice(self._tokens, tokens):
            token = _TOKEN.pack(number)
            self._fed.add(token)
            try:
                os.write(self.pipe[1], token)
            except BlockingIOError:
                self._fed.discard(token)
                break

    # ---- Out

    def take(self, completions: list[Completion]) -> None:
        """WrongError, or its own error, if any of these, which were handed out, is not right."""
        wrong: Exception | None = None
        for each in completions:
            try:
                each.result()
                self._done(each.user_data)
            except Exception as error:
                self._wanted.pop(each.user_data, None)
                if getattr(error, "errno", None) != errno.ECANCELED or not self._cancels():
                    wrong = wrong or error
        if wrong is not None:
            raise wrong

    def take_records(self, records: bytes) -> None:
        """The same of what `wait_into` wrote."""
        wrong: WrongError | None = None
        for user_data, result, nbytes in _RECORD.iter_unpack(records):
            wanted = self._wanted.get(user_data)
            try:
                if wanted is not None and nbytes != wanted.size:
                    raise WrongError("a command brought another number of bytes", result, nbytes)
                self._done(user_data)
            except WrongError as error:
                self._wanted.pop(user_data, None)
                if result != -errno.ECANCELED or not self._cancels():
                    wrong = wrong or error
        if wrong is not None:
            raise wrong

    def _cancels(self) -> bool:
        return self.closing or self._is_over()

    def _done(self, user_data: int) -> None:
        wanted = self._wanted.pop(user_data, None)
        if wanted is None:
            raise WrongError("a completion came twice, or from nowhere", user_data)
        with self.buffer.view() as view:
            got = bytes(view[wanted.slot : wanted.slot + wanted.size])
            if wanted.path is not None:
                self._library.compare(got, wanted.path, wanted.offset, "a command")
            elif wanted.piped:
                try:
                    self._fed.remove(got)
                except KeyError:
                    raise WrongError("a read of a pipe brought what was not written", got) from None
        self._slots.append(wanted.slot)

    def wait(self, chance: random.Random) -> None:
        """Wait for some by one of the calls, and see what came."""
        timeout = chance.choice((None, None, 0.0, 0.0001, 0.01))
        how = chance.randrange(3)
        if how == 0:
            self.take(self.stream.wait(chance.choice((1, 1, 8)), timeout))
        elif how == 1:
            out = bytearray(_RECORD.size * chance.choice((1, 16)))
            came = self.stream.wait_into(out, 1, timeout)
            self.take_records(bytes(out[: came * _RECORD.size]))
        else:
            self.take(self.stream.poll())

    # ---- The end

    def drain(self, beat: Callable[[str], None]) -> None:
        """Wait for all commands; WrongError if the completion of any is lost."""
        self.stopped = True
        while self.stream.inflight or self.users:
            beat("draining a ring")
            self.feed(8)
            self.take(self.stream.wait(1, 0.01))
        self.take(self.stream.poll())
        if self._wanted and not (self.lossy or self.closing):
            raise WrongError("completions were lost", self._wanted)

    def close(self, timeout: float | None, beat: Callable[[str], None]) -> None:
        """Close the ring under those who use it, and then all else."""
        self.closing = self.stopped = True
        closed = False
        while not closed:
            beat("closing a ring")
            with contextlib.suppress(TimeoutError):
                self.stream.close(timeout)
                closed = True
        self.namespace.close()
        for end in self.pipe:
            os.close(end)
        closed = False
        while not closed:
            beat("closing a ring's buffer")
            in_use = bool(self.users)
            try:
                self.buffer.close()
                closed = True
            except BufferError:
                if not in_use:
                    raise
                time.sleep(0.001)
