"""The demo's reads, beside the drive: the same bytes along each way that there is. Only reads.

Run by its path, with the interpreter that gdsdirect is installed for; `lab/demo.py` does that, and
judges the report. In the virtual machine it finds the drives, and marks where each way begins and
ends in their trace.
"""

import argparse
import contextlib
import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import gdsdirect
from gdsdirect import AsyncUringStream, DataPath, GpuMappedBuffer, Namespace, encode_nvme_read_sqe

BUFFER = 8 << 20
FIRST_MARKER = 4096


@dataclass
class Row:
    """One way. `way` is what gdsdirect says was taken, `peer` whether it led to peer memory."""

    peer: bool
    way: str = ""
    nbytes: int = 0
    sha256: str = ""
    error: str = ""


def read_all(path: str, size: int, buffer: GpuMappedBuffer, row: Row) -> None:
    digest, ways = hashlib.sha256(), set[DataPath]()
    with gdsdirect.open(path) as file, buffer.view() as view:
        for start in range(0, min(size, file.size), buffer.nbytes):
            nbytes = min(buffer.nbytes, size - start)
            result = file.read_into(buffer, offset=start, size=nbytes)
            digest.update(view[: result.nbytes])
            ways.update(result.ways)
            row.nbytes += result.nbytes
    row.way = ", ".join(way.name for way in ways)
    row.sha256 = digest.hexdigest()


def one_way(path: str, size: int, peer: str | None) -> Row:
    row = Row(peer=peer is not None)
    try:
        with (
            GpuMappedBuffer.from_bar1_peer(peer, BUFFER)
            if peer
            else GpuMappedBuffer.from_host_visible(BUFFER)
        ) as buffer:
            read_all(path, size, buffer, row)
    except (OSError, ValueError, RuntimeError) as error:
        row.error = str(error)
    return row


class Marks:
    """Reads of known blocks, that stand in the drives' trace before and after each way's own."""

    def __init__(self, path: str) -> None:
        self.namespace = Namespace(path)
        self.buffer = GpuMappedBuffer.from_host_visible(4096)
        self.stream = AsyncUringStream(self.buffer, depth=1)
        self.lba = FIRST_MARKER

    def __enter__(self) -> None:
        self._set()

    def __exit__(self, *_: object) -> None:
        self._set()

    def _set(self) -> None:
        command = encode_nvme_read_sqe(self.namespace.nsid, self.lba, 1, self.buffer.address)
        self.stream.submit_nvme_passthrough(self.namespace, command)
        self.stream.wait()[0].result()
        self.lba += 1

    def close(self) -> None:
        for thing in (self.stream, self.buffer, self.namespace):
            thing.close()


def all_ways(
    namespace: str, file: str, peer: str | None, size: int, marks: Marks | None = None
) -> list[dict[str, object]]:
    """Every way that there is; those into peer memory only where there is some."""
    rows = []
    for path in (namespace, file):
        for target in (peer, None) if peer else (None,):
            print(f"{path} into {'peer' if target else 'host'} memory …", flush=True)
            with marks or contextlib.nullcontext():
                rows.append(asdict(one_way(path, size, target)))
    return rows


def find_drive(serial: str) -> tuple[str, str]:
    """The generic and the block device of the lab's drive with this serial number."""
    for controller in Path("/sys/class/nvme").iterdir():
        if (controller / "serial").read_text().strip() == serial:
            (generic,) = (node.name for node in controller.glob("ng*n*"))
            return f"/dev/{generic}", f"/dev/nvme{generic.removeprefix('ng')}"
    raise SystemExit(f"no drive has the serial number {serial}")


def peer_memory() -> tuple[str, list[int]]:
    """The lab's peer memory: the file that maps to it, and first and last address of its BAR."""
    (provider,) = Path("/sys/bus/pci/devices").glob("*/p2pmem")
    size = int((provider / "size").read_text())
    for line in (provider.parent / "resource").read_text().splitlines():
        first, last, _ = (int(number, 0) for number in line.split())
        if last - first + 1 >= size:
            return str(provider / "allocate"), [first, last]
    raise SystemExit(f"{provider.parent} has no BAR of {size} bytes")


def in_the_lab(size: int) -> dict[str, object]:
    peer, bar = peer_memory()
    namespace, _ = find_drive("data")
    _, files = find_drive("files")
    marks = Marks(find_drive("peer")[0])
    folder = Path("/run/demo")
    folder.mkdir()
    subprocess.run(["mount", "-o", "ro", files, folder], check=True)
    file = folder / "data"
    file.read_bytes()  # so that the file system's own blocks are read before anything counts
    rows = all_ways(namespace, str(file), peer, size, marks)
    marks.close()
    return {"rows": rows, "bar": bar}


def on_real_hardware(namespace: str, peer: str | None, size: int) -> dict[str, object]:
    """The block device stands for the file, and, read plainly, for what is on the drive."""
    with Namespace(namespace) as opened:
        generic = opened.path
        size = min(size, opened.capacity * opened.lba_size)
    block = generic.replace("/ng", "/nvme")
    digest = hashlib.sha256()
    with open(block, "rb") as plain:
        for start in range(0, size, BUFFER):
            digest.update(plain.read(min(BUFFER, size - start)))
    rows = all_ways(generic, block, peer, size)
    return {"rows": rows, "size": size, "sha256": digest.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's reads.")
    parser.add_argument("--lab", action="store_true", help="this is the virtual machine")
    parser.add_argument("--namespace", help="an NVMe namespace, /dev/ngXnY")
    parser.add_argument("--peer", help="a file that maps to PCI peer memory")
    parser.add_argument("--size", type=int, required=True, help="bytes to read each way")
    parser.add_argument("--report", type=Path, required=True, help="where to write what came of it")
    options = parser.parse_args()
    try:
        if options.lab:
            report = in_the_lab(options.size)
        else:
            report = on_real_hardware(options.namespace, options.peer, options.size)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"demo: {error}") from None
    options.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
