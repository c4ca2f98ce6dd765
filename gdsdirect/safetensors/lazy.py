"""safe_open: tensors of a file one by one, or parts of them, read when they are asked for."""

from __future__ import annotations

import os
import threading
from typing import Any, Self

from gdsdirect.safetensors.frameworks import Framework, framework_of
from gdsdirect.safetensors.header import BITS, Entry
from gdsdirect.safetensors.shards import Checkpoint, Shard, find, together
from gdsdirect.safetensors.slices import Index, select
from gdsdirect.transfer import ReadResult


def safe_open(
    path: str | os.PathLike[str],
    framework: str | None = None,
    device: object = "cpu",
    *,
    direct: bool | None = None,
) -> TensorFile:
    """Open a safetensors file, or a checkpoint by its index (`….index.json`), to read some tensors.

    The arguments and errors are those of `load_file`; every header is checked here. What is read is
    memory of its own, that lives as long as the array.

    >>> import gdsdirect.safetensors, json, struct, tempfile
    >>> header = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(struct.pack("<Q", len(header)) + header + bytes([1, 2, 3, 4]))
    ...     file.flush()
    ...     with gdsdirect.safetensors.safe_open(file.name) as tensors:
    ...         tensors.keys(), tensors.get_slice("w")[1:3].tolist()
    (['w'], [2, 3])
    """
    return TensorFile(find(os.fspath(path), direct=direct), framework_of(framework, device))


class TensorFile:
    """What `safe_open` returns. `close()` it, or use it by `with`. Threads may share it."""

    def __init__(self, checkpoint: Checkpoint, framework: Framework) -> None:
        self._checkpoint = checkpoint
        self._framework = framework
        self._came: ReadResult | None = None
        self._lock = threading.Lock()

    def keys(self) -> list[str]:
        """The tensors' names, by their shards, and in a shard in the order of their bytes."""
        return list(self._checkpoint.where)

    def metadata(self) -> dict[str, str]:
        """What the files say of themselves ("__metadata__")."""
        return self._checkpoint.metadata()

    def get_tensor(self, name: str) -> Any:
        """The tensor of this name. KeyError where there is none."""
        shard, entry = self._find(name)
        return self._bring(shard, entry, [entry.offset], entry.nbytes, entry.shape)

    def get_slice(self, name: str) -> TensorSlice:
        """The tensor of this name, to be indexed: what the index takes is read. KeyError where
        there is none."""
        return TensorSlice(self, *self._find(name))

    @property
    def read(self) -> ReadResult | None:
        """How all came that was read so far; None: nothing was."""
        return self._came

    def close(self) -> None:
        """Close the files. Arrays stay."""
        for shard in self._checkpoint.shards:
            shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _find(self, name: str) -> tuple[Shard, Entry]:
        shard = self._checkpoint.where[name]
        return shard, shard.header.tensors[name]

    def _bring(
        self, shard: Shard, entry: Entry, starts: list[int], nbytes: int, shape: tuple[int, ...]
    ) -> Any:
        """An array of this shape, of `nbytes` from each of these places in the file."""
        framework = self._framework
        framework.type_of(entry.dtype)
        piece = shard.read(framework, starts, nbytes)
        with self._lock:
            results = [each for each in (self._came, piece.result) if each is not None]
            self._came = together(results) if results else None
        return framework.array(piece.memory, piece.place, entry.dtype, shape)


class TensorSlice:
    """A tensor in a file. `slice[index]` reads what the index takes: integers, slices with a step
    of 1 or more, and an ellipsis. Runs of less than 4 KiB are read with what lies between them."""

    def __init__(self, file: TensorFile, shard: Shard, entry: Entry) -> None:
        self._file = file
        self._shard = shard
        self._entry = entry

    def get_shape(self) -> list[int]:
        """The whole tensor's shape."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Its dtype, as the format names it."""
        return self._entry.dtype

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Any:
        entry = self._entry
        if BITS[entry.dtype] % 8:
            raise TypeError(f"elements of {entry.dtype} are no whole bytes: read the whole tensor")
        starts, nbytes, shape, left = select(entry.shape, BITS[entry.dtype] // 8, index)
        places = [entry.offset + start for start in starts]
        return self._file._bring(self._shard, entry, places, nbytes, shape)[left]
