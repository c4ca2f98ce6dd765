"""GpuMappedBuffer: memory that a drive may write into."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from gdsdirect.cuda import is_on_gpu
from gdsdirect.errors import ring_type
from gdsdirect.sysfs import Sysfs
from gdsdirect.tensor import Tensor

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from gdsdirect._uring_cmd import Memory
else:
    Memory = ring_type("Memory")

_HUGE_PAGE = 2 << 20  # the smallest on every architecture that Linux runs NVMe on; alignment only
_HUGE_ENOUGH = 512 << 10  # smaller memory fits a command's segments in single pages

_MAP_HUGETLB = 0x40000  # asm-generic/mman.h; Python's mmap module names it from 3.13 on
_MAP_NORESERVE = 0x4000
_MAP_32BIT = 0x40  # of x86-64, the only one that has aliases

# Places in the address space that are tried for a buffer, and how far they are apart, in bytes.
_PLACES = 16
_SPACING = 256 << 20


class MemoryKind(Enum):
    """What a buffer's memory is, and so which ways lead into it."""

    BAR1_PEER = "bar1_peer"
    """Memory of another PCI device, mapped from its BAR: read into unregistered."""

    HOST_VISIBLE = "host_visible"
    """RAM of the host, which the kernel can register."""


class GpuMappedBuffer(Memory):
    """A range of memory that a drive may write into, and what keeps it mapped.

    Made by one of the `from_…` methods. It supports the buffer protocol: `memoryview(buffer)` and
    `numpy.frombuffer(buffer, …)` see it without a copy. As long as a stream or a view uses it,
    `close()` raises BufferError; `address` raises ValueError once it is closed.

    >>> with GpuMappedBuffer.from_host_visible(8192) as buffer:
    ...     buffer.nbytes, buffer.kind.name, buffer.address % mmap.PAGESIZE
    (8192, 'HOST_VISIBLE', 0)
    """

    __slots__ = ("__weakref__", "_device_address", "_kind", "_made_of", "_rings")
    _kind: MemoryKind
    _device_address: int | None
    _made_of: tuple[object, int, int]
    # The SharedRing, which is above this module, by the process that it belongs to.
    _rings: dict[int, Any]

    @classmethod
    def _map(cls, kind: MemoryKind, mapped: Callable[[int], Buffer]) -> Self:
        """What `mapped(flags)` maps; below 4 GiB if something else is at its aliases elsewhere.

        There an address is its own alias: see csrc/alias.h.
        """
        buffer = cls._make(kind, mapped(0))
        if buffer._exposed:
            with contextlib.suppress(OSError):  # there is no room for two, or none there
                buffer = cls._make(kind, mapped(_MAP_32BIT))
        return buffer

    @classmethod
    def _make(cls, kind: MemoryKind, owner: object, *, address: int = 0, nbytes: int = 0) -> Self:
        self = cls(owner, address, nbytes)
        self._kind = kind
        self._device_address = None
        self._made_of = (owner, address, nbytes)
        self._rings = {}
        return self

    def _twin(self) -> GpuMappedBuffer:
        """The same memory once more: what uses it keeps the memory, and not this buffer."""
        if self.closed:
            raise ValueError("the memory is closed")
        owner, address, nbytes = self._made_of
        return GpuMappedBuffer._make(self._kind, owner, address=address, nbytes=nbytes)

    @classmethod
    def from_bar1_peer(
        cls, source: str | os.PathLike[str] | BinaryIO, nbytes: int, *, offset: int = 0
    ) -> Self:
        """Map `nbytes` of PCI peer memory from `source`, starting at its byte `offset`.

        `source` is a path or an open file whose mmap gives pages of a PCI BAR (P2PDMA), such as
        /sys/bus/pci/devices/<address>/p2pmem/allocate, of which each mapping allocates anew. Of a
        GPU that file gives memory that CUDA may hold too: map a GPU's through its driver.
        Whether a drive can write there shows only when it does: both must be below one PCIe switch.

        Raises OSError, with cause and remedy, if the file is missing or doesn't map, ValueError
        for a size that is not positive or a regular file, which is not peer memory.
        """
        if nbytes < 1:
            raise ValueError(f"nbytes is {nbytes}: peer memory has at least 1 byte")
        if not isinstance(source, (str, os.PathLike)):
            fd, name = source.fileno(), getattr(source, "name", source)
            return cls._map_peer(fd, name, nbytes, offset)
        path = os.fspath(source)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, _why_no_peer_memory(Sysfs()), path) from None
        except PermissionError as error:
            text = "peer memory needs the right to read and write this file: give it, or be root"
            raise PermissionError(error.errno, text, path) from None
        try:
            return cls._map_peer(fd, path, nbytes, offset)
        finally:
            os.close(fd)

    @classmethod
    def _map_peer(cls, fd: int, name: object, nbytes: int, offset: int) -> Self:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_dev != os.stat("/sys").st_dev:
            raise ValueError(f"{name} is a regular file, whose pages are RAM, not PCI peer memory")
        try:
            return cls._map(
                MemoryKind.BAR1_PEER,
                lambda flags: mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | flags, offset=offset),
            )
        except OSError as error:
            raise _mapping_error(error, name, nbytes) from None

    @classmethod
    def from_bar1_peer_address(cls, address: int, nbytes: int, owner: object) -> Self:
        """Take `nbytes` of peer memory that somebody else mapped at `address`.

        `owner` is kept alive, and must keep the range mapped as long as it lives. The range is not
        examined: an address that isn't mapped makes reads into it fail with EFAULT, and views of
        it crash.
        """
        if address < 1 or nbytes < 1:
            raise ValueError(
                f"address is {address:#x}, nbytes {nbytes}: give a mapped range of at least 1 byte"
            )
        return cls._make(MemoryKind.BAR1_PEER, owner, address=address, nbytes=nbytes)

    @classmethod
    def from_host_visible(
        cls, nbytes: int, *, hugepages: bool = False, device: int | None = None
    ) -> Self:
        """Allocate `nbytes` of page-aligned host memory, zeroed.

        With `hugepages` it is in pages of the system's huge page size, which makes registering it
        cheaper; OSError says how to reserve them where there are not enough.

        With `device`, CUDA's ordinal of a GPU, it is also page-locked and mapped into the GPUs
        (cuMemHostRegister), on that one's NUMA node where the kernel grants it, until the memory
        goes: `device_address` is where the GPU sees it, and kernels and copies reach it there. It
        needs the extra `gdsdirect[cuda]`: CudaUnavailableError where that or the driver is missing,
        CudaError where CUDA refuses, ValueError where there is no such GPU.
        """
        if nbytes < 1:
            raise ValueError(f"nbytes is {nbytes}: a buffer has at least 1 byte")
        buffer = cls._on_host(nbytes, hugepages=hugepages)
        return buffer if device is None else cls._pinned(buffer, device)

    @classmethod
    def _pinned(cls, plain: Self, device: int) -> Self:
        from gdsdirect.cuda import Pinned

        pinned = Pinned(plain, device)
        buffer = cls._make(plain.kind, pinned, address=plain.address, nbytes=plain.nbytes)
        buffer._device_address = pinned.address
        return buffer

    @classmethod
    def _on_host(cls, nbytes: int, *, hugepages: bool) -> Self:
        if not hugepages:
            buffer = cls._make(MemoryKind.HOST_VISIBLE, _anonymous_memory(nbytes))
            return cls._elsewhere(buffer) if buffer._exposed else buffer
        size = Sysfs().huge_page_size()
        pages = -(-nbytes // size)
        flags = _ANONYMOUS | _MAP_HUGETLB
        try:
            return cls._map(
                MemoryKind.HOST_VISIBLE,
                lambda low: memoryview(mmap.mmap(-1, pages * size, flags=flags | low))[:nbytes],
            )
        except OSError as error:
            text = (
                f"{os.strerror(error.errno or 0)}: {pages} huge pages of {size} bytes are not "
                f"free; reserve them with `sysctl vm.nr_hugepages={pages}` or more, or leave "
                "hugepages out"
            )
            raise OSError(error.errno, text) from None

    @classmethod
    def _elsewhere(cls, exposed: Self) -> Self:
        """Memory of the same size where nothing else is at its aliases (csrc/alias.h), if there is.

        Looked for in one mapping of more than 4 GiB; the untouched rest of it costs addresses.
        """
        try:
            mapping = _anonymous_memory(exposed.nbytes + _PLACES * _SPACING, _MAP_NORESERVE)
        except OSError:  # RLIMIT_AS
            return exposed
        with memoryview(mapping) as view:
            for place in range(0, _PLACES * _SPACING, _SPACING):
                buffer = cls._make(MemoryKind.HOST_VISIBLE, view[place : place + exposed.nbytes])
                if not buffer._exposed:
                    return buffer
        return exposed

    @classmethod
    def from_object(cls, obj: Buffer) -> Self:
        """Use the memory of `obj`: a bytearray, a NumPy array, any writable contiguous buffer.

        It is kept alive, and can't be resized until this buffer is closed. Its start must be a
        multiple of 4 for NVMe commands, and of the block size for O_DIRECT.
        """
        try:
            view = memoryview(obj)
        except TypeError as error:
            if not is_on_gpu(obj):
                raise
            raise TypeError(
                f"this {type(obj).__name__} is GPU memory, which read_into and streams take, and "
                f"nothing else: read each range by read_into ({error})"
            ) from None
        with view:
            if view.readonly or not view.c_contiguous or view.nbytes == 0:
                what = "read-only" if view.readonly else "empty or not contiguous"
                raise ValueError(
                    f"the memory of this {type(obj).__name__} is {what}: a drive writes into "
                    "writable, contiguous memory"
                )
        return cls._make(MemoryKind.HOST_VISIBLE, obj)

    def close(self) -> None:
        """Let go of the memory.

        Raises BufferError while a stream or a view uses it, or a read into it is in flight. A
        second call does nothing.
        """
        ring = self._rings.get(os.getpid())
        if ring is not None:
            ring._collect()  # reads that were given up may be back
        super().close()
        self._made_of = (None, 0, 0)
        self._close_ring()

    def _close_ring(self) -> None:
        """Give back the ring that files are read by, which nothing needs any more."""
        ring = self._rings.get(os.getpid())
        if ring is not None and ring._close_if_idle():
            # Errors may hold the ring for long, and what used its memory.
            with contextlib.suppress(BufferError):
                ring.buffer.close()
        self._rings.clear()

    @property
    def kind(self) -> MemoryKind:
        """What the memory is."""
        return self._kind

    @property
    def device_address(self) -> int | None:
        """The address at which a GPU sees the memory; None where none does.

        Given by `from_host_visible(…, device=)`. ValueError once the buffer is closed.
        """
        _ = self.address
        return self._device_address

    def view(self) -> memoryview:
        """A writable memoryview of all bytes. `close()` waits for its release."""
        return memoryview(self)

    def tensor(
        self, dtype: object, shape: int | Sequence[int] | None = None, *, offset: int = 0
    ) -> Tensor:
        """The bytes from `offset` on as an array, which NumPy and torch see without a copy.

        `dtype` is a name ("float32", "bfloat16", …) or NumPy's or torch's own object for it, and
        `shape` defaults to one dimension to the buffer's end. ValueError where the array would not
        fit, or not begin at a multiple of its elements' size.

        >>> with GpuMappedBuffer.from_host_visible(4096) as buffer:
        ...     print(buffer.tensor("float32", (8, 16), offset=1024))
        <Tensor float32 (8, 16) at offset 1024>
        """
        return Tensor(self, dtype, shape, offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        # An exception's frames may hold views, and it says more than that.
        with contextlib.suppress(*([BufferError] if kind is not None else [])):
            self.close()

    def __repr__(self) -> str:
        where = "closed" if self.closed else f"{self.nbytes} bytes at {self.address:#x}"
        return f"<{type(self).__name__} {self._kind.name}, {where}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__} is memory of this process and can't be pickled")


# MAP_PRIVATE: a fork's child gets a copy, and never shares what the drive writes for the parent.
_ANONYMOUS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)


def _anonymous_memory(nbytes: int, flags: int = 0) -> mmap.mmap | memoryview:
    """Whole pages, and in large memory transparent huge pages where the system has some free.

    An NVMe command takes only so many runs of pages (max_segments in sysfs, about 127). In single
    pages, commands of max_transfer bytes fail on many drives; in huge pages they are a few runs.
    """
    if nbytes < _HUGE_ENOUGH:
        return mmap.mmap(-1, nbytes, flags=_ANONYMOUS | flags)
    whole = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    mapping = mmap.mmap(-1, whole + _HUGE_PAGE, flags=_ANONYMOUS | flags)
    # Advice, which a kernel without huge pages refuses.
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    # The untouched rest on both sides costs addresses, not memory.
    start = -GpuMappedBuffer._make(MemoryKind.HOST_VISIBLE, mapping).address % _HUGE_PAGE
    return memoryview(mapping)[start : start + nbytes]


def _why_no_peer_memory(sysfs: Sysfs) -> str:
    if sysfs.kernel_has_p2pdma().enabled is False:
        return (
            "no peer memory: this kernel was built without P2PDMA; boot one with "
            "CONFIG_PCI_P2PDMA=y (Debian's kernels have it from 7 on)"
        )
    providers = ", ".join(provider.address for provider in sysfs.peer_memory_providers())
    return (
        "no such file: give a file that maps to PCI peer memory; "
        f"devices that lend theirs here: {providers or 'none'}"
    )


def _mapping_error(error: OSError, name: object, nbytes: int) -> OSError:
    """The same error, with what it means for peer memory."""
    meaning = {
        errno.ENOMEM: f"fewer than {nbytes} bytes are free: see `available` beside the file",
        errno.ENODEV: "the file can't be mapped, so it is no peer memory",
        errno.EINVAL: "the file maps no such size and offset: try whole pages, offset 0",
        errno.EACCES: "the file must be open for reading and writing",
    }.get(error.errno or 0, "mapping peer memory failed")
    return OSError(error.errno, f"{os.strerror(error.errno or 0)}: {meaning}", str(name))
