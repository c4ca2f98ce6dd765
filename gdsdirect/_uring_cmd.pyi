# csrc/uring_cmd.c and its companions; the docstrings are there.
from collections.abc import Iterable, Sequence
from typing import Protocol, Self, SupportsIndex, final

from typing_extensions import Buffer, disjoint_base

from gdsdirect.namespace import Namespace

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

def nvme_identify(fd: int, cns: int, nsid: int, /) -> bytes: ...
def ask_io_uring() -> dict[str, int]: ...
def open_sources(paths: Sequence[str], flags: int, /) -> list[tuple[str, Source | None, int]]: ...
def read_sources(
    memory: Memory,
    sources: tuple[Source, ...],
    sizes: tuple[int, ...],
    targets: tuple[int, ...],
    /,
) -> list[int]: ...
def direct_alignment(fd: int, /) -> tuple[int, int] | None: ...
def dlpack(
    memory: Memory,
    offset: int,
    code: int,
    bits: int,
    shape: tuple[int, ...],
    versioned: bool,
    /,
) -> object: ...
def take_dlpack(capsule: object, /) -> tuple[object, int, int, bool, bool]: ...

@disjoint_base
class Memory:
    def __new__(cls, owner: object, address: int = 0, nbytes: int = 0) -> Self: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __len__(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def _in_use(self) -> bool: ...
    @property
    def _exposed(self) -> bool: ...
    def _part(self, offset: int, nbytes: int, /) -> Memory: ...
    def close(self) -> None: ...

@final
class Source:
    def __new__(
        cls,
        fd: int,
        path: str,
        *,
        nsid: int = 0,
        lba_size: int = 0,
        capacity: int = 0,
        max_transfer: int = 0,
        safe_transfer: int = 0,
        metadata_size: int = 0,
    ) -> Self: ...
    @property
    def direct(self) -> bool: ...
    @property
    def path(self) -> str: ...
    @property
    def nsid(self) -> int: ...
    @property
    def lba_size(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...

@disjoint_base
class Ring:
    def __new__(
        cls,
        buffer: Memory,
        depth: int = 128,
        *,
        single_thread: bool = False,
        sqpoll: bool = False,
        iopoll: bool = False,
        register: bool | None = None,
    ) -> Self: ...
    def __del__(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def depth(self) -> int: ...
    @property
    def inflight(self) -> int: ...
    @property
    def registered(self) -> bool: ...
    def submit_nvme_passthrough(
        self, namespace: Namespace, commands: Buffer, *, user_data: int | None = None
    ) -> range: ...
    def submit_nvme_passthroughs(
        self, batches: Iterable[tuple[Namespace, Buffer]], *, user_data: int | None = None
    ) -> list[range]: ...
    def submit_read(
        self,
        file: int | _HasFileno,
        file_offset: SupportsIndex,
        nbytes: SupportsIndex,
        target_offset: SupportsIndex,
        *,
        user_data: int | None = None,
    ) -> int: ...
    def submit_read_fixed(
        self,
        file: int | _HasFileno,
        file_offset: SupportsIndex,
        nbytes: SupportsIndex,
        target_offset: SupportsIndex,
        *,
        user_data: int | None = None,
    ) -> int: ...
    def submit_reads(
        self,
        file: int | _HasFileno,
        file_offsets: Buffer,
        nbytes: SupportsIndex | Buffer,
        target_offsets: Buffer,
        *,
        user_data: int | None = None,
    ) -> range: ...
    def submit_reads_fixed(
        self,
        file: int | _HasFileno,
        file_offsets: Buffer,
        nbytes: SupportsIndex | Buffer,
        target_offsets: Buffer,
        *,
        user_data: int | None = None,
    ) -> range: ...
    def wait_into(self, out: Buffer, count: int = 1, timeout: float | None = None) -> int: ...
    def fileno(self) -> int: ...
    def close(self, timeout: float | None = None) -> None: ...
    def _submit_files(
        self,
        sources: tuple[Source, ...],
        file_offsets: Buffer,
        nbytes: Buffer,
        target_offsets: Buffer,
        fixed: bool,
        user_data: int,
        /,
    ) -> None: ...
    def _take(
        self, count: int, timeout: float | None, most: int = ..., /
    ) -> list[tuple[int, int, int, int, int, int, Source]]: ...
    def _look(self) -> tuple[int, int]: ...
    def _watch(self) -> tuple[int, int]: ...
    def _unwatch(self, event: int, /) -> None: ...
    def _counters(self) -> tuple[tuple[int, int, int, int, int], ...]: ...
