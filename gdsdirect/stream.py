"""AsyncUringStream: commands in, completions out."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

from gdsdirect.errors import PROFILE, completion_error, limit_text, no_descriptor, ring_type
from gdsdirect.memory import GpuMappedBuffer, MemoryKind
from gdsdirect.sysfs import Sysfs

if TYPE_CHECKING:
    import asyncio

    from gdsdirect._uring_cmd import Ring, Source, Then, Watch
else:
    Ring, Then = ring_type("Ring"), ring_type("Then")

COMPLETION_FORMAT = "QiI"
"""`struct` format of a record that `wait_into` writes: user_data, the kernel's res, bytes read."""


class DataPath(Enum):
    """The way that bytes went from the drive into the buffer."""

    NVME_PASSTHROUGH = "nvme_passthrough"
    """An NVMe command by IORING_OP_URING_CMD: the drive writes into the buffer."""

    FILE_DIRECT = "file_direct"
    """IORING_OP_READ of a file open with O_DIRECT: the drive writes into the buffer."""

    FILE_FIXED = "file_fixed"
    """IORING_OP_READ_FIXED of a file open with O_DIRECT: the same, into registered host memory."""

    CUFILE = "cufile"
    """NVIDIA's cuFile library."""

    BUFFERED = "buffered"
    """Through the page cache, from which the kernel copies."""

    __hash__ = object.__hash__  # Enum's own is Python, and every chunk is counted by its way


# In the order of enum way in csrc/inflight.h.
_WAYS = (
    DataPath.NVME_PASSTHROUGH,
    DataPath.FILE_DIRECT,
    DataPath.FILE_FIXED,
    DataPath.BUFFERED,
)


@dataclass(frozen=True)
class WayStats:
    """Reads of a stream that went one way; `submitted` are `completed`, `failed` or in flight.

    `registered` of those submitted went into a registered buffer. `nbytes` were read, those of
    reads that failed short of the end included.
    """

    submitted: int = 0
    registered: int = 0
    completed: int = 0
    failed: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class StreamStats(WayStats):
    """The sums of a stream since it was made, and each way's own in `ways`.

    `bounce_bytes` counts bytes that were copied in this process on their way into the buffer. A
    stream itself never copies.
    """

    bounce_bytes: int = 0
    ways: Mapping[DataPath, WayStats] = field(default_factory=dict)


class Completion:
    """What became of one read.

    `user_data` is what its submission returned or was given, `nbytes` the bytes in the buffer, and
    `ok` says whether they are all that was asked for.
    """

    __slots__ = (
        "_expected",
        "_position",
        "_result",
        "_source",
        "_stream",
        "_way",
        "nbytes",
        "user_data",
    )

    def __init__(
        self,
        stream: AsyncUringStream,
        record: tuple[int, int, int, int, int, int, Source],
    ) -> None:
        self._stream = stream
        self.user_data: int
        self.nbytes: int
        (
            self.user_data,
            self._result,
            self.nbytes,
            self._expected,
            self._position,
            self._way,
            self._source,
        ) = record

    @property
    def ok(self) -> bool:
        """Whether every byte asked for is in the buffer."""
        return self.nbytes == self._expected

    @property
    def path(self) -> DataPath:
        """The way that the read went."""
        return _WAYS[self._way]

    def result(self) -> int:
        """Bytes read; all that were asked for, or the read's error is raised.

        NvmeStatusError for a status of the drive's, OSError for an errno of the kernel's, and
        ShortReadError for a file that ended before.
        """
        if self.ok:
            return self.nbytes
        peer = self._stream.buffer.kind is MemoryKind.BAR1_PEER
        source, lba_size = self._source, self._source.lba_size
        if self.path is not DataPath.NVME_PASSTHROUGH:
            raise completion_error(
                self._result,
                self.nbytes,
                self._expected,
                path=source.path,
                offset=self._position,
                peer=peer,
            )
        raise completion_error(
            self._result,
            self.nbytes,
            self._expected,
            path=source.path,
            namespace_id=source.nsid,
            starting_lba=self._position,
            blocks=self._expected // lba_size,
            peer=peer,
        )

    def __repr__(self) -> str:
        what = "ok" if self.ok else f"failed, res {self._result}"
        return f"<Completion {self.user_data}: {what}, {self.nbytes} bytes>"


_SLICE = 1.0  # s, of a loop's wait, as in csrc/ring.c


class _Watch:
    """What one event loop waits with: two descriptors to read, and the futures of its tasks.

    The loop has it as long as it reads them; they are closed with its last reference.
    """

    __slots__ = ("again", "descriptors", "futures", "loop")

    def __init__(self, descriptors: Watch, loop: asyncio.AbstractEventLoop) -> None:
        self.descriptors = descriptors
        self.loop = loop
        # Of tasks that wait for any change; weakly, since a task can end anywhere.
        self.futures: WeakSet[asyncio.Future[None]] = WeakSet()
        self.again: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no task waits with it."""
        return not self.futures and not self.descriptors.requests

    def end(self) -> None:
        """Have the loop read it no more."""
        if self.again is not None:
            self.again.cancel()
        self.loop.remove_reader(self.descriptors.arrivals)
        self.loop.remove_reader(self.descriptors.event)


class AsyncUringStream(Ring):
    """One io_uring and one buffer: reads from any number of namespaces and files into it.

    `depth` is how many commands the kernel has at once, 1..32768. `single_thread` makes the stream
    the calling thread's own (IORING_SETUP_SINGLE_ISSUER and DEFER_TASKRUN, Linux 6.1), and faster;
    `sqpoll` has a kernel thread poll for submissions, `iopoll` polls the drive for completions
    instead of waiting for interrupts (needs poll queues, such as nvme.poll_queues=1). `register`
    says whether the buffer is registered with the kernel, which then pins its pages once and not
    for every command: by default (None) host memory is, if that works; with True it is, or the
    error is raised; with False it isn't.

    All calls may be made from any thread, unless `single_thread`. The buffer can't be closed before
    the stream. `close()` waits for what is in flight; a stream that is collected with commands in
    flight warns, and its memory stays until they are back.

    OSError, with cause and remedy, if the kernel refuses the ring.

    >>> import os
    >>> from gdsdirect import Geometry, GpuMappedBuffer, Namespace, encode_nvme_read_sqe
    >>> geometry = Geometry(nsid=1, lba_size=512, capacity=1024, max_transfer=65536)
    >>> with (
    ...     Namespace("/dev/null", geometry=geometry) as namespace,
    ...     GpuMappedBuffer.from_host_visible(4096) as buffer,
    ...     AsyncUringStream(buffer) as stream,
    ... ):
    ...     command = encode_nvme_read_sqe(1, 0, 8, buffer.address)
    ...     tokens = stream.submit_nvme_passthrough(namespace, command)
    ...     [completion.result() for completion in stream.wait(len(tokens))]
    [4096]
    """

    buffer: GpuMappedBuffer
    _completion = Completion
    _watches: dict[asyncio.AbstractEventLoop, _Watch]

    def __new__(
        cls,
        buffer: GpuMappedBuffer,
        depth: int = 128,
        *,
        single_thread: bool = False,
        sqpoll: bool = False,
        iopoll: bool = False,
        register: bool | None = None,
        _lender: object = None,
    ) -> Self:
        if register is None and getattr(buffer, "kind", None) is MemoryKind.BAR1_PEER:
            register = False  # the kernel refuses long-term pins of P2PDMA pages
        try:
            self = super().__new__(
                cls,
                buffer,
                depth,
                single_thread=single_thread,
                sqpoll=sqpoll,
                iopoll=iopoll,
                register=register,
                _lender=_lender,
            )
        except OSError as error:
            if error.strerror == "io_uring_setup":
                options = {"single_thread": single_thread, "sqpoll": sqpoll, "iopoll": iopoll}
                asked = [name for name, value in options.items() if value]
                raise _setup_error(error.errno or 0, depth, asked, Sysfs()) from None
            raise _registration_error(error.errno or 0, buffer) from None
        self.buffer = buffer
        self._watches = {}
        return self

    def _registration_error(self, number: int) -> OSError:
        """Why the buffer isn't registered; the ring's C code asks for it."""
        return _registration_error(number, self.buffer)

    # ---- Completions

    def wait_async(self, count: int = 1) -> Coroutine[Any, Any, list[Completion]]:
        """`wait()` for asyncio: other tasks run meanwhile. Being cancelled loses nothing."""
        return Then(partial(self._arrive, count), self.poll)

    async def _arrive(self, count: int) -> None:
        """Until there are so many completions, or no more to come."""
        import asyncio

        loop = asyncio.get_running_loop()
        while True:
            ready, flying = self._look()
            if ready >= count or flying == 0:
                return
            await self._news(loop)

    def __aiter__(self) -> Self:
        """`async for completion in stream:` until nothing is left in flight."""
        return self

    def __anext__(self) -> Coroutine[Any, Any, Completion]:
        # One at a time: what a loop that is left early has not seen stays in the stream.
        return Then(self._arrive_one, self._take_one)

    async def _arrive_one(self) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        while True:
            ready, flying = self._look()
            if ready:
                return
            if not flying:
                raise StopAsyncIteration
            await self._news(loop)

    async def _news(self, loop: asyncio.AbstractEventLoop) -> None:
        """Until there is more to look at: see ring_tell_watches_locked in csrc/ring.h."""
        watch = self._watch_of(loop)
        future = loop.create_future()
        watch.futures.add(future)
        try:
            await future
        finally:
            watch.futures.discard(future)
            self._end_if_idle(watch)

    async def _anything_new(self) -> None:
        """Until something changes here, or did already."""
        import asyncio

        with contextlib.suppress(ValueError):  # it is closed: nothing is in flight
            await self._news(asyncio.get_running_loop())

    def _watch_of(self, loop: asyncio.AbstractEventLoop) -> _Watch:
        watch = self._watches.get(loop)
        if watch is None:
            watch = _Watch(self._watch(), loop)
            loop.add_reader(watch.descriptors.arrivals, self._look_again, watch)
            loop.add_reader(watch.descriptors.event, self._look_again, watch)
            # What came before the descriptors were there.
            loop.call_soon(self._look_again, watch)
            watch.again = loop.call_later(_SLICE, self._look_regularly, watch)
            self._watches[loop] = watch  # last: one that isn't read by the loop would wake nobody
        return watch

    def _end_if_idle(self, watch: _Watch) -> None:
        if watch.idle and self._watches.get(watch.loop) is watch:
            del self._watches[watch.loop]
            watch.end()

    def _look_regularly(self, watch: _Watch) -> None:
        """As threads do that wait: a task that nobody woke is late, and not stuck."""
        watch.again = watch.loop.call_later(_SLICE, self._look_regularly, watch)
        self._look_again(watch)

    def _look_again(self, watch: _Watch) -> None:
        """All tasks of a loop look again, and those whose request has finished go on."""
        if self._watches.get(watch.loop) is not watch:
            watch.end()  # an exception came while it was made or ended
            return
        for future in list(watch.futures):
            if not future.done():
                future.set_result(None)
        self._arrived(watch.descriptors)

    # ---- Facts

    @property
    def stats(self) -> StreamStats:
        """What went through the stream so far, in all and by way."""
        counters = self._counters()
        submitted, registered, completed, failed, nbytes = map(sum, zip(*counters, strict=True))
        ways = {way: WayStats(*row) for way, row in zip(_WAYS, counters, strict=True)}
        return StreamStats(submitted, registered, completed, failed, nbytes, ways=ways)

    # ---- The end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"depth {self.depth}, {self.inflight} in flight"
        return f"<{type(self).__name__} {state}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__} belongs to this process and can't be pickled")


def _setup_error(number: int, depth: int, options: list[str], sysfs: Sysfs) -> OSError:
    """Why io_uring_setup failed, and what to do."""
    disabled = sysfs.read("proc/sys/kernel/io_uring_disabled")
    if number == errno.EPERM and disabled == "2":
        why = "kernel.io_uring_disabled is 2, nobody may: run `sysctl kernel.io_uring_disabled=0`"
    elif number == errno.EPERM and disabled == "1":
        group = sysfs.read("proc/sys/kernel/io_uring_group")
        why = (
            "kernel.io_uring_disabled is 1, only CAP_SYS_ADMIN and the group "
            f"kernel.io_uring_group ({group}) may: join it, or run "
            "`sysctl kernel.io_uring_disabled=0`"
        )
    elif number in (errno.EPERM, errno.EACCES):
        why = f"{_filter(sysfs)} refuses it: {PROFILE}"
    elif number == errno.ENOSYS:
        why = (
            f"this kernel, Linux {os.uname().release}, has no io_uring, or {_filter(sysfs)} hides "
            f"it: use Linux 5.19 or later, or {PROFILE}"
        )
    elif number == errno.EINVAL and options:
        why = (
            f"the kernel doesn't take {' with '.join(options)}: single_thread needs Linux 6.1 and "
            "goes neither with sqpoll nor with an older kernel; leave the option out"
        )
    elif number == errno.EINVAL:
        why = "the kernel doesn't know SQE128 and CQE32: use Linux 5.19 or later"
    elif number in (errno.EMFILE, errno.ENFILE):
        why = no_descriptor()
    elif number == errno.ENOMEM:
        why = (
            f"no memory for a ring of depth {depth} (RLIMIT_MEMLOCK is "
            f"{limit_text('RLIMIT_MEMLOCK')} bytes): make it less deep, or raise `ulimit -l`"
        )
    else:
        why = "io_uring_setup failed"
    return OSError(number, f"{os.strerror(number)}: can't make a ring: {why}")


def _registration_error(number: int, buffer: GpuMappedBuffer) -> OSError:
    """Why IORING_REGISTER_BUFFERS failed, and what to do."""
    if number == errno.ENOBUFS:
        peer = buffer.kind is MemoryKind.BAR1_PEER
        why = (
            "the kernel can't register peer memory: use submit_read, or a buffer in host memory"
            if peer
            else "the stream was made with register=False: leave that out, or use submit_read"
        )
    elif number == errno.ENOMEM:
        why = (
            f"registering {buffer.nbytes} bytes beside what this user has registered already "
            f"exceeds RLIMIT_MEMLOCK, {limit_text('RLIMIT_MEMLOCK')} bytes, or the memory there "
            "is: raise `ulimit -l`, or use a smaller buffer"
        )
    elif number in (errno.EFAULT, errno.EOPNOTSUPP):
        why = "peer memory and mapped files can't be pinned for good: use submit_read"
    elif number in (errno.EPERM, errno.EACCES):
        why = f"{_filter(Sysfs())} refuses it: {PROFILE}, or use submit_read"
    else:
        why = "IORING_REGISTER_BUFFERS failed"
    return OSError(number, f"{os.strerror(number)}: the buffer isn't registered: {why}")


def _filter(sysfs: Sysfs) -> str:
    """Who refuses a system call that the kernel itself would allow."""
    seccomp = sysfs.line("Seccomp:", "proc/self/status")
    known = f" ({' '.join(seccomp.split())} in /proc/self/status)" if seccomp else ""
    return f"a seccomp filter{known} or security module"
