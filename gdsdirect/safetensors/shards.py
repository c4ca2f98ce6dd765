"""Shards: the files of a checkpoint, and reads of them into a framework's memory."""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gdsdirect.file import File
from gdsdirect.memory import GpuMappedBuffer
from gdsdirect.safetensors.frameworks import Framework
from gdsdirect.safetensors.header import SafetensorsError, read_header, stamp_of
from gdsdirect.shared_ring import read_once
from gdsdirect.stream import DataPath
from gdsdirect.transfer import ReadResult, result_of

_PAGE = 4096  # bytes; what lies alike in file and memory against it can be read directly
_PIECE = 256 << 20  # bytes between two reports of progress: so large that the pause doesn't show
_SAMPLES = 16


class Piece(NamedTuple):
    """Bytes of a file, at `place` in the memory, and how they came; None where there were none."""

    memory: Any
    place: int
    result: ReadResult | None


class Shard:
    """One file. Its header is checked at once, and it is opened when bytes are first wanted.

    `direct` says whether to read past the page cache; None: unless that seems to have it.
    """

    def __init__(self, path: str, *, direct: bool | None) -> None:
        self.path = path
        self.header = read_header(path)
        self._direct = direct
        self._file: File | None = None
        self._lock = threading.Lock()

    def _opened(self) -> File:
        with self._lock:
            if self._file is None:
                direct = not self._is_cached() if self._direct is None else self._direct
                file = File(self.path, direct=direct)
                if stamp_of(file.fileno()) != self.header.stamp:
                    file.close()
                    raise SafetensorsError(f"{self.path} was changed after its header was read")
                self._file = file
            return self._file

    def _is_cached(self) -> bool:
        """Whether all samples of the tensors' bytes are in the page cache."""
        begin, end = self.header.begin, self.header.end
        byte = [bytearray(1)]
        with open(self.path, "rb", buffering=0) as file:
            try:
                for offset in range(begin, end, max(1, (end - begin) // _SAMPLES)):
                    os.preadv(file.fileno(), byte, offset, os.RWF_NOWAIT)
            except OSError:  # EAGAIN: it is not; EOPNOTSUPP: nobody knows
                return False
        return True

    def read(
        self,
        framework: Framework,
        starts: Sequence[int],
        nbytes: int,
        advance: Callable[[int], object] = lambda nbytes: None,
    ) -> Piece:
        """`nbytes` from each of `starts`, one behind the other in new memory; `advance(nbytes)` is
        called as they come."""
        if not starts or not nbytes:
            return Piece(None, 0, None)
        place = starts[0] % _PAGE
        memory = framework.memory(place + len(starts) * nbytes)
        if isinstance(memory, GpuMappedBuffer):
            read_once(memory)
        if len(starts) == 1:
            result = self._read_one(memory, starts[0], starts[0] + nbytes, place, advance)
        else:
            targets = range(place, place + len(starts) * nbytes, nbytes)
            sizes = array("I", [nbytes]) * len(starts)
            result = self._opened().read_many_into(memory, array("Q", starts), sizes, targets)
        if isinstance(memory, GpuMappedBuffer):
            memory._close_ring()
        return Piece(memory, place, result)

    def _read_one(
        self, memory: Any, begin: int, end: int, place: int, advance: Callable[[int], object]
    ) -> ReadResult:
        results = []
        while begin < end:
            size = min(end, (begin // _PIECE + 1) * _PIECE) - begin
            result = self._opened().read_into(memory, offset=begin, size=size, target_offset=place)
            if result.nbytes < size:
                raise SafetensorsError(f"{self.path} became shorter while it was read")
            results.append(result)
            advance(size)
            begin, place = begin + size, place + size
        return together(results)

    def close(self) -> None:
        """Close the file, if it was opened."""
        if self._file is not None:
            self._file.close()


def together(results: Sequence[ReadResult]) -> ReadResult:
    """Several results as one: the least way that any of them took, and all reasons."""
    bytes_of: Counter[DataPath] = Counter()
    for result in results:
        bytes_of.update(result.ways)
    return result_of(
        sum(result.nbytes for result in results),
        bytes_of,
        results[-1].path,
        dict.fromkeys(result.why for result in results if result.why is not None),
        sum(result.bounce_bytes for result in results),
    )


# ---- Checkpoints


class Checkpoint(NamedTuple):
    """Files that belong together, and which of them has each tensor."""

    shards: list[Shard]
    where: dict[str, Shard]

    def metadata(self) -> dict[str, str]:
        """What the files say of themselves; of a key in several of them the last one's."""
        return {key: text for shard in self.shards for key, text in shard.header.metadata.items()}


def find(path: str, *, direct: bool | None) -> Checkpoint:
    """One file's tensors, or those that an index names."""
    if not path.endswith(".json"):
        shard = Shard(path, direct=direct)
        return Checkpoint([shard], dict.fromkeys(shard.header.tensors, shard))
    where = _weight_map(path)
    folder = Path(path).parent
    names = dict.fromkeys(where.values())
    shards = {name: Shard(str(folder / name), direct=direct) for name in names}
    for tensor, name in where.items():
        if tensor not in shards[name].header.tensors:
            raise SafetensorsError(f"{path} says that {name} has {tensor!r}, and it has not")
    return Checkpoint(list(shards.values()), {each: shards[name] for each, name in where.items()})


def _weight_map(path: str) -> dict[str, str]:
    try:
        where = dict(json.loads(Path(path).read_bytes())["weight_map"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        text = f"{path} is no index of a checkpoint: it has no weight_map, from tensors to files"
        raise SafetensorsError(text) from error
    for name in where.values():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise SafetensorsError(f"{path} names the file {name!r}: name files that lie beside it")
    return where
