"""The bytes of a namespace, block device or file, and the choice of the way they go."""

from __future__ import annotations

import os
import stat
from array import array
from typing import TYPE_CHECKING, Self

from gdsdirect._nvme_sqe import encode_nvme_read_sqes
from gdsdirect.errors import ring_module
from gdsdirect.namespace import Namespace
from gdsdirect.stream import DataPath

if TYPE_CHECKING:
    from gdsdirect._uring_cmd import Source
    from gdsdirect.stream import AsyncUringStream

_PIECE = 1 << 20  # bytes of one read of a file: large enough that its overhead doesn't show
_DIRECT_ALIGNMENT = 4096  # bytes; what O_DIRECT wants of offset, size and address at the most


class File:
    """What `path` names, open for reading: an NVMe namespace (/dev/ngXnY), a block device, a file.

    A namespace is read by passthrough; everything else with O_DIRECT where its file system takes
    that, into the registered buffer if there is one; and else, or with `direct=False`, through the
    page cache, which may have it already. `why` says what stands in the way of a better one, or is
    None.

    `size` is in bytes. Reads start and end at multiples of `alignment`, in the file and in the
    buffer; only the file's end may lie between.
    """

    def __init__(self, path: str | os.PathLike[str], *, direct: bool = True) -> None:
        self.path = os.fspath(path)
        self.why: str | None = None
        self._namespace: Namespace | None = None
        mode = os.stat(self.path).st_mode
        if stat.S_ISCHR(mode):
            self._namespace = Namespace(self.path)
            self.alignment = self._namespace.lba_size
            self.size = self._namespace.capacity * self._namespace.lba_size
            return
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ValueError(
                f"{self.path} is neither a file nor a device: give an NVMe namespace (/dev/ngXnY), "
                "a block device or a regular file"
            )
        # The ring finds it by this name, and registers the file as long as it is open.
        self._source = self._open(direct)
        self.alignment = _DIRECT_ALIGNMENT if self.why is None else 1
        try:
            self.size = os.lseek(self._source.fileno(), 0, os.SEEK_END)
        except OSError as error:
            self._source.close()
            text = f"{error.strerror}: a file without an end can't be read, such as those in /proc"
            raise OSError(error.errno, text, self.path) from None

    def _open(self, direct: bool) -> Source:
        if direct:
            try:
                source = self._open_with(os.O_DIRECT)
            except OSError as error:
                self.why = f"its file system takes no O_DIRECT ({error.strerror})"
            else:
                if source.direct:
                    return source
                source.close()
                self.why = "its file system keeps files in memory, and copies in spite of O_DIRECT"
        else:
            self.why = "it was opened with direct=False"
        return self._open_with(0)  # raises where more than O_DIRECT is in the way

    def _open_with(self, flag: int) -> Source:
        ring = ring_module()
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | flag)
        source: Source = ring.Source(fd, self.path)
        return source

    def way(self, stream: AsyncUringStream) -> DataPath:
        """The way that bytes will go into the stream's buffer."""
        if self._namespace is not None:
            return DataPath.NVME_PASSTHROUGH
        if self.why is not None:
            return DataPath.BUFFERED
        return DataPath.FILE_FIXED if stream.registered else DataPath.FILE_DIRECT

    def read_into(
        self,
        stream: AsyncUringStream,
        *,
        offset: int,
        nbytes: int,
        target_offset: int = 0,
        timeout: float | None = None,
    ) -> int:
        """Read `nbytes` from `offset` into the stream's buffer at `target_offset`, and wait.

        Returns the bytes read: fewer than `nbytes` only where the file ends. The stream must have
        nothing else in flight. Raises the first error of any of the reads, once all are done, and
        TimeoutError if they are not within `timeout` seconds.
        """
        nbytes = min(nbytes, self.size - offset)
        if self._namespace is not None:
            count = self._submit_commands(self._namespace, stream, offset, nbytes, target_offset)
        else:
            count = self._submit_reads(stream, offset, nbytes, target_offset)
        done = sorted(stream.wait(count, timeout), key=lambda completion: completion.user_data)
        if len(done) < count:
            raise TimeoutError(f"{self.path}: the read did not come back in {timeout:g} s")
        # All but the last must be whole; the last may be asked beyond the end, up to its alignment.
        whole = sum(completion.result() for completion in done[:-1])
        for last in done[-1:]:
            if whole + last.nbytes < nbytes:
                last.result()
        return max(nbytes, 0)

    def _submit_commands(
        self,
        namespace: Namespace,
        stream: AsyncUringStream,
        offset: int,
        nbytes: int,
        target_offset: int,
    ) -> int:
        lba_size, most = namespace.lba_size, namespace.safe_transfer
        starts = range(0, nbytes, most)
        address = stream.buffer.address + target_offset
        commands = encode_nvme_read_sqes(
            namespace.nsid,
            array("Q", [(offset + start) // lba_size for start in starts]),
            array("I", [min(most, nbytes - start) // lba_size for start in starts]),
            array("Q", [address + start for start in starts]),
        )
        return len(stream.submit_nvme_passthrough(namespace, commands))

    def _submit_reads(
        self, stream: AsyncUringStream, offset: int, nbytes: int, target_offset: int
    ) -> int:
        submit = stream.submit_reads_fixed if stream.registered else stream.submit_reads
        starts = range(0, nbytes, _PIECE)
        tokens = submit(
            self,
            array("Q", [offset + start for start in starts]),
            array("I", [self._aligned(min(_PIECE, nbytes - start)) for start in starts]),
            array("Q", [target_offset + start for start in starts]),
        )
        return len(tokens)

    def _aligned(self, nbytes: int) -> int:
        return nbytes + -nbytes % self.alignment

    def fileno(self) -> int:
        """The descriptor, still owned by this object; ValueError once closed."""
        return self._namespace.fileno() if self._namespace is not None else self._source.fileno()

    def close(self) -> None:
        """Close the file."""
        if self._namespace is not None:
            self._namespace.close()
        else:
            self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
