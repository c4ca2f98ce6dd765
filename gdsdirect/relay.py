"""Relay: chunks of a file through slots, from which something else copies them on to their place.

A slot is read into again once its copy is done, so that drive and copies are busy at a time. There
is no CUDA here: who copies is a `Copier`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from gdsdirect.chunks import Chunk, ChunkStream
from gdsdirect.stream import DataPath


class Mark(Protocol):
    """Tells of a copy, and of all that were started before it."""

    def query(self) -> bool:
        """Whether it is done. Raises what went wrong with it."""

    def synchronize(self) -> None:
        """Wait until it is done. Raises what went wrong with it."""


M = TypeVar("M", bound=Mark, covariant=True)


class Copier(Protocol[M]):
    """Copies, one after the other, beside whoever starts them."""

    def copy(self, source: int, target: int, nbytes: int) -> M:
        """Start to copy from an address of the host to one of the target's."""

    def mark(self) -> M:
        """A mark behind all copies that were started."""

    def drain(self) -> None:
        """Wait until no copy is under way."""


@dataclass
class Relayed(Generic[M]):
    """Bytes that are on their way, the ways that they went to the slots, and why no better one.

    `path` is the last chunk's. `mark` tells when all are there; None where they are.
    """

    nbytes: int = 0
    path: DataPath = DataPath.BUFFERED
    mark: M | None = None
    ways: dict[DataPath, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


class UndrainedError(Exception):
    """Copies may be under way still, and nobody can tell: slots and target are to stay as they are.

    `cause` is the error that the copies were given up for.
    """

    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause


def relay(
    stream: ChunkStream, copier: Copier[M], offset: int, target: int, *, wait: bool
) -> Relayed[M]:
    """Copy all chunks of `stream`, which begins at `offset` of its file, to address `target` on.

    With `wait`, all copies are done when this returns; else they may be under way, and the slots
    are theirs until the result's `mark`. An error of the file's or the copies' is raised once no
    copy is under way: UndrainedError where that can't be known.
    """
    relayed = Relayed[M]()
    pending: deque[tuple[M, Chunk]] = deque()
    try:
        while (chunk := next_of(stream, pending)) is not None:
            if chunk.offset != offset + relayed.nbytes:  # the file was cut off, and grew again
                break
            if chunk.nbytes:
                place = target + relayed.nbytes
                mark = copier.copy(chunk._address, place, chunk.nbytes)
                pending.append((mark, chunk))
            _note(relayed, chunk)
        while wait and pending:
            _release_oldest(pending)
        if not wait:
            relayed.mark = copier.mark()
    except BaseException as error:
        try:
            copier.drain()
        except BaseException:
            raise UndrainedError(error) from error
        raise
    return relayed


def next_of(stream: ChunkStream, pending: deque[tuple[M, Chunk]]) -> Chunk | None:
    """The stream's next chunk, or None, once at most half of its slots wait for their copy."""
    most = len(stream._slots) // 2
    while pending and (len(pending) > most or pending[0][0].query()):
        _release_oldest(pending)
    return next(stream, None)


def _release_oldest(pending: deque[tuple[M, Chunk]]) -> None:
    mark, chunk = pending[0]
    mark.synchronize()
    pending.popleft()
    chunk.release()


def _note(relayed: Relayed[M], chunk: Chunk) -> None:
    relayed.nbytes += chunk.nbytes
    relayed.path = chunk.path
    if chunk.nbytes:
        relayed.ways[chunk.path] = relayed.ways.get(chunk.path, 0) + chunk.nbytes
    if chunk.why is not None and chunk.why not in relayed.reasons:
        relayed.reasons.append(chunk.why)
