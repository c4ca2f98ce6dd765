"""What the drives did, read from QEMU's trace."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

EVENTS = (
    "pci_nvme_io_cmd",
    "pci_nvme_admin_cmd",
    "pci_nvme_read",
    "pci_nvme_rw_cb",
    "pci_nvme_map_addr",
)
"""The events to ask QEMU for.

A drive maps a read's addresses right after its `pci_nvme_read` line, before it does anything else.
The other events also map addresses, which are not a read's data: their lines end the read.
"""

_READ = re.compile(r"pci_nvme_read cid \d+ nsid (\d+) nlb (\d+) count (\d+) lba 0x([0-9a-f]+)")
_SPAN = re.compile(r"pci_nvme_map_addr addr 0x([0-9a-f]+) len (\d+)")


@dataclass(frozen=True)
class TraceRead:
    """One read command that a drive began to execute.

    The trace does not name the drive: `nsid` does, where each drive has its own.
    """

    nsid: int
    lba: int
    blocks: int
    nbytes: int
    """Bytes of data, with the metadata where that is in the same buffer."""
    addresses: tuple[tuple[int, int], ...] = ()
    """Where the drive was told to write: (bus address, bytes), in order, merged where adjacent.

    Empty when the drive refused the command before (a block out of range, too long).
    """


def parse(lines: Iterable[str]) -> Iterator[TraceRead]:
    """The reads in a trace, in order; a line that is none of the above counts for nothing."""
    read: TraceRead | None = None
    spans: list[tuple[int, int]] = []
    for line in lines:
        if "pci_nvme_" not in line:
            continue
        if read and (span := _SPAN.search(line)):
            _extend(spans, int(span[1], 16), int(span[2]))
            continue
        if read:
            yield replace(read, addresses=tuple(spans))
        read, spans = _read(line), []
    if read:
        yield replace(read, addresses=tuple(spans))


def _extend(spans: list[tuple[int, int]], address: int, nbytes: int) -> None:
    if spans and sum(spans[-1]) == address:
        spans[-1] = (spans[-1][0], spans[-1][1] + nbytes)
    else:
        spans.append((address, nbytes))


def _read(line: str) -> TraceRead | None:
    if found := _READ.search(line):
        nsid, blocks, nbytes, lba = found.groups()
        return TraceRead(int(nsid), int(lba, 16), int(blocks), int(nbytes))
    return None
