"""load_file: all tensors of a file, or of a checkpoint in several, each file in one read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from gdsdirect.safetensors.frameworks import framework_of
from gdsdirect.safetensors.shards import find
from gdsdirect.transfer import ReadResult

Progress = bool | Callable[[int, int], object]
"""Whether to show a bar; or what to call with the bytes that are there, and all of them."""


class Tensors(dict[str, Any]):
    """What `load_file` returns: the tensors by name.

    `metadata` is the file's own ("__metadata__"), and `reads` tells of each file that was read
    which way its bytes went.
    """

    metadata: dict[str, str]
    reads: dict[str, ReadResult]


def load_file(
    path: str | os.PathLike[str],
    device: object = "cpu",
    *,
    framework: str | None = None,
    direct: bool | None = None,
    progress: Progress = False,
) -> Tensors:
    """Read all tensors of a safetensors file, or of a checkpoint by its index (`….index.json`).

    `device` is "cpu", or "cuda:0" (or 0) and so on. The arrays are those of `framework`: "numpy"
    (the default on the CPU; for bfloat16 and the 8-bit floats it needs the package ml_dtypes),
    "torch" (the default on a GPU) or "cupy". Those of one file share its memory, which lives as
    long as any of them; what isn't aligned there is a copy.

    A file is read past the page cache, unless that seems to have it; `direct` decides, if given.
    With `progress` a bar is shown (by Rich), or it is called with the bytes so far and all of them.

    SafetensorsError for a file that isn't in order, before any tensor is read; TypeError for a
    dtype that the framework doesn't have; ImportError for a framework that isn't installed; and the
    errors of `File.read_into`.

    >>> import gdsdirect.safetensors, json, struct, tempfile
    >>> header = json.dumps({"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(struct.pack("<Q", len(header)) + header + bytes([1, 2]))
    ...     file.flush()
    ...     gdsdirect.safetensors.load_file(file.name)["w"].tolist()
    [1, 2]
    """
    made = framework_of(framework, device)
    shards, where = checkpoint = find(os.fspath(path), direct=direct)
    for kind in {shard.header.tensors[name].dtype for name, shard in where.items()}:
        made.type_of(kind)
    tensors = Tensors()
    tensors.metadata = checkpoint.metadata()
    tensors.reads = reads = {}
    total = sum(shard.header.end - shard.header.begin for shard in shards)
    with _reported(progress, os.path.basename(path), total) as advance:
        for shard in shards:
            header = shard.header
            with contextlib.closing(shard):
                piece = shard.read(made, [header.begin], header.end - header.begin, advance)
            for name, entry in header.tensors.items():
                if where.get(name) is shard:
                    at = piece.place + entry.offset - header.begin
                    tensors[name] = made.array(piece.memory, at, entry.dtype, entry.shape)
            if piece.result is not None:
                reads[shard.path] = piece.result
    return tensors


@contextlib.contextmanager
def _reported(progress: Progress, name: str, total: int) -> Iterator[Callable[[int], object]]:
    """What to call with the bytes that came."""
    if progress is False:
        yield lambda nbytes: None
    elif progress is True:
        try:
            from rich import progress as bars
        except ImportError as error:
            text = "a bar needs Rich: pip install gdsdirect[cli], or give a function as progress="
            raise ImportError(text, name="rich") from error
        columns = bars.BarColumn(), bars.DownloadColumn(True), bars.TransferSpeedColumn()
        with bars.Progress("{task.description}", *columns) as bar:
            task = bar.add_task(name, total=total)
            yield lambda nbytes: bar.advance(task, nbytes)
    else:
        done = 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        yield advance
