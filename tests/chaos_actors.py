"""Chaos, who takes part: threads and event loops that use, close and interrupt what others use."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from chaos_checks import REGION, Attempt, Part, Place, WrongError, says_closed
from chaos_rings import Case
from chaos_world import Actor, World

import gdsdirect
from gdsdirect import AsyncUringStream, Chunk, ChunkStream, GpuMappedBuffer

# ---- Who reads


class Reader(Actor):
    """Reads into its regions, sometimes with a timeout, and sometimes into memory of its own."""

    def __init__(self, world: World, name: str, seed: int) -> None:
        super().__init__(world, name, seed)
        self._reader = next(world.readers)

    def turn(self) -> None:
        if self.chance.random() < 0.1:
            self._into_own()
            return
        timeout = self.chance.choice((None, None, None, 0.0, 0.0001, 0.001))
        self.pulse.beat("reading" if timeout is None else "reading with a timeout")
        attempt = self.attempt(self._reader)
        try:
            attempt.make(timeout)
        except TimeoutError:
            if timeout is None:
                raise

    def _into_own(self) -> None:
        self.pulse.beat("reading into memory of its own")
        file = self.file()
        offset, size = self.range(file.path, REGION)
        memory = bytearray(size)
        if self.chance.random() < 0.5:
            file.read_into(memory, offset=offset, size=size)
        else:
            with GpuMappedBuffer.from_host_visible(size) as buffer:
                file.read_into(buffer, offset=offset, size=size)
                with buffer.view() as view:
                    memory[:] = view
        self.world.library.compare(bytes(memory), file.path, offset, "a read")


class Streamer(Actor):
    """Reads streams, to their end or not."""

    def turn(self) -> None:
        self.pulse.beat("making a stream")
        shown, course = self.stream()
        left = self.chance.choice((3, 1_000_000, 1_000_000))
        with shown as stream:
            for chunk in stream:
                self.pulse.beat("reading a stream")
                course.take(chunk)
                if self.chance.random() < 0.5:
                    chunk.release()
                left -= 1
                if left == 0 or self.world.over:
                    break
            else:
                course.end()
            self.pulse.beat("closing its stream")


class Submitter(Actor):
    """Submits to rings, and waits for whatever has come there."""

    def turn(self) -> None:
        case = self.case()
        submits = self.chance.random() < 0.5
        with case.used(self) as may:
            if may and submits:
                self.pulse.beat("submitting")
                may = case.submit(self.chance, self.file())
            elif may:
                self.pulse.beat("waiting for a ring")
                case.wait(self.chance)
        if not may:
            self.pause(0.001)


# ---- Event loops


class Task(Actor):
    """A task of a loop: what the others do, and the calls for asyncio."""

    def __init__(self, world: World, name: str, seed: int) -> None:
        super().__init__(world, name, seed)
        self._reader = next(world.readers)

    async def live(self, is_over: Callable[[], bool]) -> None:
        self.pulse.ended = False
        try:
            while not is_over():
                self.world.turns["Task"] += 1
                self.using = []
                try:
                    await self.turn_async()
                except Exception as error:
                    self.judge(error)
                await asyncio.sleep(0)
        finally:
            self.pulse.ended = True

    async def turn_async(self) -> None:
        drawn = self.chance.random()
        if drawn < 0.55:
            await self._read()
        elif drawn < 0.7:
            await self._give_up()
        elif drawn < 0.85:
            await self._stream()
        else:
            await self._ring()

    async def _read(self) -> None:
        """By the loop, sometimes given up; or by a thread, or in the loop's own, meanwhile."""
        attempt = self.attempt(self._reader)
        drawn = self.chance.random()
        if drawn < 0.15:
            self.pulse.beat("reading in a thread of the loop's")
            await asyncio.to_thread(attempt.make)
        elif drawn < 0.3:
            self.pulse.beat("reading in the loop's own thread")
            attempt.make()
        elif drawn < 0.6:
            self.pulse.beat("awaiting a read with a timeout")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.chance.choice((0.0, 0.0001, 0.001))):
                    await attempt.make_async()
        else:
            self.pulse.beat("awaiting a read")
            await attempt.make_async()

    async def _give_up(self) -> None:
        """A slow read is given up, and a quick one, by another ring, comes to the same place."""
        library, world = self.world.library, self.world
        region = self.chance.choice(world.places).regions[self._reader]
        self.using.append(region.buffer)
        self.pulse.beat("giving up a read")
        path = library.paths[-1]
        with gdsdirect.open(path) as slow, gdsdirect.open(path, direct=False) as quick:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    whole = [Part(REGION, REGION, region.start)]
                    await Attempt(library, slow, region, whole).make_async()
            attempt = Attempt(library, quick, region, [Part(0, 100, region.start)])
            self.pulse.beat("reading where another read was given up")
            if self.chance.random() < 0.5:
                attempt.make()
            else:
                await asyncio.to_thread(attempt.make)
        await asyncio.sleep(0.003)
        region.settle(library)

    async def _stream(self) -> None:
        self.pulse.beat("making a stream")
        shown, course = self.stream()
        left = self.chance.choice((3, 1_000_000))
        async with shown as stream:
            async for chunk in stream:
                self.pulse.beat("awaiting chunks")
                course.take(chunk)
                chunk.release()
                left -= 1
                if left == 0 or self.world.over:
                    break
            else:
                course.end()
            self.pulse.beat("awaiting a stream's close")

    async def _ring(self) -> None:
        if not self.world.cases:
            return
        case = self.case()
        with case.used(self) as may:
            if may:
                case.submit(self.chance, self.file())
                self.pulse.beat("awaiting a ring")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.chance.choice((0.0001, 0.01))):
                        case.take(await case.stream.wait_async(self.chance.choice((1, 4))))


class Loop(Actor):
    """A thread with one event loop after the other, each with the same tasks."""

    def __init__(self, world: World, name: str, seed: int) -> None:
        super().__init__(world, name, seed)
        self._tasks = [Task(world, f"{number} of {name}", seed) for number in range(3)]
        self._running: list[asyncio.Task[None]] = []
        for task in self._tasks:
            task.pulse.ended = True  # it has not begun

    def turn(self) -> None:
        asyncio.run(self._spell())

    async def _spell(self) -> None:
        """Some time, after which the tasks end by themselves, or are cancelled."""
        asyncio.get_running_loop().set_exception_handler(self._wrong)
        end = time.monotonic() + self.chance.random() * 0.3
        cancelled = self.chance.random() < 0.5

        def is_over() -> bool:
            return self.world.over or (time.monotonic() > end and not cancelled)

        running = [asyncio.create_task(task.live(is_over)) for task in self._tasks]
        self._running = running  # a loop has weak references alone, and cancels them after this
        if cancelled:
            self.pulse.beat("cancelling tasks")
            await asyncio.sleep(end - time.monotonic())
        else:
            self.pulse.ended = True  # for the time being it is the tasks that must get on
            await asyncio.wait(running)
            self.pulse.ended = False
            self.pulse.beat("closing a loop")

    def _wrong(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception") or WrongError(context["message"])
        self.world.fault(error, f"{self.name}: {context['message']}")


# ---- Who closes


class FileKeeper(Actor):
    """Closes files under their readers, and opens others by the same numbers for a while."""

    def turn(self) -> None:
        self.pulse.beat("closing a file")
        number = self.chance.randrange(len(self.world.files))
        self.world.files[number].close()
        others = [os.open(path, os.O_RDONLY) for path in self.world.library.long[:3]]
        self.pause(0.001)
        for other in others:
            os.close(other)
        self.pulse.beat("opening a file")
        self.world.files[number] = self.world.open(number, direct=self.chance.random() < 0.7)
        self.pause(0.002)


class PlaceKeeper(Actor):
    """Closes buffers under their readers, as soon as that isn't refused."""

    def turn(self) -> None:
        world = self.world
        number = self.chance.randrange(len(world.places))
        self.pulse.beat("making a buffer")
        world.retired.append(world.places[number])
        world.places[number] = Place(len(world.places[number].regions))
        for _ in range(len(world.retired)):
            self.pulse.beat("closing a buffer")
            place = world.retired.popleft()
            try:
                place.check()
                place.buffer.close()
            except BufferError:
                world.retired.append(place)
        self.pause(0.005)


class StreamCloser(Actor):
    """Closes streams under those who read them."""

    def turn(self) -> None:
        self.pause(0.01)
        with contextlib.suppress(IndexError):
            shown = self.world.streams.popleft()
            self.pulse.beat("closing a stream")
            shown.close()


class CaseKeeper(Actor):
    """Has a ring, feeds its pipe, closes it under its users, or waits for all, and makes a new."""

    def __init__(self, world: World, name: str, seed: int) -> None:
        super().__init__(world, name, seed)
        self._place = len(world.cases)
        world.cases.append(self.new_case())

    def turn(self) -> None:
        case = self.world.cases[self._place]
        self.using.append(case)
        try:
            self._feed(case)
            if self.chance.random() < 0.3:
                case.drain(self.pulse.beat)
        finally:
            case.close(self.chance.choice((0.0, 0.001)), self.pulse.beat)
            self.pulse.beat("making a ring")
            self.world.cases[self._place] = self.new_case()

    def _feed(self, case: Case) -> None:
        until = time.monotonic() + self.chance.choice((0.001, 0.005, 0.03))
        while time.monotonic() < until:
            self.pulse.beat("feeding a pipe")
            case.feed(self.chance.randrange(8))
            if self.chance.random() < 0.2 and case.stream.fileno() < 0:
                raise WrongError("fileno() is negative")
            self.pause(0.001)

    def finish(self) -> None:
        self.world.cases[self._place].close(0.0, self.pulse.beat)


class _Finalized:
    """Garbage, a cycle, that does something when it is collected."""

    def __init__(self, kept: object, act: Callable[[], object]) -> None:
        self.itself = self
        self.kept = kept
        self.act = act

    def __del__(self) -> None:
        with contextlib.suppress(BufferError, TimeoutError):
            self.act()


class Collector(Actor):
    """Drops what is not closed, also in cycles, and closes what others use in finalizers."""

    def turn(self) -> None:
        drawn = self.chance.random()
        if drawn < 0.3:
            self.pulse.beat("collecting")
            gc.collect(self.chance.randrange(3))
        elif drawn < 0.6:
            self.pulse.beat("dropping a ring")
            self._drop()
        elif drawn < 0.7 and self.world.orphans < self.world.most_orphans:
            self.pulse.beat("dropping what is in flight")
            self.chance.choice((self._orphan_ring, self._orphan_stream))()
        elif self.world.cases and drawn < 0.85:
            case = self.case()
            _Finalized(None, lambda: self._close_ring(case))
        elif (shown := self.shown()) is not None:
            _Finalized(None, shown.close)
        self.pause(0.01)

    @staticmethod
    def _close_ring(case: Case) -> None:
        case.closing = True
        case.stream.close(0)

    def _drop(self) -> None:
        buffer = GpuMappedBuffer.from_host_visible(8192)
        single = self.chance.random() < 0.3
        stream = AsyncUringStream(buffer, 4, single_thread=single)
        file = self.file()
        stream.submit_read(file, 0, 100, 0)
        stream.wait(1)
        if self.chance.random() < 0.5:
            file.read_into(buffer, size=100, target_offset=4096)
            _Finalized((buffer, stream), bool)

    def _orphan_ring(self) -> None:
        self.world.orphans += 1
        ends = os.pipe()
        stream = AsyncUringStream(GpuMappedBuffer.from_host_visible(4096), 4)
        stream.submit_read(ends[0], 0, 8, 0)
        del stream
        for end in ends:
            os.close(end)

    def _orphan_stream(self) -> None:
        self.world.orphans += 1
        shown, course = self.stream()
        self.world.streams.remove(shown)
        course.take(next(shown.stream))


# ---- Forks


class Forker(Actor):
    """Forks while others are in the midst of anything; the child is refused, or reads right."""

    def turn(self) -> None:
        self.pause(0.1)
        act = self._chosen()
        self.pulse.beat("forking")
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            self._in_child(act, tell)
        os.close(tell)
        with os.fdopen(told) as text:
            said = text.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            how = "hangs" if status == -signal.SIGALRM else f"ends with status {status}"
            raise WrongError(f"a fork's child {how} in {act.__name__}", said)

    def _chosen(self) -> Callable[[], object]:
        acts = [self._read_own, self._read_shared, self._iterate]
        if self.world.cases:
            acts += [self._submit, self._wait, self._close]
        return self.chance.choice(acts)

    def _in_child(self, act: Callable[[], object], tell: int) -> NoReturn:
        """Says by its status whether all is right, and by its stderr what is not."""
        try:
            os.dup2(tell, 2)
            sys.unraisablehook = lambda _: None
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            faulthandler.register(signal.SIGALRM, chain=True)
            signal.alarm(max(1, int(self.world.patience / 2)))
            act()
            os._exit(0)
        except BaseException as error:
            refused = isinstance(error, RuntimeError) and act != self._read_own
            if refused or (isinstance(error, Exception) and says_closed(error, self.using)):
                os._exit(0)
            os.write(2, repr(error).encode())
        finally:
            os._exit(2)

    def _read_own(self) -> None:
        """With a file and a buffer of the child's."""
        path = self.world.library.long[0]
        with gdsdirect.open(path) as file, GpuMappedBuffer.from_host_visible(4096) as buffer:
            file.read_into(buffer, size=4000)
            with buffer.view() as view:
                self.world.library.compare(bytes(view[:4000]), path, 0, "a read of a fork's child")

    def _read_shared(self) -> None:
        """Into a buffer, and of a file, of the parent's."""
        region = self.chance.choice(self.world.places).regions[0]
        file = self.file()
        self.using.append(region.buffer)
        file.read_into(region.buffer, size=100, target_offset=region.start)
        got = region.now()[:100]
        self.world.library.compare(got, file.path, 0, "a read of a fork's child")

    def _submit(self) -> None:
        self.case().stream.submit_read(self.file(), 0, 100, 0)
        raise WrongError("a fork's child submits to its parent's ring")

    def _wait(self) -> None:
        self.case().stream.wait(1)
        raise WrongError("a fork's child waits for its parent's ring")

    def _close(self) -> None:
        stream = self.case().stream
        if not stream.closed:
            stream.close()
            raise WrongError("a fork's child closes its parent's ring")

    def _iterate(self) -> None:
        """A stream that the parent reads: it is refused, or what it has already is right."""
        shown = self.shown()
        for chunk in shown.stream if shown is not None else ():
            self.world.library.compare(
                bytes(chunk.view), chunk.file, chunk.offset, "a child's chunk"
            )
            del chunk


# ---- Interrupts


class Boom(BaseException):
    """What the handler of a signal raises."""


class Interrupted(Actor):
    """The main thread, into whose calls a signal's handler raises, or closes what they use."""

    def __init__(self, world: World, name: str, seed: int) -> None:
        super().__init__(world, name, seed)
        self._reader = next(world.readers)
        self._armed = False
        self._act: Callable[[], object] | None = None
        signal.signal(signal.SIGALRM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            return
        if self._act is not None:
            with contextlib.suppress(TimeoutError, BufferError):
                self._act()
        else:
            self._armed = False
            raise Boom

    def _arm(self) -> None:
        """The signal comes within a moment."""
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + self.chance.random() ** 2 * 0.003)

    def _disarm(self) -> None:
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def interrupt(self, call: Callable[[], object]) -> bool:
        """Make a call; whether it came to its end."""
        try:
            try:
                self._arm()
                call()
                return True
            except BaseException:
                self._armed = False  # else another may take its place
                raise
            finally:
                self._disarm()
        except Boom:  # also one that came in _disarm
            return False

    def turn(self) -> None:
        self._act = None
        drawn = self.chance.random()
        if drawn < 0.5 or not self.world.cases:
            self._read()
        elif drawn < 0.7:
            self._stream()
        else:
            self._ring()

    def _read(self) -> None:
        """And then once more, undisturbed, which must not hang."""
        self.pulse.beat("reading, interrupted")
        number = self.chance.randrange(len(self.world.files))
        if self.chance.random() < 0.2:
            self._act = self.chance.choice((gc.collect, self.world.files[number].close))
        self.interrupt(self.attempt(self._reader).make)
        if self.world.files[number].closed:
            self.world.files[number] = self.world.open(number, direct=True)
        self.pulse.beat("reading, after an interrupt")
        self.attempt(self._reader).make()

    def _stream(self) -> None:
        """What an interrupted `for` has not brought comes when it is asked again."""
        self.pulse.beat("making a stream")
        shown, course = self.stream()
        if self.chance.random() < 0.2:
            self._act = shown.close
        with shown as stream:
            while not self.world.over:
                chunk, there = self._next(stream)
                if chunk is not None:
                    course.take(chunk)
                elif not there:
                    course.end()
                    break

    def _next(self, stream: ChunkStream) -> tuple[Chunk | None, bool]:
        """The next chunk, or None after an interrupt and at the end; and whether there are more.

        What a call of next() returns is lost where the handler raises before it is stored. Nothing
        can come between in the head of a `for`.
        """
        self.pulse.beat("reading a stream, interrupted")
        chunk: Chunk | None = None
        there = False
        try:
            try:
                self._arm()
                for chunk in stream:  # noqa: B007
                    self._armed = False
                    there = True
                    break
            except BaseException:
                self._armed = False
                raise
            finally:
                self._disarm()
        except Boom:
            there = True
        return chunk, there

    def _ring(self) -> None:
        case = self.case()
        with case.used(self) as may:
            if not may:
                return
            self.pulse.beat("using a ring, interrupted")
            if self.chance.random() < 0.2:
                self._act = lambda: Collector._close_ring(case)
            case.lossy = True
            self.interrupt(lambda: case.submit(self.chance, self.file()))
            self.interrupt(lambda: case.wait(self.chance))
