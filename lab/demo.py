"""`make demo`: reads along every way there is, as one table with its proof.

    python -m lab.demo                                        in the virtual machine
    python -m lab.demo --device /dev/ng0n1 [--peer PATH]      on this machine's own drive, read-only

Exit status 0 if every digest is right and, in the virtual machine, every address that a drive was
told to write to lay inside the peer's BAR for the reads into peer memory; else 1.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lab import Drive, LabError, TraceRead, run

MIB = 1 << 20
READS = Path(__file__).with_name("demo_reads.py")
DATA, FILES, PEER = 1, 2, 3  # namespace ids, by which the trace tells the drives apart
FIRST_MARKER = 4096  # as in demo_reads.py


@dataclass(frozen=True)
class Proof:
    """Of one way: what the drives' trace shows of its reads."""

    commands: int
    in_bar: int
    nbytes: int


def main() -> int:
    options = _options()
    print(f"{options.size // MIB} MiB along each way", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="gdsdirect-demo-") as name:
        folder = Path(name)
        try:
            if options.device:
                return _on_real_hardware(folder, options.device, options.peer, options.size)
            return _in_the_lab(folder, options.size)
        except LabError as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Reads along every way, with proof.")
    parser.add_argument("--device", help="an NVMe namespace of this machine, /dev/ngXnY")
    parser.add_argument("--peer", help="a file of this machine that maps to PCI peer memory")
    parser.add_argument("--size", type=int, default=64, metavar="MIB", help="default 64")
    options = parser.parse_args()
    options.size *= MIB
    return options


# ---- In the virtual machine


def _in_the_lab(folder: Path, size: int) -> int:
    digest = _make_images(folder, size)
    drives = [
        Drive("data", contents=folder / "namespace", nsid=DATA),
        Drive("files", contents=folder / "files.ext4", nsid=FILES),
        Drive("peer", nsid=PEER, peer_memory=64 * MIB),
    ]
    report = folder / "report"
    report.mkdir()
    result = run(
        [sys.executable, "-P", str(READS), "--lab", f"--size={size}", f"--report={report}/json"],
        drives=drives,
        share=report,
        output=sys.stderr,
        timeout=600,
    )
    if result.status or result.kernel_problems:
        print(f"demo: the reads ended with status {result.status}", file=sys.stderr)
        print(*result.kernel_problems, sep="\n", file=sys.stderr)
        return 1
    said = json.loads((report / "json").read_text())
    first, last = said["bar"]
    proofs = [
        _proof(reads, first, last + 1) for reads in _between_marks(result.trace, len(said["rows"]))
    ]
    release = next((line for line in result.kernel_log.splitlines() if "Linux version" in line), "")
    print(f"kernel {release.partition('Linux version ')[2].split(' ')[0]}, ", end="")
    print(f"the peer's BAR at {first:#x}..{last:#x}, {result.seconds:.0f} s in all")
    return _show(said["rows"], digest, size, proofs)


def _make_images(folder: Path, size: int) -> str:
    """A namespace of random bytes, and an ext4 file system with the same bytes in a file."""
    contents = random.randbytes(size)
    (folder / "namespace").write_bytes(contents)
    (folder / "tree").mkdir()
    (folder / "tree" / "data").write_bytes(contents)
    image = folder / "files.ext4"
    with image.open("wb") as file:
        file.truncate(size + size // 4 + 16 * MIB)
    subprocess.run(
        ["mkfs.ext4", "-q", "-d", str(folder / "tree"), str(image)],
        check=True,
        env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"},
    )
    return hashlib.sha256(contents).hexdigest()


def _between_marks(trace: Sequence[TraceRead], ways: int) -> list[list[TraceRead]]:
    """Each way's reads: those between its two marks, of the drives that it reads from."""
    marks = [
        next(i for i, read in enumerate(trace) if (read.nsid, read.lba) == (PEER, lba))
        for lba in range(FIRST_MARKER, FIRST_MARKER + 2 * ways)
    ]
    return [
        [read for read in trace[begin:end] if read.nsid in (DATA, FILES)]
        for begin, end in zip(marks[::2], marks[1::2], strict=True)
    ]


def _proof(reads: Sequence[TraceRead], first: int, end: int) -> Proof:
    def inside(read: TraceRead) -> bool:
        return bool(read.addresses) and all(
            first <= address and address + nbytes <= end for address, nbytes in read.addresses
        )

    return Proof(len(reads), sum(map(inside, reads)), sum(read.nbytes for read in reads))


# ---- On a real drive


def _on_real_hardware(folder: Path, device: str, peer: str | None, size: int) -> int:
    report = folder / "json"
    command = [sys.executable, "-P", str(READS), f"--namespace={device}", f"--size={size}"]
    command += [f"--report={report}", *([f"--peer={peer}"] if peer else [])]
    status = subprocess.run(command, check=False).returncode
    if status:
        return 1
    said = json.loads(report.read_text())
    return _show(said["rows"], said["sha256"], said["size"], [None] * len(said["rows"]))


# ---- The table


def _show(
    rows: Sequence[dict[str, Any]], digest: str, size: int, proofs: Sequence[Proof | None]
) -> int:
    table = Table(
        "way", "into", "bytes", "SHA-256 equal", "commands whose addresses are in the BAR"
    )
    good = True
    for row, proof in zip(rows, proofs, strict=True):
        equal = row["sha256"] == digest and row["nbytes"] == size
        proven = proof is None or (
            proof.nbytes == size and (proof.in_bar == (proof.commands if row["peer"] else 0))
        )
        good = good and equal and proven
        into = "peer memory" if row["peer"] else "host memory"
        verdict = "yes" if equal else f"NO: {row['error'] or row['sha256']}"
        table.add_row(row["way"], into, f"{row['nbytes']:,}", verdict, _share(proof))
    Console(width=120 if not sys.stdout.isatty() else None).print(table)
    print("All as it should be." if good else "Something is WRONG: see above.")
    return 0 if good else 1


def _share(proof: Proof | None) -> str:
    if proof is None:
        return "not traced: a real drive"
    if proof.commands == 0:
        return "no command seen"
    share = 100 * proof.in_bar / proof.commands
    return f"{share:.0f} % ({proof.in_bar} of {proof.commands}, {proof.nbytes:,} bytes)"


if __name__ == "__main__":
    sys.exit(main())
