"""Batches of samples: in random order from one large file, or from many small ones.

    python load_batch.py samples.raw --dtype float32 --shape 3,64,64 --batch 32
    python load_batch.py folder/ --dtype bfloat16 --shape 1024 --torch
    python load_batch.py samples.raw --shape 4096 --into peer:/sys/bus/pci/devices/…/p2pmem/allocate

A sample is `--shape` elements of `--dtype`: a small file has one, a large one many, none a header.
A batch is an array of a buffer's own bytes, and is told with the ways that they came.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import math
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import gdsdirect
from gdsdirect import Chunk, File, GpuMappedBuffer, Tensor, stream_files


class Sample(NamedTuple):
    """What each sample is, of `nbytes`."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def side_by_side(self, count: int, buffer: GpuMappedBuffer) -> Tensor:
        return buffer.tensor(self.dtype, (count, *self.shape))


class Batch(NamedTuple):
    """Samples in a buffer until the next batch is asked for, and bytes by the way they came."""

    tensor: Tensor
    ways: Counter[str]


async def read_batch(
    file: File, numbers: list[int], sample: Sample, buffer: GpuMappedBuffer
) -> Batch:
    """Read the samples with these numbers all at a time, each into its place."""
    size, ways = sample.nbytes, Counter[str]()
    reads = [
        file.read_into_async(buffer, offset=number * size, size=size, target_offset=place * size)
        for place, number in enumerate(numbers)
    ]
    for result in await asyncio.gather(*reads):
        if result.nbytes < size:
            raise EOFError(f"{file.path} was cut off")
        ways.update({result.path.name: size, "copied": result.bounce_bytes})
    return Batch(sample.side_by_side(len(reads), buffer), ways)


async def of_one_file(
    file: File, batches: list[list[int]], sample: Sample, buffers: list[GpuMappedBuffer]
) -> AsyncGenerator[Batch, None]:
    """While a batch is in use, the next one is read into the other buffer."""
    coming: asyncio.Task[Batch] | None = None
    for numbers, buffer in zip(batches, cycle(buffers), strict=False):
        now, coming = coming, asyncio.create_task(read_batch(file, numbers, sample, buffer))
        if now is not None:
            yield await now
    if coming is not None:
        yield await coming


def copied(chunks: list[Chunk], sample: Sample, buffer: GpuMappedBuffer) -> Batch:
    """Copy the chunks side by side, and give their slots back."""
    size, ways = sample.nbytes, Counter[str]()
    with buffer.view() as view:
        for place, chunk in enumerate(chunks):
            if chunk.offset or chunk.nbytes != size:
                raise ValueError(f"{chunk.file} is no sample of {size} bytes")
            view[place * size : (place + 1) * size] = chunk.view
            ways.update({chunk.path.name: size, "copied": size})
            chunk.release()
    return Batch(sample.side_by_side(len(chunks), buffer), ways)


async def of_many_files(
    paths: list[Path], size: int, sample: Sample, buffer: GpuMappedBuffer, *, direct: bool
) -> AsyncGenerator[Batch, None]:
    """The stream reads `size` files ahead of those that make up a batch."""
    slots = GpuMappedBuffer.from_host_visible(2 * size * (sample.nbytes + 8192))
    held: list[Chunk] = []
    async with stream_files(paths, slots, chunk_size=sample.nbytes, direct=direct) as stream:
        async for chunk in stream:
            held.append(chunk)
            if len(held) == size:
                yield copied(held, sample, buffer)
                held.clear()
        if held:
            yield copied(held, sample, buffer)


def described(tensor: Tensor, library: Any) -> str:
    """Shape, dtype and mean, as NumPy or torch sees them in the buffer."""
    see = library.from_dlpack if library.__name__ == "torch" else library.asarray
    array = see(tensor)
    mean = array.mean(dtype=library.float64).item()
    return f"{tuple(array.shape)} {array.dtype}, mean {mean:.9g}"


def told(ways: Counter[str]) -> str:
    return ", ".join(f"{nbytes:,} bytes {way}" for way, nbytes in ways.items())


async def use(batches: AsyncGenerator[Batch, None], library: Any) -> None:
    """Print what is in each batch, and at the end how fast they came."""
    ways, begun = Counter[str](), time.perf_counter()
    async for batch in batches:
        # In a thread, so that the loop goes on with what is read ahead.
        print(await asyncio.to_thread(described, batch.tensor, library), "|", told(batch.ways))
        ways.update(batch.ways)
    seconds = time.perf_counter() - begun
    rate = (ways.total() - ways["copied"]) / seconds / 1e6
    print(f"{rate:,.1f} MB/s in {seconds:.3f} s | {told(ways)}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Load batches of samples, and tell their means.")
    parser.add_argument("paths", nargs="+", type=Path, help="one large file, a folder, or files")
    parser.add_argument("--dtype", default="float32", help="such as float32 or bfloat16")
    parser.add_argument("--shape", default="1024", help="of a sample, such as 3,64,64")
    parser.add_argument("--batch", default=32, type=int, help="samples of a batch")
    parser.add_argument("--seed", type=int, help="of the random order")
    parser.add_argument("--into", default="host", help="host, or peer:PATH of a p2pmem file")
    parser.add_argument("--cached", action="store_true", help="read through the page cache")
    parser.add_argument("--torch", action="store_true", help="see batches by torch, not NumPy")
    return parser.parse_args()


def sample_of(dtype: str, shape: str) -> Sample:
    lengths = tuple(map(int, shape.split(",")))
    element = GpuMappedBuffer.from_host_visible(16).tensor(dtype, ())
    return Sample(dtype, lengths, math.prod(lengths) * element.nbytes)


def memory(into: str, nbytes: int) -> GpuMappedBuffer:
    # Nobody closes it: it goes with its last array, which the traceback of an error may hold.
    if into.startswith("peer:"):
        return GpuMappedBuffer.from_bar1_peer(into.removeprefix("peer:"), nbytes)
    return GpuMappedBuffer.from_host_visible(nbytes)


async def main() -> None:
    given = options()
    sample, size = sample_of(given.dtype, given.shape), given.batch
    library = importlib.import_module("torch" if given.torch else "numpy")
    one, other = (memory(given.into, size * sample.nbytes) for _ in range(2))
    shuffle, direct = random.Random(given.seed).shuffle, not given.cached
    first, *more = given.paths
    if first.is_dir() or more:
        paths = given.paths if more else sorted(first.iterdir())
        shuffle(paths)
        await use(of_many_files(paths, size, sample, one, direct=direct), library)
        return
    with gdsdirect.open(first, direct=direct) as file:
        numbers = list(range(file.size // sample.nbytes))
        shuffle(numbers)
        parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        await use(of_one_file(file, parts, sample, [one, other]), library)


if __name__ == "__main__":
    asyncio.run(main())
