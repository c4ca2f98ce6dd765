"""SharedRing: the ring of a buffer, by which all reads of files into it go.

Any number of threads and event loops share it. A read is some requests, each made and checked by
`reads`, `files` or `bounced`, and carried out together; csrc/request.h says what one goes through.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from gdsdirect.memory import GpuMappedBuffer, MemoryKind
from gdsdirect.plan import SLOT
from gdsdirect.stream import AsyncUringStream

if TYPE_CHECKING:
    import asyncio

    from gdsdirect._uring_cmd import Request, Source
    from gdsdirect.origin import ShortWay

_BOUNCE_SLOTS = 32  # of SLOT bytes; csrc/ring.h has both

# Registering touches all pages of the memory first. A read touches its own while others are on
# their way, so that new memory that isn't registered takes a tenth less time.
_ONCE = "memory that is read into once is not registered"

Arrays = tuple["array[int]", "array[int]", "array[int]"]
"""Of n reads: positions in the source, sizes ("I"), and targets in the buffer, in bytes."""

Requests = tuple["Request", ...]
"""Requests of one ring, which are carried out together."""


class SharedRing(AsyncUringStream):
    """A ring over the memory of a buffer, which may be dropped before the ring is.

    `unregistered` says why the kernel did not register the memory, or is None.
    """

    unregistered: str | None

    def __new__(cls, buffer: GpuMappedBuffer, *, once: bool = False) -> Self:
        """`once`: the memory is read into once, and never again."""
        twin = buffer._twin()  # the ring must not keep the buffer, which finds the ring by itself
        self = super().__new__(cls, twin, register=False if once else None, _lender=buffer)
        self.unregistered = None
        if once:
            self.unregistered = _ONCE
        elif not self.registered and twin.kind is not MemoryKind.BAR1_PEER:
            self.unregistered = self._registration_error(self._register_errno).strerror
        return self

    @property
    def kind(self) -> MemoryKind:
        """What the memory is."""
        return self.buffer.kind

    # ---- Requests

    def reads(self, source: Source, arrays: Arrays, *, fixed: bool = False) -> Request:
        """Reads of a file or a namespace, `fixed` into registered memory."""
        return self._request(source, *arrays, fixed)

    def files(self, sources: tuple[Source, ...], arrays: Arrays, *, fixed: bool) -> Request:
        """Reads of many files, one of each."""
        return self._request(sources, *arrays, fixed)

    def bounced(
        self, source: Source, arrays: Arrays, parts: Sequence[tuple[int, int]], *, fixed: bool
    ) -> Request:
        """Aligned reads into bounce slots; of each so many bytes from one on go to its target.

        `parts` has for each read the bytes to skip and the bytes to take.
        """
        if not self._has_bounce:
            self._lend_bounce(GpuMappedBuffer.from_host_visible(_BOUNCE_SLOTS * SLOT))
        skips = array("I", [skip for skip, _ in parts])
        wanted = array("I", [count for _, count in parts])
        return self._request(source, *arrays, fixed, skips, wanted)

    async def read_shortly(self, way: ShortWay, offset: int, size: int, target: int) -> int | None:
        """One read, as `_read` does it, while other tasks run: the bytes, or None."""
        begun = self._begin(way.source, offset, size, target, *way[1:4])
        if begun is None or isinstance(begun, int):
            return begun
        try:
            await self.finish((begun,))
        except BaseException:
            begun.give_up()
            raise
        return None if begun.take() else int(size)

    async def carry_out(self, requests: Requests) -> None:
        """Start what isn't started, and wait until all have finished, while other tasks run.

        After an exception all are given up.
        """
        try:
            await self.finish(requests)
        except BaseException:
            for request in requests:
                request.give_up()
            raise

    async def finish(self, requests: Requests) -> None:
        """The same, but after an exception the requests stay as they are."""
        import asyncio

        loop = asyncio.get_running_loop()
        while (busy := self._start(requests)) is not None:
            await busy._anything_new()
        for request in requests:
            while not request.finished:  # one that is given up meanwhile wakes those who wait
                await self._finish(request, loop)

    async def _finish(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        watch = self._watch_of(loop)
        future = loop.create_future()
        try:
            if request.attach(watch.descriptors, future):
                await future
        finally:
            self._end_if_idle(watch)


class _Process:
    """This process, whose number each read needs: asked for once, and once more after a fork."""

    def __init__(self) -> None:
        self.ask()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.ask)

    def ask(self) -> None:
        self.number = os.getpid()


_process = _Process()


def ring_of(buffer: GpuMappedBuffer) -> SharedRing:
    """The buffer's ring, made when it is first asked for.

    A forked child has one of its own: the parent's is nothing there.
    """
    key = _process.number
    ring: SharedRing | None = buffer._rings.get(key)
    if ring is None:
        ring = buffer._rings.setdefault(key, SharedRing(buffer))
    elif ring.closed:  # by a `close` of the buffer that went no further
        ring = buffer._rings[key] = SharedRing(buffer)
    return ring


def read_once(buffer: GpuMappedBuffer) -> None:
    """Make the ring of new memory so that the first read into it is the fastest."""
    buffer._rings[_process.number] = SharedRing(buffer, once=True)
